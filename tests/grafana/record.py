"""Writes what a Prometheus scraped from a real server as compressed OpenMetrics text, for tests.

    python -m tests.grafana.record http://127.0.0.1:9090 START END

`recorded.om.xz` came from `sluice demo models/twin-gated` on two CPU cores with `telemetry.detail: full`, scraped every
5 s, with the gate switched off and on twice and its temperature changed once. The metrics that the boards use are kept.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path
from typing import Any

from tests.grafana.lint import PROMETHEUS, VLLM
from tests.monitoring.history import family, kind
from tests.monitoring.prometheus import Prometheus
from vllm_sluice.telemetry.catalogue import BY_NAME as METRICS

FILE = Path(__file__).resolve().parent / "recorded.om.xz"
_KEPT = sorted({*METRICS, *VLLM, *PROMETHEUS - {"ALERTS"}, "up"})


def main(url: str, start: str, end: str) -> None:
    """Ask for every raw sample between two Unix times and write them."""
    server = Prometheus(url)
    lines: list[str] = []
    families: set[str] = set()
    for name in sorted(_KEPT, key=family):
        span = f"{name}[{int(end) - int(start)}s]"
        for series in server.get("/api/v1/query", query=span, time=end)["result"]:
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


def _samples(name: str, series: dict[str, Any]) -> list[str]:
    labels = {label: value for label, value in series["metric"].items() if label != "__name__"}
    # The port of the recording says nothing.
    labels["instance"] = "127.0.0.1:8000"
    within = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return [f"{name}{{{within}}} {value} {time!r}" for time, value in series["values"]]


if __name__ == "__main__":
    main(*sys.argv[1:])
