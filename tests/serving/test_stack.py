"""`sluice stack` for real: the shipped rules evaluated on a real server's metrics, and Alertmanager connected."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, need_program, passages
from tests.serving.server import Child, free_port, get

pytestmark = pytest.mark.serving

RULES = ROOT / "deploy" / "prometheus" / "rules"


def test_the_stack_evaluates_every_rule_on_real_metrics(twin_gated: Path, tmp_path: Path) -> None:
    need_program("prometheus", "prometheus")
    need_program("prometheus-alertmanager", "prometheus-alertmanager")
    port = free_port()
    command = [sys.executable, "-m", "vllm_sluice.cli", "stack", str(twin_gated), "--port", str(port),
               "--", "--enforce-eager"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "VLLM_ENABLE_V1"))}
    stack = Child(command, tmp_path / "stack.log", environment)

    def wait(condition: Callable[[], Any], what: str, seconds: float) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert stack.process.poll() is None, stack.tail()
            assert time.monotonic() < end, f"{what} did not happen\n{stack.tail()}"
            time.sleep(1)
        return found

    try:
        wait(lambda: "is being served and watched" in stack.tail(), "the start", 400)
        monitor, manager = (
            re.search(rf"^  {name} +(http://127\.0\.0\.1:\d+)", stack.tail(20_000), re.MULTILINE)[1]
            for name in ("Prometheus", "Alertmanager")
        )

        def query(expression: str) -> list[dict[str, Any]]:
            found = json.loads(get(f"{monitor}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
            return found["data"]["result"]

        def evaluated() -> list[dict[str, Any]]:
            """Return all rules once each was evaluated on scraped metrics, after a few requests more."""
            complete(f"http://127.0.0.1:{port}", twin_gated.name)
            groups = json.loads(get(f"{monitor}/api/v1/rules"))["data"]["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            looked_at = all(rule["health"] != "unknown" for rule in rules)
            return rules if looked_at and query("model_engine:sluice_activation_abs_max:max") else []

        rules = wait(evaluated, "a recorded series", 90)
        groups = [group for path in RULES.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]
        shipped = [rule for group in groups for rule in group["rules"]]
        assert sorted(rule["name"] for rule in rules) == sorted(r.get("record") or r["alert"] for r in shipped)
        assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}

        # Served as what Prometheus calls it, with the labels that boards and alerts rely on.
        assert [r["metric"] for r in query("model_engine:sluice_activation_abs_max:max")] == [{
            "__name__": "model_engine:sluice_activation_abs_max:max", "job": "vllm", "instance": f"127.0.0.1:{port}",
            "model_name": twin_gated.name, "engine": "0",
        }]  # fmt: skip
        joined = "vllm:num_requests_running * on (job, instance, model_name, engine) sluice_info"
        assert len(query(joined)) == 1, "Sluice's and vLLM's labels do not match"
        assert [r["value"][1] for r in query("up")] == ["1"]
        assert query('model_engine:sluice_nonfinite:increase5m')[0]["value"][1] == "0"
        assert query('ALERTS{severity="critical"}') == []

        active = json.loads(get(f"{monitor}/api/v1/alertmanagers"))["data"]["activeAlertmanagers"]
        assert [one["url"] for one in active] == [f"{manager}/api/v2/alerts"]
    finally:
        stack.process.send_signal(signal.SIGINT)
        code = stack.stop(90)
    assert code == 0, stack.tail()
    for url in (f"http://127.0.0.1:{port}/health", f"{monitor}/-/ready", f"{manager}/-/ready"):
        with pytest.raises(OSError, match="refused"):
            get(url, timeout=5)


def complete(url: str, model: str) -> None:
    body = {"model": model, "prompt": passages()[0][:200], "max_tokens": 8}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
