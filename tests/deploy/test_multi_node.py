"""One server on two machines: two exporters, a real Prometheus, and the rules that put the parts together."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.parse
import urllib.request

import yaml

from tests.conftest import need_program
from tests.deploy.test_files import NODE_ALERTS, NODE_RULES
from tests.live import synthetic
from tests.serving.server import eventually, free_port
from tests.unit.test_exporter import exporter

LAYER = "001"


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

        def of(metric: str) -> list[float]:
            return [values[synthetic.series(metric, layer=LAYER)] for values in parts]

        def parts_are_put_together() -> None:
            assert query("server_engine:sluice_attention_sink_heads:sum")[LAYER] == sum(of("attention_sink_heads"))
            assert query("server_engine:sluice_activation_abs_max:max")[LAYER] == max(of("activation_abs_max"))
            mean = sum(of("attention_sink_mass")) / 2
            assert abs(query("server_engine:sluice_attention_sink_mass:avg")[LAYER] - mean) < 1e-9
            for name in ("info", "snapshot_age_seconds", "telemetry_interval_seconds", "patch_enabled"):  # for alerts
                assert query(f"count(count by (instance) (sluice_{name}))") == {"": 2}, name

        eventually(parts_are_put_together, 60)  # both are scraped, and then the rules evaluated, at some time
