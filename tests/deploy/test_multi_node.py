"""One server on two machines: two exporters, a real Prometheus, and the rules that put the parts together."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import yaml

from tests.conftest import need_program
from tests.deploy.test_files import NODE_ALERTS, NODE_RULES
from tests.live import synthetic
from tests.serving.server import eventually
from tests.unit.test_exporter import exporter

LAYER = "001"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def prometheus(folder, targets):
    """Run Prometheus on these targets, asked once a second; yields a function that queries it."""
    port = free_port()
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(NODE_RULES), str(NODE_ALERTS)],
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": targets, "labels": {"server": "two-nodes"}}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [need_program("prometheus", "prometheus"), f"--config.file={folder}/prometheus.yml",
         f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"],
        stderr=(folder / "prometheus.log").open("w"),
    )  # fmt: skip

    def query(expression: str) -> dict[str, float]:
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                result = json.load(answer)["data"]["result"]
        except OSError:
            return {}
        return {r["metric"].get("layer", ""): float(r["value"][1]) for r in result}

    try:
        yield query
    finally:
        process.terminate()
        process.wait(timeout=20)


def waited(query, expression, seconds=40.0):
    deadline = time.monotonic() + seconds
    while not (found := query(expression)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def test_the_parts_of_two_machines_become_one_server(tmp_path):
    """Each machine has one of two tensor-parallel ranks: heads add up, hidden states are the same on both."""
    parts = [synthetic.Model(layers=2).values(3, rank=rank) for rank in range(2)]
    with contextlib.ExitStack() as stack:
        targets = []
        for rank, values in enumerate(parts):
            folder = tmp_path / f"node{rank}"
            folder.mkdir()
            synthetic.write(folder, synthetic.info(f"pp0-tp{rank}"), values)
            url = stack.enter_context(exporter("--run-dir", str(folder)))
            targets.append(url.removeprefix("http://"))
        query = stack.enter_context(prometheus(tmp_path, targets))
        ready = 'count(sluice_attention_sink_heads{layer="001"}) == 2 and on () (count(up == 1) == 2)'
        assert waited(query, ready), (tmp_path / "prometheus.log").read_text()[-2000:]
        def of(metric: str) -> list[float]:
            return [values[synthetic.series(metric, layer=LAYER)] for values in parts]

        def hold() -> None:
            assert query("server_engine:sluice_attention_sink_heads:sum")[LAYER] == sum(of("attention_sink_heads"))
            assert query("server_engine:sluice_activation_abs_max:max")[LAYER] == max(of("activation_abs_max"))
            mean = sum(of("attention_sink_mass")) / 2
            assert abs(query("server_engine:sluice_attention_sink_mass:avg")[LAYER] - mean) < 1e-9
            for name in ("info", "snapshot_age_seconds", "telemetry_interval_seconds", "patch_enabled"):  # for alerts
                assert query(f"count(count by (instance) (sluice_{name}))") == {"": 2}, name

        eventually(hold)  # a rule may have been evaluated between the two first scrapes
