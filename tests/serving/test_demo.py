"""The README's first command, for real: server, traffic, Prometheus, live page, and a clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import need_program
from tests.serving.server import Child, free_port, get

pytestmark = pytest.mark.serving


def test_the_demo_shows_live_metrics_of_real_traffic_and_ends_cleanly(twin_gated: Path, tmp_path: Path) -> None:
    need_program("prometheus", "prometheus")
    port = free_port()
    command = [sys.executable, "-m", "vllm_sluice.cli", "demo", str(twin_gated), "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "VLLM_ENABLE_V1"))}
    demo = Child(command, tmp_path / "demo.log", environment)
    try:
        began = time.monotonic()
        while "/plugins/sluice/" not in demo.tail():
            assert demo.process.poll() is None, demo.tail()
            assert time.monotonic() - began < 400, demo.tail()
            time.sleep(1)
        url = f"http://127.0.0.1:{port}"
        observed = 0.0
        while observed < 500:
            assert demo.process.poll() is None, demo.tail()
            assert time.monotonic() - began < 500, demo.tail()
            time.sleep(1)
            found = re.findall(r'^sluice_tokens_observed_total\{.*\} (\S+)$', get(f"{url}/metrics"), re.MULTILINE)
            observed = sum(map(float, found))
        live = json.loads(get(f"{url}/plugins/sluice/live.json"))
        assert "twin-gated" in json.dumps(live)
        assert 'id="maps"' in get(f"{url}/plugins/sluice/")
        prometheus = re.search(r"http://127\.0\.0\.1:(\d+)/graph", demo.tail(20_000))
        assert prometheus, demo.tail()
        answer = {"data": {"result": []}}
        while not answer["data"]["result"]:
            assert time.monotonic() - began < 540, demo.tail()
            time.sleep(1)
            answer = json.loads(get(f"http://127.0.0.1:{prometheus[1]}/api/v1/query?query=sluice_attention_sink_mass"))
        assert len(answer["data"]["result"]) == 6
    finally:
        demo.process.send_signal(signal.SIGINT)
        code = demo.stop(90)
    assert code == 0, demo.tail()
    with pytest.raises(OSError, match="refused"):
        get(f"http://127.0.0.1:{port}/health", timeout=5)
