"""The quantization probe and the baseline inside vLLM, against quantize-dequantize of Hugging Face's own tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, passages
from tests.engine.engine import EVERY_ROW, Engine
from tests.engine.quantized import BFLOAT16, EVERY_ROW_QUANTIZED, FLOAT32, check_quantization, site_tensors
from vllm_sluice.telemetry import baseline

LAYERS = [f"{layer:03d}" for layer in range(6)]
SITES = ("hidden", "attention_input", "mlp_input")


def observe(engine: Engine, prompts: list[list[int]], generate: int) -> list[list[int]]:
    """Run prompts one after the other, so that each pass is known; return the ids that went through the model."""
    return [[*prompt, *engine.generate([prompt], generate)[0][:-1]] for prompt in prompts]


@pytest.mark.parametrize(
    ("twin", "eager"),
    [("twin_vanilla", True), ("twin_gated", True), ("twin_gated", False)],
    ids=["vanilla-eager", "gated-eager", "gated-compiled"],
)
def test_statistics_equal_those_of_hugging_face(make_engine, request, prompts, twin, eager):
    folder: Path = request.getfixturevalue(twin)
    engine = make_engine(folder, EVERY_ROW_QUANTIZED, enforce_eager=eager)
    assert engine.rpc("state")["unavailable"] == {}
    engine.fresh_windows()
    seen = observe(engine, prompts[:3], 4)
    metrics = engine.metrics()
    check_quantization(metrics, site_tensors(folder, seen), [len(prompt) for prompt in prompts[:3]], FLOAT32)
    assert metrics["probe_errors_total", "quantization"] == 0
    assert metrics["serving_dtype_max",] == torch.finfo(torch.float32).max


def test_statistics_in_bfloat16(make_engine, twin_gated, prompts):
    engine = make_engine(twin_gated, EVERY_ROW_QUANTIZED, dtype="bfloat16")
    engine.fresh_windows()
    seen = observe(engine, prompts[:3], 1)
    tensors = site_tensors(twin_gated, seen, torch.bfloat16)
    check_quantization(engine.metrics(), tensors, [len(ids) for ids in seen], BFLOAT16, torch.bfloat16)


def test_padding_warm_up_and_dummy_runs_leave_no_trace(make_engine, twin_gated, prompts):
    engine = make_engine(twin_gated, EVERY_ROW_QUANTIZED)
    engine.fresh_windows()
    before = engine.metrics()["forward_seconds_total",]
    for size in (32, 64):
        engine.runner._dummy_run(size)
    engine.model.sluice_runtime._passes_since_take = 1  # take the accumulators although no real pass ran
    metrics = engine.metrics()
    assert not [key for key in metrics if key[0].startswith("quantization") and not key[0].endswith("_total")]
    assert {v for k, v in metrics.items() if k[0] == "quantization_elements_total"} == {0}
    assert metrics["forward_seconds_total",] == before
    engine.generate([prompts[0]], 1)
    check_quantization(engine.metrics(), site_tensors(twin_gated, [prompts[0]]), [len(prompts[0])], FLOAT32)
    assert engine.metrics()["forward_seconds_total",] > before


def test_a_switched_off_probe_and_a_site_left_out_look_at_nothing(make_engine, twin_vanilla, prompts):
    variables = {**EVERY_ROW_QUANTIZED, "SLUICE_PROBES__QUANTIZATION__SITES": "[mlp_input]"}
    engine = make_engine(twin_vanilla, variables)
    engine.rpc("apply", {"probes": {"quantization": {"enabled": False}}})
    engine.generate([prompts[0]], 1)
    assert {v for k, v in engine.metrics().items() if k[0] == "quantization_elements_total"} == {0}
    engine.rpc("apply", {"probes": {"quantization": {"enabled": True}}})
    engine.generate([prompts[0]], 1)
    wanted = {k: v for k, v in site_tensors(twin_vanilla, [prompts[0]]).items() if k[1] == "mlp_input"}
    check_quantization(engine.metrics(), wanted, [len(prompts[0])], FLOAT32)
    assert {k[2] for k in engine.metrics() if k[0].startswith("quantization")} == {"mlp_input"}


def test_by_default_the_probe_is_not_there(make_engine, twin_gated):
    engine = make_engine(twin_gated)
    metrics = engine.metrics()
    assert not [key for key in metrics if key[0].startswith(("quantization", "baseline"))]
    assert metrics["probe_errors_total", "quantization"] == 0
    assert metrics["telemetry_interval_seconds",] == 60
    assert metrics["telemetry_window_seconds",] == 3600


def test_a_probe_that_fails_does_not_stop_the_model(make_engine, twin_gated, prompts, monkeypatch):
    from vllm_sluice.probes import quantization

    rare = {"SLUICE_PROBES__QUANTIZATION__INTERVAL_SECONDS": "60"}
    engine = make_engine(twin_gated, {**EVERY_ROW_QUANTIZED, **rare})
    with monkeypatch.context() as patched:
        patched.setattr(quantization, "energies", lambda *_: 1 / 0)
        assert len(engine.generate([prompts[2]], 8)[0]) == 8  # 64 sampled rows, then passes of one row
    assert engine.metrics()["probe_errors_total", "quantization"] == 1


# ---------------------------------------------------------------------------------------------- the baseline
CONTEXT, TOKENS = 60, 590


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(passages()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recorded(twin_gated, text) -> Path:
    """Record the gated twin in a process of its own, as a user does."""
    path = text.parent / "baseline.json"
    command = [
        sys.executable, "-m", "vllm_sluice.cli", "baseline", "record", "--model", str(twin_gated),
        "--text", str(text), "--output", str(path), "--all-states", "--tokens", str(TOKENS),
        "--context", str(CONTEXT), "--json", "--",
        "--dtype", "float32", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", str(64 << 20),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "VLLM_CPU_KV"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout)
    assert [(state, about["tokens"]) for state, about in answer["sections"].items()] == [
        ("gate=1", TOKENS + 10), ("gate=0", TOKENS + 10),
    ]  # fmt: skip
    return path


def same_prompts(engine: Engine, text: Path) -> list[list[int]]:
    tokenizer = engine.llm.get_tokenizer()
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False)[:TOKENS]
    size = CONTEXT - 1
    return [[tokenizer.bos_token_id, *ids[start : start + size]] for start in range(0, len(ids), size)]


def variables_with(path: Path) -> dict[str, str]:
    """The settings of the recording: its rows and queries are sampled by default numbers."""
    kept = {k: v for k, v in EVERY_ROW_QUANTIZED.items() if "SAMPLE_ROWS" not in k and "QUERIES" not in k}
    return {**kept, "SLUICE_TELEMETRY__BASELINE": str(path)}


def test_the_same_text_has_a_ratio_of_one_to_its_baseline(make_engine, twin_gated, recorded, text):
    engine = make_engine(twin_gated, variables_with(recorded))
    found = baseline.read(recorded)
    for enabled, state in ((True, "gate=1"), (False, "gate=0"), (True, "gate=1")):
        engine.rpc("apply", {"patches": {"gate": {"enabled": enabled}}})
        engine.fresh_windows()
        engine.generate(same_prompts(engine, text), 1)
        metrics = engine.metrics()
        assert metrics["baseline_good",] == 1
        assert [k[1:] for k in metrics if k[0] == "baseline_info"] == [(found.sections[state].digest, state)]
        for layer in LAYERS:
            for name in ("activation_abs_max", "activation_max_to_median_ratio", "attention_sink_mass"):
                now, then = metrics[name, layer], metrics[f"baseline_{name}", layer]
                assert now / then == pytest.approx(1, rel=1e-4), (state, layer, name)
            for site in SITES:
                headroom = metrics["quantization_headroom_ratio", layer, site, "int8", "static"]
                assert headroom == pytest.approx(1, rel=1e-6), (state, layer, site)
                clipped = metrics["quantization_clipped_total", layer, site]
                assert clipped / metrics["quantization_elements_total", layer, site] < 1e-4

    recorded_with = found.sections["gate=1"].parameters
    assert recorded_with == {"gate.floor": 0.0, "gate.temperature": 1.0}
    assert found.sections["gate=0"].parameters == {}
    for temperature, sections in ((1.5, 0), (1.0, 1)):
        engine.rpc("apply", {"patches": {"gate": {"temperature": temperature}}})
        engine.fresh_windows()
        engine.generate(same_prompts(engine, text)[:1], 1)
        metrics = engine.metrics()
        assert metrics["baseline_good",] == 1
        assert len([k for k in metrics if k[0] == "baseline_info"]) == sections
        assert (("quantization_headroom_ratio", LAYERS[0], SITES[0], "int8", "static") in metrics) == bool(sections)


def test_values_beyond_the_baseline_are_counted_and_cost_signal(make_engine, twin_gated, recorded, text, prompts):
    """Half of every recorded value, for the enabled gate only."""
    tree = json.loads(recorded.read_text())
    limits: dict[tuple[str, str], float] = {}
    for label, layer in tree["sections"]["gate=1"]["layers"].items():
        for site in layer["sites"]:
            layer["sites"][site] /= 2
            limits[label, site] = layer["sites"][site]
    del tree["sections"]["gate=0"]
    half = recorded.with_name("half.json")
    half.write_text(json.dumps(tree))
    engine = make_engine(twin_gated, {**EVERY_ROW_QUANTIZED, "SLUICE_TELEMETRY__BASELINE": str(half)})
    engine.fresh_windows()
    seen = observe(engine, same_prompts(engine, text), 1)
    metrics = engine.metrics()
    sizes = [len(ids) for ids in seen]
    check_quantization(metrics, site_tensors(twin_gated, seen), sizes, FLOAT32, limits=limits)
    for layer in LAYERS:
        for site in SITES:
            assert metrics["quantization_headroom_ratio", layer, site, "int8", "static"] == pytest.approx(0.5, rel=1e-5)
            assert metrics["quantization_clipped_total", layer, site] > 0
            full = metrics["quantization_snr_decibels", layer, site, "fp8_e4m3", "per_tensor"]
            assert metrics["quantization_snr_decibels", layer, site, "fp8_e4m3", "static"] < full

    engine.rpc("apply", {"patches": {"gate": {"enabled": False}}})  # no section for this state: nothing static
    engine.fresh_windows()
    engine.generate([prompts[0]], 1)
    metrics = engine.metrics()
    off = site_tensors(twin_gated, [prompts[0]], gate_enabled=False)
    check_quantization(metrics, off, [len(prompts[0])], FLOAT32)
    assert metrics["baseline_good",] == 1
    assert not [k for k in metrics if k[0].startswith("baseline_") and k[0] != "baseline_good"]
    engine.rpc("apply", {"patches": {"gate": {"enabled": True}}})


def test_a_bad_baseline_costs_only_the_comparison(make_engine, twin_gated, prompts, recorded, tmp_path):
    tree: Any = json.loads(recorded.read_text())
    tree["model"] = "another"
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(tree))
    engine = make_engine(twin_gated, {**EVERY_ROW, "SLUICE_TELEMETRY__BASELINE": str(path)})
    assert len(engine.generate([prompts[0]], 2)[0]) == 2
    metrics = engine.metrics()
    assert metrics["baseline_good",] == 0
    assert ("activation_abs_max", "000") in metrics
    assert not [k for k in metrics if k[0].startswith("baseline_") and k[0] != "baseline_good"]
