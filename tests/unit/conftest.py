"""Servers for the unit tests: the admin API for the command line, and the live page with a browser before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.browser import CHROMIUM, Browser
from tests.conftest import need_program
from tests.live.site import STEPS, Serve, Site, site
from tests.live.synthetic import Model
from tests.live.synthetic import served as live_served
from tests.unit.adminapi import AdminApi, served
from vllm_sluice.config import Live
from vllm_sluice.telemetry.collector import SnapshotCollector

# The machine may be busy. All else is as Hypothesis has it, which differs where `CI` is set.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture
def api() -> AdminApi:
    return AdminApi()


@pytest.fixture
def url(api: AdminApi) -> Iterator[str]:
    with served(api) as address:
        yield address


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        need_program("chromium", "chromium")
    with Browser() as started:
        yield started


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    yield chromium
    chromium.close_tabs()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(models: list[Model], steps: int = STEPS, settings: Live | None = None, **options) -> Site:
            made = site(tmp_path, models, steps, settings)
            made.url = stack.enter_context(
                live_served(SnapshotCollector(tmp_path), made.history.settings, made.history, **options)
            )
            return made

        yield start
