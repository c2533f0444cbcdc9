"""What a fleet costs Prometheus: a synthetic fleet, scraped and evaluated by a real Prometheus on this machine.

Every engine is a target of its own with the series that Sluice exports at `telemetry.detail: standard`, their values
moving at every scrape. The engines are simulated; Prometheus, its rules and its measurements are real.

The rules that compare with hours ago would find nothing in a run of minutes, so their offsets are shortened (see
`SHORTENED`): they match as many series as in steady state, though from the head and not from blocks on the disk.

    python bench/bench_fleet.py [--engines 200] [--layers 80] [--minutes 10] [--interval 15] [--baseline]
                                [--without-rules]
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_sluice.telemetry.catalogue import CATALOGUE, Metric, is_exported, layer_label

RULES = sorted((Path(__file__).resolve().parent.parent / "deploy/prometheus/rules").glob("*.yml"))
VALUES = {
    "position": ("start", "delimiter", "other"), "phase": ("prefill", "decode"), "patch": ("gate",),
    "probe": ("residual", "attention", "gate"), "result": ("applied", "failed"), "kind": ("desired", "applied"),
    "version": ("0.1.0",), "vllm_version": ("0.32.0",), "fingerprint": ("0123456789abcdef",), "group": ("rest",),
    "baseline": ("0123456789abcdef",), "patches": ("gate",),
    "parameter": ("temperature", "floor"),
}  # fmt: skip
ABSENT_BY_DEFAULT = ("sluice_guard_", "sluice_quantization_")
"""What exists only in a guard's trial, or with the quantization probe."""
SHORTENED = {"offset 6h": "offset 6m", "offset 15m": "offset 2m"}
"""What is written for an offset of the rules."""


def label_sets(metric: Metric, layers: int, ranks: int) -> Iterator[dict[str, str]]:
    """Return the label sets that one engine exports of a metric."""
    sets: list[dict[str, str]] = [{}]
    for label in metric.labels:
        if label == "layer":
            values: tuple[str, ...] = tuple(layer_label(layer) for layer in range(layers))
        elif label == "rank":
            values = ("1", "2", "3") if "layer" in metric.labels else tuple(f"pp0-tp{n}" for n in range(ranks))
        else:
            values = VALUES[label]
        sets = [{**one, label: value} for one in sets for value in values]
    yield from (one for one in sets if is_exported(metric, one, "standard"))


class Fleet(http.server.ThreadingHTTPServer):
    """Answers `/N` with the metrics of engine N."""

    daemon_threads = True

    def __init__(self, layers: int, ranks: int, baseline: bool) -> None:
        absent = ABSENT_BY_DEFAULT if baseline else (*ABSENT_BY_DEFAULT, "sluice_baseline_")
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lines: list[tuple[str, bool]] = []
        self.series = 0
        for metric in CATALOGUE:
            if metric.name.startswith(absent):
                continue
            self.lines.append((f"# TYPE {metric.name} {metric.kind}\n", False))
            for labels in label_sets(metric, layers, ranks):
                text = ",".join(f'{name}="{value}"' for name, value in labels.items())
                self.lines.append((f"{metric.name}{{MODEL{',' + text if text else ''}}} ", metric.kind == "counter"))
                self.series += 1

    def body(self, engine: int) -> bytes:
        """Render one engine's scrape."""
        own = f'model_name="model-{engine % 10}",engine="0"'
        draw = random.Random(engine)
        now, noise = time.time(), random.random
        parts = []
        for line, is_counter in self.lines:
            if line.startswith("#"):
                parts.append(line)
            elif is_counter:
                parts.append(f"{line.replace('MODEL', own, 1)}{int(now * draw.random())}\n")
            else:
                parts.append(f"{line.replace('MODEL', own, 1)}{100 * draw.random() + noise()!r}\n")
        return "".join(parts).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Fleet)
        body = self.server.body(int(self.path.strip("/").partition("?")[0]))
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Prometheus:
    """A real Prometheus that scrapes the fleet and itself."""

    def __init__(self, folder: Path, fleet: Fleet, engines: int, interval: int, rules: list[Path]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        host = f"127.0.0.1:{fleet.server_address[1]}"
        targets = [
            {"targets": [host], "labels": {"__metrics_path__": f"/{n}", "instance": f"engine-{n:04d}"}}
            for n in range(engines)
        ]
        config = {
            "global": {"scrape_interval": f"{interval}s", "scrape_timeout": f"{interval}s",
                       "evaluation_interval": "30s"},
            "rule_files": [str(_with_short_offsets(path, folder)) for path in rules],
            "scrape_configs": [
                {"job_name": "vllm", "static_configs": targets},
                {"job_name": "self", "static_configs": [{"targets": [f"127.0.0.1:{self.port}"]}]},
            ],
        }  # fmt: skip
        (folder / "prometheus.yml").write_text(json.dumps(config))
        self.data = folder / "data"
        self.process = subprocess.Popen(
            [shutil.which("prometheus") or "prometheus", f"--config.file={folder / 'prometheus.yml'}",
             f"--storage.tsdb.path={self.data}", f"--web.listen-address=127.0.0.1:{self.port}"],
            stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"),
        )  # fmt: skip

    def get(self, path: str, **query: str) -> Any:
        """Call the HTTP API."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.loads(answer.read())["data"]

    def number(self, expression: str) -> float:
        """Return the value of a query that has one sample; NaN without."""
        result = self.get("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else float("nan")

    def seconds(self, expression: str) -> float:
        """Return how long a query takes, median of five."""
        times = []
        for _ in range(5):
            began = time.perf_counter()
            self.get("query", query=expression)
            times.append(time.perf_counter() - began)
        return sorted(times)[2]


UP = 'sum(up{job="vllm"})'
QUERIES = {
    "worst 20 engines by ratio, raw series":
        "topk(20, max by (job, instance, model_name, engine) (sluice_activation_max_to_median_ratio))",
    "worst 20 engines by ratio, recorded": "topk(20, model_engine:sluice_activation_max_to_median_ratio:max)",
    "one engine, one metric, all layers": 'sluice_activation_abs_max{instance="engine-0007"}',
}  # fmt: skip


def report(prometheus: Prometheus, fleet: Fleet) -> None:
    """Print what was measured, as Markdown."""
    rows = [
        ("series of one engine", f"{fleet.series}"),
        ("series in Prometheus's head", f"{prometheus.number('prometheus_tsdb_head_series'):.0f}"),
        ("samples a second", f"{prometheus.number('rate(prometheus_tsdb_head_samples_appended_total[2m])'):.0f}"),
        ("engines up", f"{prometheus.number(UP):.0f}"),
        ("scrape of one engine, median", f"{prometheus.number('quantile(0.5, scrape_duration_seconds)'):.3f} s"),
        ("size of one scrape", f"{len(fleet.body(0)) / 1e3:.0f} kB"),
        ("memory of Prometheus, resident", f"{prometheus.number('process_resident_memory_bytes') / 1e6:.0f} MB"),
        ("CPU of Prometheus", f"{prometheus.number('rate(process_cpu_seconds_total[2m])'):.2f} cores"),
        ("bytes on disk, write-ahead log", f"{_size(prometheus.data) / 1e6:.0f} MB"),
    ]
    for group in prometheus.get("rules")["groups"]:
        bad = [rule["name"] for rule in group["rules"] if rule["health"] == "err"]
        rows.append(
            (f"evaluation of {group['name']}, {len(group['rules'])} rules, every {group['interval']:.0f} s",
             f"{group['evaluationTime']:.2f} s{' ERRORS: ' + ', '.join(bad) if bad else ''}")
        )  # fmt: skip
    rows += [(f"query: {name}", f"{1e3 * prometheus.seconds(query):.0f} ms") for name, query in QUERIES.items()]
    print("| measured | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def _with_short_offsets(rules: Path, folder: Path) -> Path:
    """Write a copy of a rule file whose offsets are `SHORTENED` and return its path."""
    text = rules.read_text()
    for offset, short in SHORTENED.items():
        text = text.replace(offset, short)
    copy = folder / rules.name
    copy.write_text(text)
    return copy


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Run the fleet and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=200)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--interval", type=int, default=15)
    parser.add_argument("--baseline", action="store_true", help="every layer has a baseline too")
    parser.add_argument("--without-rules", action="store_true")
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        sys.exit("prometheus is not on the PATH; on Debian: apt-get install prometheus")
    fleet = Fleet(options.layers, options.ranks, options.baseline)
    threading.Thread(target=fleet.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as scratch:
        rules = [] if options.without_rules else RULES
        prometheus = Prometheus(Path(scratch), fleet, options.engines, options.interval, rules)
        try:
            time.sleep(60 * options.minutes)
            baseline = "with" if options.baseline else "without"
            print(f"{options.engines} engines of {options.layers} layers and {options.ranks} ranks, {baseline} a "
                  f"baseline, a scrape every {options.interval} s, after {options.minutes:g} minutes, "
                  f"{os.cpu_count()} cores\n")  # fmt: skip
            report(prometheus, fleet)
        finally:
            prometheus.process.send_signal(signal.SIGTERM)
            prometheus.process.wait(30)


if __name__ == "__main__":
    main()
