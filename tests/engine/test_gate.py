"""The gate patch inside vLLM, against the Hugging Face model with the gate written from its formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.engine import EVERY_ROW
from vllm_sluice.lab.reference import reference_model

# Largest |difference of logits| over 8 prompts of 40..150 tokens. float32: sums in another order (measured 1.2e-5);
# bfloat16: both round every intermediate to 8 bits, in different places (measured 0.16 at logits of +-15).
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}

OFF = {"SLUICE_ENABLED": "false"}
NO_PROBES = {f"SLUICE_PROBES__{kind}__INSTALL": "false" for kind in ("RESIDUAL", "ATTENTION", "GATE")}


@pytest.fixture(scope="module")
def stripped(twin_gated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gated twin without its gates: what stock vLLM can load."""
    folder = tmp_path_factory.mktemp("stripped") / "model"
    shutil.copytree(twin_gated, folder)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if ".output_gate." not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    del settings["sluice_gate"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _reference_logits(folder: Path, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return reference_model(folder, dtype=dtype)(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_logits_of_the_gated_twin_are_those_of_its_definition(make_engine, twin_gated, prompts, eager):
    engine = make_engine(twin_gated, enforce_eager=eager)
    for ids in prompts:
        difference = (engine.logits(ids) - _reference_logits(twin_gated, ids, torch.float32)).abs().max().item()
        assert difference < LOGIT_TOLERANCE[torch.float32]


def test_logits_in_bfloat16(make_engine, twin_gated, prompts):
    engine = make_engine(twin_gated, dtype="bfloat16")
    for ids in prompts:
        ours, theirs = engine.logits(ids), _reference_logits(twin_gated, ids, torch.bfloat16)
        exact = _reference_logits(twin_gated, ids, torch.float32)
        assert (ours - theirs).abs().max().item() < LOGIT_TOLERANCE[torch.bfloat16]
        # Not further from the exact logits than the reference's own rounding, give or take a half.
        assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def test_the_vanilla_twin_is_served_unchanged(make_engine, twin_vanilla, prompts):
    engine = make_engine(twin_vanilla)
    assert engine.rpc("state")["patches"] == {}
    for ids in prompts[:3]:
        difference = (engine.logits(ids) - _reference_logits(twin_vanilla, ids, torch.float32)).abs().max().item()
        assert difference < LOGIT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_disabled_gate_is_bit_identical_to_stock_vllm(make_engine, twin_gated, stripped, prompts, dtype):
    stock = make_engine(stripped, OFF, dtype=dtype)
    assert not hasattr(stock.model, "sluice_runtime")
    ours = make_engine(twin_gated, {**EVERY_ROW, "SLUICE_PATCHES__GATE__ENABLED": "false"}, dtype=dtype)
    assert ours.rpc("state")["patches"]["gate"]["values"]["enabled"] is False
    for ids in prompts[:4]:
        assert torch.equal(stock.logits(ids), ours.logits(ids))


def test_a_disabled_gate_is_bit_identical_when_compiled_and_switching_compiles_nothing(
    make_engine, twin_gated, stripped, prompts
):
    from torch._dynamo.utils import counters

    stock = make_engine(stripped, OFF, enforce_eager=False)
    plain = [stock.logits(ids) for ids in prompts[:4]]
    engine = make_engine(twin_gated, enforce_eager=False)
    on = [engine.logits(ids) for ids in prompts[:4]]
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    try:
        state = engine.rpc("apply", {"generation": 7, "patches": {"gate": {"enabled": False}}})
        assert state["generation"] == 7
        off = [engine.logits(ids) for ids in prompts[:4]]
    finally:
        engine.rpc("apply", {"generation": 8, "patches": {"gate": {"enabled": True}}})
    again = [engine.logits(ids) for ids in prompts[:4]]
    assert counters["stats"]["unique_graphs"] == compiled
    for a, b, c, d in zip(plain, off, on, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert (a - c).abs().max() > 0.5
    metrics = engine.metrics()
    assert metrics["patch_enabled", "gate"] == 1
    assert metrics["generation", "pp0-tp0", "applied"] == 8
    assert metrics["patch_last_change_timestamp_seconds", "gate"] > 1.7e9
    assert metrics["patch_parameter", "gate", "temperature"] == 1
    assert metrics["patch_parameter", "gate", "floor"] == 0


def test_a_plugin_without_patches_and_probes_installs_nothing(make_engine, twin_vanilla):
    engine = make_engine(twin_vanilla, {**NO_PROBES, "SLUICE_PATCHES__GATE__SOURCE": "none"})
    assert not hasattr(engine.model, "sluice_runtime")
    assert not [m for m in engine.model.modules() if type(m).__name__.startswith("Sluice")]


@pytest.mark.parametrize("granularity", ["head", "element"])
def test_a_sidecar_gates_any_checkpoint(make_engine, twin_vanilla, prompts, tmp_path, granularity):
    settings = json.loads((twin_vanilla / "config.json").read_text())
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    rows = heads if granularity == "head" else hidden
    generator = torch.Generator().manual_seed(11)
    gates = {}
    for layer in range(settings["num_hidden_layers"]):
        block = f"model.layers.{layer}.self_attn.output_gate"
        gates[f"{block}.weight"] = torch.randn(rows, hidden, generator=generator) * 0.2
        gates[f"{block}.bias"] = torch.randn(rows, generator=generator)
    sidecar = tmp_path / "gates.safetensors"
    save_file(gates, sidecar)
    checkpoint = tmp_path / "gated"
    shutil.copytree(twin_vanilla, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, **gates}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "config.json").write_text(json.dumps({**settings, "sluice_gate": {"granularity": granularity}}))

    engine = make_engine(twin_vanilla, {**EVERY_ROW, "SLUICE_PATCHES__GATE__SOURCE": str(sidecar)})
    assert f"{granularity}-wise" in engine.rpc("state")["patches"]["gate"]["detail"]
    for ids in prompts[:3]:
        difference = (engine.logits(ids) - _reference_logits(checkpoint, ids, torch.float32)).abs().max().item()
        assert difference < LOGIT_TOLERANCE[torch.float32]
