"""A real Prometheus over a history in OpenMetrics text."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import need_program

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_START_SECONDS = 60


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def get(self, path: str, **query: str) -> Any:
        """Return `data` of an answer of the API."""
        with _OPENER.open(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return json.load(answer)["data"]

    def value(self, expr: str, at: float) -> list[dict[str, Any]]:
        """Evaluate an expression at a time."""
        result: list[dict[str, Any]] = self.get("/api/v1/query", query=expr, time=repr(at))["result"]
        return result


def fill(openmetrics: Path, folder: Path) -> Path:
    """Make a data folder for Prometheus from a history."""
    promtool = need_program("promtool", "prometheus")
    made = subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", str(openmetrics), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return folder


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus over a data folder; it scrapes nothing."""
    program = need_program("prometheus", "prometheus")
    settings = folder.parent / f"{folder.name}.yml"
    settings.write_text("{}\n", encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder.parent / f"{folder.name}.log").open("wb")
    process = subprocess.Popen(
        [program, f"--config.file={settings}", f"--storage.tsdb.path={folder}", "--storage.tsdb.retention.time=100y",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"],
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + _START_SECONDS
        while not _ready(url):
            assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text(encoding="utf-8")
            time.sleep(0.1)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


def _ready(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(_OPENER.open(f"{url}/-/ready", timeout=2).status == 200)
    return False
