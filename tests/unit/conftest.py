"""A server of the admin API for the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.adminapi import AdminApi, served


@pytest.fixture
def api() -> AdminApi:
    return AdminApi()


@pytest.fixture
def url(api: AdminApi) -> Iterator[str]:
    with served(api) as address:
        yield address
