"""One real server in its default, compiled mode: /metrics, Prometheus, the live page, the OpenAI API."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.alerts.test_rules import IN_RUNBOOKS, VLLM
from tests.browser import Browser
from tests.conftest import need_program, passages
from tests.engine.expected import expected
from tests.engine.test_statistics import FLOAT32, check
from tests.serving.server import Prometheus, Server, eventually, get
from vllm_sluice.telemetry.catalogue import CATALOGUE

pytestmark = pytest.mark.serving

SETTINGS = {
    "probes": {
        "residual": {"sample_rows": 64, "interval_seconds": 0},
        "attention": {"queries": 64, "interval_seconds": 0},
    },
    "telemetry": {"interval_seconds": 0.5, "window_seconds": 3600, "detail": "full"},
    "live": {"period_seconds": 0.5},
}


@pytest.fixture(scope="module")
def server(twin_gated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        twin_gated, tmp_path_factory.mktemp("server"), SETTINGS,
        ["--dtype", "float32", "--max-num-batched-tokens", "64", "--no-enable-prefix-caching"],
    )  # fmt: skip
    server.wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def sent(server: Server) -> list[list[int]]:
    """Send eight passages at once; return the token ids that went through the model."""
    texts = [text[:420] for text in passages()[40:48]]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: server.complete(text, 9), texts))
    choices = [answer["choices"][0] for answer in answers]
    return [[*choice["prompt_token_ids"], *choice["token_ids"][:-1]] for choice in choices]


def test_statistics_of_concurrent_requests_equal_those_of_hugging_face(server, sent, twin_gated):
    prompts = sum(len(ids) for ids in sent) - 8 * 8
    metrics = server.settled(("tokens_observed_total", "decode"), 64)
    assert metrics["tokens_observed_total", "prefill"] == prompts
    assert metrics["tokens_observed_total", "decode"] == 64
    check(metrics, expected(twin_gated, sent), {"default": FLOAT32})


def test_every_metric_of_the_catalogue_is_on_metrics(server, sent):
    absent = {"patch_last_change_timestamp_seconds"}  # until the first switch
    # until a trial, see test_per_request
    absent |= {"guard_running", "guard_tokens", "guard_logprob", "guard_nonfinite"}
    absent |= {  # without a baseline file and the quantization probe
        metric.name.removeprefix("sluice_")
        for metric in CATALOGUE
        if metric.name.startswith(("sluice_baseline_", "sluice_quantization_"))
    }
    expected_names = {metric.name.removeprefix("sluice_") for metric in CATALOGUE} - absent

    def all_there() -> None:
        assert {key[0] for key in server.metrics()} == expected_names

    eventually(all_there)  # massive activations are counted when a second snapshot still has them
    page = get(f"{server.url}/metrics")
    assert [name for name in {*VLLM, *IN_RUNBOOKS} if f"\n{name}{{" not in page] == []


def test_promtool_finds_nothing_to_complain_about(server, sent):
    promtool = need_program("promtool", "prometheus")
    ours = "".join(
        line + "\n" for line in get(f"{server.url}/metrics").splitlines() if "sluice_" in line.split("{")[0]
    )
    done = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_real_prometheus_scrapes_it(server, sent, tmp_path):
    prometheus = Prometheus(need_program("prometheus", "prometheus"), f"127.0.0.1:{server.port}", tmp_path)
    try:
        prometheus.wait_for("sluice_info")
        metrics = server.metrics()
        results = prometheus.wait_for("sluice_attention_sink_mass")
        assert len(results) == 6
        for result in results:
            labels = result["metric"]
            assert labels["model_name"] == str(server.model)
            assert labels["engine"] == "0"
            value = metrics["attention_sink_mass", labels["layer"]]
            assert float(result["value"][1]) == pytest.approx(value, rel=1e-6)
        joined = prometheus.wait_for(
            "sluice_snapshot_age_seconds and on (job, instance, model_name, engine) vllm:num_requests_running"
        )
        assert len(joined) == 1
    finally:
        prometheus.stop()


def test_the_live_page_shows_the_numbers(server, sent, tmp_path):
    need_program("chromium", "chromium")
    metrics = server.metrics()
    shot = tmp_path / "live.png"
    with Browser() as browser:
        page = browser.open(f"{server.url}/plugins/sluice/", width=1440, height=1600)
        page.wait_for("document.querySelectorAll('#body tr').length >= 6", seconds=30)
        text = page.evaluate("document.body.innerText")
        box = page.evaluate(
            "(() => { const r = document.querySelector('canvas').getBoundingClientRect();"
            " return [r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY]; })()"
        )
        page.screenshot(shot)
        assert page.errors == []
    assert "twin-gated" in text
    assert f"{metrics['activation_abs_max', '005']:.4g}" in text
    assert f"{metrics['tokens_observed_total', 'prefill']:.0f}" in text.replace(",", "").replace("\u202f", "")
    with Image.open(shot) as picture:
        heatmap = picture.convert("RGB").crop(tuple(map(round, box)))
        assert len(heatmap.getcolors(maxcolors=10**6)) > 2  # drawn: layers differ, and the first points are missing


def test_the_state_route_tells_what_is_installed(server, sent):
    state = json.loads(get(f"{server.url}/plugins/sluice/state"))
    text = json.dumps(state)
    assert '"gate"' in text
    assert "pp0-tp0" in text


def test_the_api_answers_as_the_model_defines(server, twin_gated):
    import torch

    from vllm_sluice.lab.reference import reference_model

    answer = server.complete(passages()[50][:300], 8)
    choice = answer["choices"][0]
    ids = list(choice["prompt_token_ids"])
    model = reference_model(twin_gated)
    for token in choice["token_ids"]:
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
