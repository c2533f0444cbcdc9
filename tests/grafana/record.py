"""Writes what a Prometheus scrapes from a real server within an hour as compressed OpenMetrics text, for tests.

    python -m tests.grafana.record

`sluice stack` serves `models/twin-gated` at full detail, with the quantization probe, a baseline and the guard, under
the demo's traffic; `_HOUR` says what happens meanwhile. The metrics that the boards use are kept.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.grafana.lint import PROMETHEUS, VLLM
from tests.monitoring.history import family, kind
from tests.monitoring.prometheus import Prometheus
from tests.serving.server import Child, free_port
from vllm_sluice.demo.traffic import Traffic
from vllm_sluice.telemetry.catalogue import BY_NAME as METRICS

FILE = Path(__file__).resolve().parent / "recorded.om.xz"
MODEL = ROOT / "models" / "twin-gated"
TEXT = ROOT / "plugin" / "vllm_sluice" / "demo" / "passages.txt"
_KEPT = sorted({*METRICS, *VLLM, *PROMETHEUS, "up"})
_TOKEN = "token of the recording"
_CONTEXT = 512
_MINUTES = 61
_SETTINGS: dict[str, Any] = {
    "telemetry": {"detail": "full"},
    "probes": {"quantization": {"install": True}},
    # Without its gates the twin is surer by more than a nat; the trial is to come to its end all the same.
    "control": {"guard": {"enabled": True, "share": 0.3, "window_seconds": 180, "least_tokens": 500, "most_change": 5}},
}


@dataclass(frozen=True)
class _Put:
    """A change of the gate over HTTP."""

    query: str
    values: dict[str, Any]


_HOUR: dict[int, _Put | str] = {
    8: _Put("?guard=false", {"enabled": False}),
    16: _Put("?guard=false", {"enabled": True}),
    22: _Put("", {"temperature": 4.0}),
    28: _Put("", {"temperature": None}),
    33: _Put("", {"enabled": False}),  # tried for three minutes, then switched
    43: _Put("?guard=false", {"enabled": True}),
    45: "patches: [",
    48: json.dumps({**_SETTINGS, "telemetry": {"detail": "full", "window_seconds": 30}}),  # takes a restart
}
"""What happens at which minute: a change, or new text of the configuration file."""


def main() -> None:
    """Serve for an hour and write what was scraped."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-recording-"))
    settings, baseline, port = folder / "sluice.yaml", folder / "baseline.json", free_port()
    settings.write_text(json.dumps(_SETTINGS), encoding="utf-8")
    sluice = [sys.executable, "-m", "vllm_sluice.cli"]
    environment = {**os.environ, "SLUICE_ADMIN_TOKEN": _TOKEN, "SLUICE_TELEMETRY__BASELINE": str(baseline)}
    recorded = subprocess.run(
        [*sluice, "baseline", "record", "--model", str(MODEL), "--text", str(TEXT), "--all-states",
         "--sluice-config", str(settings), "--output", str(baseline)], cwd=ROOT, check=False,
    )  # fmt: skip
    if recorded.returncode != 0:
        raise SystemExit("no baseline could be recorded")
    stack = Child(
        [*sluice, "stack", str(MODEL), "--port", str(port), "--", "--max-model-len", str(_CONTEXT)],
        folder / "stack.log", {**environment, "SLUICE_CONFIG": str(settings)},
    )  # fmt: skip
    with ExitStack() as cleanup:
        cleanup.callback(stack.stop, 90)
        prometheus = _monitor(stack)
        traffic = Traffic(f"http://127.0.0.1:{port}/v1", MODEL.name, _CONTEXT, clients=2)
        traffic.start()
        cleanup.callback(traffic.stop)
        start = time.time()
        for minute in range(_MINUTES):
            time.sleep(max(0.0, start + 60 * minute - time.time()))
            event = _HOUR.get(minute)
            print(f"minute {minute}: {event or ''} {traffic.totals}", flush=True)
            if isinstance(event, _Put):
                _change(port, event)
            elif event:
                settings.write_text(event, encoding="utf-8")
        write(prometheus, int(start), int(time.time()))


def write(server: Prometheus, start: int, end: int) -> None:
    """Ask for every raw sample between two Unix times and write them."""
    lines: list[str] = []
    families: set[str] = set()
    for name in sorted(_KEPT, key=family):
        span = f"{name}[{end - start}s]"
        for series in server.get("/api/v1/query", query=span, time=str(end))["result"]:
            if family(name) not in families:
                families.add(family(name))
                lines.append(f"# TYPE {family(name)} {kind(name)}")
            lines += _samples(name, series)
    text = "\n".join([*lines, "# EOF", ""])
    FILE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(lines)} lines, {FILE.stat().st_size} bytes")


def span(text: Path) -> tuple[int, int, int]:
    """Return the first and the last whole second of a recording, and the seconds between two scrapes."""
    times: list[float] = []
    with text.open(encoding="utf-8") as lines:
        times = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("up{")]
    return int(times[0]), int(times[-1]), round((times[-1] - times[0]) / (len(times) - 1))


def _monitor(stack: Child) -> Prometheus:
    """Wait until the stack serves and return its Prometheus."""
    while not (found := re.search(r"^  Prometheus +(http://127\.0\.0\.1:\d+)", stack.tail(20_000), re.MULTILINE)):
        if stack.process.poll() is not None:
            raise SystemExit(stack.tail())
        time.sleep(1)
    return Prometheus(found[1])


def _change(port: int, event: _Put) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/plugins/sluice/patches/gate{event.query}",
        json.dumps(event.values).encode(), {"Authorization": f"Bearer {_TOKEN}"}, method="PUT",
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as answer:
        print(answer.status, answer.read().decode(), flush=True)


def _samples(name: str, series: dict[str, Any]) -> list[str]:
    labels = {label: value for label, value in series["metric"].items() if label != "__name__"}
    if "instance" in labels:
        labels["instance"] = "127.0.0.1:8000"  # the port of the recording says nothing
    within = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return [f"{name}{{{within}}} {value} {time!r}" for time, value in series["values"]]


if __name__ == "__main__":
    main()
