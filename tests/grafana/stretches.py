"""Stretches of time in a real Prometheus: one made up, with known faults, and one recorded from a real server."""

from __future__ import annotations

import contextlib
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.grafana import record
from tests.monitoring import history, prometheus
from tests.monitoring.prometheus import Prometheus


@dataclass(frozen=True)
class Stretch:
    """A history in a Prometheus: Unix times from when to when, and seconds between two scrapes."""

    prometheus: Prometheus
    start: int
    end: int
    scrape: int


@contextlib.contextmanager
def generated(folder: Path) -> Iterator[Stretch]:
    """Serve the made-up history."""
    text = folder / "history.txt"
    with text.open("w", encoding="utf-8") as out:
        history.write(out)
    with prometheus.serving(prometheus.fill(text, folder / "data")) as server:
        yield Stretch(server, history.START, history.END, history.STEP)


@contextlib.contextmanager
def recorded(folder: Path, without: tuple[str, ...] = ()) -> Iterator[Stretch]:
    """Serve the recorded hour, without the metrics whose names begin so."""
    text = folder / "history.txt"
    lines = lzma.decompress(record.FILE.read_bytes()).decode().splitlines(keepends=True)
    text.write_text("".join(line for line in lines if not line.startswith(without)), encoding="utf-8")
    start, end, scrape = record.span(text)
    with prometheus.serving(prometheus.fill(text, folder / "data")) as server:
        yield Stretch(server, start, end, scrape)
