"""Every gate that cannot be installed exactly stops the start, and says which layer, what was expected and found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.engine import Engine
from vllm_sluice.patches.base import PatchError

Gates = dict[str, torch.Tensor]
BLOCK = "model.layers.{}.self_attn.output_gate"


@pytest.fixture(scope="module")
def gates(twin_gated: Path) -> Gates:
    return {k: v for k, v in load_file(twin_gated / "model.safetensors").items() if ".output_gate." in k}


def _drop(layer: int) -> Callable[[Gates], None]:
    def change(gates: Gates) -> None:
        del gates[BLOCK.format(layer) + ".weight"], gates[BLOCK.format(layer) + ".bias"]

    return change


def _put(name: str, value: Callable[[torch.Tensor], torch.Tensor], like: str | None = None) -> Callable[[Gates], None]:
    def change(gates: Gates) -> None:
        gates[name] = value(gates[like or name]).contiguous()

    return change


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


def _other_granularity(layer: int) -> Callable[[Gates], None]:
    def change(gates: Gates) -> None:
        name = BLOCK.format(layer)
        rows = 192 if len(gates[f"{name}.weight"]) == 3 else 3
        gates[f"{name}.weight"] = torch.zeros(rows, 192)
        gates[f"{name}.bias"] = torch.zeros(rows)

    return change


CASES = {
    "missing layer": (_drop(3), ["layer 3 (model.layers.3.self_attn)", "has no gate for it"]),
    "unknown layer": (
        _put(BLOCK.format(17) + ".weight", torch.clone, BLOCK.format(0) + ".weight"),
        ["model.layers.17.self_attn.output_gate", "no such attention block", "model.layers.5.self_attn"],
    ),
    "second gate": (
        _put("layers.2.self_attn.output_gate.weight", torch.clone, BLOCK.format(2) + ".weight"),
        ["a second gate for model.layers.2.self_attn"],
    ),
    "wrong width": (
        _put(BLOCK.format(1) + ".weight", lambda t: t[:, :-8]),
        ["layer 1", ", 184]", "[3, 192] (head) or [192, 192] (element)"],
    ),
    "wrong rows": (
        _put(BLOCK.format(2) + ".weight", lambda t: torch.cat([t, t])),
        ["layer 2", "output_gate.weight has shape [", "[3, 192] (head) or [192, 192] (element)"],
    ),
    "wrong bias": (
        _put(BLOCK.format(2) + ".bias", lambda t: t[:1]),
        ["layer 2", "output_gate.bias has shape [1], expected ["],
    ),
    "NaN": (_put(BLOCK.format(4) + ".weight", _nan), ["layer 4", "has 1 NaN or infinite values"]),
    "bias only": (
        lambda gates: gates.pop(BLOCK.format(5) + ".weight"),
        ["layer 5", "output_gate.weight is missing"],
    ),
    "not a gate": (
        _put("model.layers.0.mlp.up_proj.weight", torch.clone, BLOCK.format(0) + ".weight"),
        ["holds the tensor 'model.layers.0.mlp.up_proj.weight'", "sluice gates inspect"],
    ),
    "mixed": (_other_granularity(0), ["head-wise and layer", "element-wise gates"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_sidecar_stops_the_start(case, gates, twin_vanilla, tmp_path):
    change, expected = CASES[case]
    bad = {name: tensor.clone() for name, tensor in gates.items()}
    change(bad)
    sidecar = tmp_path / "bad.safetensors"
    save_file(bad, sidecar)
    with pytest.raises(PatchError) as error:
        Engine(twin_vanilla, tmp_path, {"SLUICE_PATCHES__GATE__SOURCE": str(sidecar)})
    for text in [*expected, "Nothing was changed"]:
        assert text in str(error.value)


def test_all_problems_are_named_at_once(gates, twin_vanilla, tmp_path):
    bad = dict(gates)
    _drop(3)(bad)
    _put(BLOCK.format(4) + ".weight", _nan)(bad)
    _put(BLOCK.format(1) + ".weight", lambda t: t[:, :-8])(bad)
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(PatchError) as error:
        Engine(twin_vanilla, tmp_path, {"SLUICE_PATCHES__GATE__SOURCE": str(tmp_path / "bad.safetensors")})
    assert all(f"layer {layer} " in str(error.value) for layer in (1, 3, 4))


def test_a_file_that_is_no_safetensors_file(twin_vanilla, tmp_path):
    (tmp_path / "gates.safetensors").write_bytes(b"not at all a safetensors file")
    with pytest.raises(PatchError, match="is not a safetensors file"):
        Engine(twin_vanilla, tmp_path, {"SLUICE_PATCHES__GATE__SOURCE": str(tmp_path / "gates.safetensors")})
    with pytest.raises(PatchError, match="there is no such file"):
        Engine(twin_vanilla, tmp_path, {"SLUICE_PATCHES__GATE__SOURCE": str(tmp_path / "none.safetensors")})


def test_gates_asked_from_a_checkpoint_without_them(twin_vanilla, tmp_path):
    with pytest.raises(PatchError, match="the checkpoint has no gate for it"):
        Engine(twin_vanilla, tmp_path, {"SLUICE_PATCHES__GATE__SOURCE": "checkpoint"})


def test_the_wrong_granularity_is_refused(gates, twin_gated, tmp_path):
    head_wise = len(gates[BLOCK.format(0) + ".weight"]) == 3
    wrong, wanted = ("element", "[192, 192] (element)") if head_wise else ("head", "[3, 192] (head)")
    with pytest.raises(PatchError, match=re.escape(f"expected {wanted}")):
        Engine(twin_gated, tmp_path, {"SLUICE_PATCHES__GATE__GRANULARITY": wrong})


@pytest.mark.parametrize(
    "variables", [{"SLUICE_ENABLED": "false"}, {"SLUICE_PATCHES__GATE__SOURCE": "none"}], ids=["no plugin", "no patch"]
)
def test_the_gated_twin_is_not_served_without_its_gates(twin_gated, tmp_path, variables):
    with pytest.raises(ValueError, match=r"no module or parameter named.*output_gate"):
        Engine(twin_gated, tmp_path, variables)


def test_a_vllm_that_was_not_tested_is_refused(make_engine, twin_gated, tmp_path, monkeypatch):
    from vllm_sluice import compat

    monkeypatch.setattr(compat, "TESTED_VLLM", "0.1")
    with pytest.raises(PatchError, match=r"(?s)vLLM 0\.32.* is installed.*allow_untested_vllm"):
        Engine(twin_gated, tmp_path, {})
    engine = make_engine(twin_gated, {"SLUICE_ALLOW_UNTESTED_VLLM": "true"})
    assert engine.rpc("state")["patches"]["gate"]["values"]["enabled"]
