from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.grafana import stretches
from tests.grafana.stretches import Stretch


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stretch]:
    with stretches.generated(tmp_path_factory.mktemp("generated")) as stretch:
        yield stretch


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stretch]:
    with stretches.recorded(tmp_path_factory.mktemp("recorded")) as stretch:
        yield stretch


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stretch]:
    """The recorded hour as a server without baseline, quantization probe, guard and rules would show it."""
    without = ("sluice_baseline_", "sluice_quantization_", "sluice_guard_", "ALERTS")
    with stretches.recorded(tmp_path_factory.mktemp("bare"), without) as stretch:
        yield stretch


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")
