"""Histories in a real Prometheus: one that is made up, with known faults, and one recorded from the real demo."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.grafana import record
from tests.grafana.engine import Stretch
from tests.monitoring import history, prometheus


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stretch]:
    folder = tmp_path_factory.mktemp("generated")
    text = folder / "history.txt"
    with text.open("w", encoding="utf-8") as out:
        history.write(out)
    data = prometheus.fill(text, folder / "data")
    text.unlink()
    with prometheus.serving(data) as server:
        yield Stretch(server, history.START, history.END, history.STEP)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stretch]:
    folder = tmp_path_factory.mktemp("recorded")
    text = folder / "history.txt"
    text.write_bytes(lzma.decompress(record.FILE.read_bytes()))
    start, end, scrape = record.span(text)
    data = prometheus.fill(text, folder / "data")
    with prometheus.serving(data) as server:
        yield Stretch(server, start, end, scrape)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")
