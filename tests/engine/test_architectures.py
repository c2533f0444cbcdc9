"""Gate and probes on other architectures than Llama: random small models against Hugging Face with hooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT
from tests.engine.engine import EVERY_ROW
from vllm_sluice.ops.gate import gate_reference
from vllm_sluice.ops.residual import OTHER, residual_reference

HEADS, HIDDEN, LAYERS = 4, 128, 3
SHARED = {"vocab_size": 4096, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
LLAMA_LIKE = {**SHARED, "intermediate_size": 192, "max_position_embeddings": 512, "num_key_value_heads": 2}


def configurations() -> dict[str, Any]:
    """Return a small configuration of each architecture; what sets it apart from Llama stands beside it."""
    import transformers as t

    return {
        "qwen3": t.Qwen3Config(**LLAMA_LIKE, head_dim=64),  # norms of q and k, heads wider than hidden / heads
        "qwen2": t.Qwen2Config(**LLAMA_LIKE),  # biases of q, k, v
        "mixtral": t.MixtralConfig(**LLAMA_LIKE, num_local_experts=4),  # mixture of experts
        "gemma2": t.Gemma2Config(  # soft caps, norms after the blocks, alternating windows
            **LLAMA_LIKE, head_dim=32, sliding_window=64, query_pre_attn_scalar=32
        ),
        "opt": t.OPTConfig(  # layer norm, learned positions
            **SHARED, ffn_dim=192, max_position_embeddings=512, word_embed_proj_dim=HIDDEN, dropout=0.0
        ),
        "gpt2": t.GPT2Config(  # fused qkv, one residual tensor
            vocab_size=4096, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=512
        ),
        "cohere": t.CohereConfig(**LLAMA_LIKE),  # attention and MLP in parallel, a layer returns the sum
    }


MLP = {"opt": "fc1", "mixtral": "mlp"}
"""What reads the MLP's input in Hugging Face's layer, where that is not `mlp`."""
BLOCK = {"opt": "model.decoder.layers.{}.self_attn", "gpt2": "transformer.h.{}.attn"}
LAYER_LIST = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}
OUT = {"opt": "out_proj", "gpt2": "c_proj"}


DENSE = ["qwen3", "qwen2", "gemma2", "opt", "gpt2", "cohere"]
OWN_PROCESS = "MIXTURE_OF_EXPERTS_IN_ITS_OWN_PROCESS"
"""vLLM makes the expert-parallel group with the first engine of a process, and only if that is a mixture."""


@pytest.fixture(params=["mixtral"] if OWN_PROCESS in os.environ else DENSE)
def built(request: pytest.FixtureRequest, tmp_path: Path, twin_gated: Path) -> Iterator[tuple[str, Path, Any]]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    configuration = configurations()[request.param]
    model = AutoModelForCausalLM.from_config(configuration, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.rand_like(parameter) * 0.2)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(twin_gated / file, folder / file)
    yield request.param, folder, model


@pytest.mark.skipif(OWN_PROCESS in os.environ, reason="this is that process")
def test_mixture_of_experts():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, OWN_PROCESS: "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed, 1 skipped" in done.stdout


def gated_reference(
    name: str, model: Any, gates: dict[str, torch.Tensor], ids: list[int]
) -> tuple[Any, list[Any], dict[str, list[float]]]:
    """Run the Hugging Face model with gates by hooks.

    Returns logits, the hidden state after each layer, and the largest value of each layer's inputs by site.
    """
    hidden: list[torch.Tensor] = []
    largest: dict[str, list[float]] = {"attention_input": [], "mlp_input": []}
    handles = []
    for index, layer in enumerate(model.get_submodule(LAYER_LIST.get(name, "model.layers"))):
        path = BLOCK.get(name, "model.layers.{}.self_attn").format(index)
        block = model.get_submodule(path)
        weight, bias = gates[f"{path}.output_gate.weight"], gates[f"{path}.output_gate.bias"]
        seen: dict[str, torch.Tensor] = {}

        def remember(module: Any, args: Any, kwargs: Any, seen: Any = seen) -> None:
            seen["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            largest["attention_input"].append(seen["x"].abs().max().item())

        def feed(module: Any, args: Any) -> None:
            largest["mlp_input"].append(args[0].abs().max().item())

        def gate(module: Any, args: Any, seen: Any = seen, weight: Any = weight, bias: Any = bias) -> Any:
            out = args[0]
            flat = gate_reference(out.flatten(0, -2), seen["x"].flatten(0, -2), weight, bias, HEADS)
            return (flat.to(out.dtype).view_as(out),)

        def keep(module: Any, args: Any, output: Any) -> None:
            hidden.append((output[0] if isinstance(output, tuple) else output)[0])

        handles.append(block.register_forward_pre_hook(remember, with_kwargs=True))
        handles.append(block.get_submodule(OUT.get(name, "o_proj")).register_forward_pre_hook(gate))
        handles.append(layer.get_submodule(MLP.get(name, "mlp")).register_forward_pre_hook(feed))
        handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, hidden, largest


def test_gate_and_probes(make_engine, built, prompts, tmp_path):
    name, folder, model = built
    generator = torch.Generator().manual_seed(7)
    gates = {}
    for layer in range(LAYERS):
        path = BLOCK.get(name, "model.layers.{}.self_attn").format(layer) + ".output_gate"
        gates[f"{path}.weight"] = torch.randn(HEADS, HIDDEN, generator=generator) * 0.3
        gates[f"{path}.bias"] = torch.randn(HEADS, generator=generator)
    sidecar = tmp_path / "gates.safetensors"  # not beside the model: vLLM would load it as weights
    save_file(gates, sidecar)
    variables = {"SLUICE_PATCHES__GATE__SOURCE": str(sidecar), "SLUICE_PROBES__QUANTIZATION__INSTALL": "true"}
    engine = make_engine(folder, {**EVERY_ROW, **variables})
    ids = prompts[1]
    logits, hidden, largest = gated_reference(name, model, gates, ids)
    assert (engine.logits(ids) - logits).abs().max().item() < 2e-4 * max(1.0, logits.abs().max().item())
    assert engine.rpc("state")["unavailable"] == {}
    metrics = engine.metrics()
    for layer, state in enumerate(hidden):
        want = residual_reference(state, torch.full((len(ids),), OTHER), 100.0, 1000.0)
        label = f"{layer:03d}"
        assert metrics["activation_abs_max", label] == pytest.approx(want.abs_max, rel=1e-4)
        assert metrics["activation_rms", label] == pytest.approx(want.rms, rel=1e-4)
        assert metrics["activation_kurtosis", label] == pytest.approx(want.kurtosis, rel=1e-3)
        assert metrics["activation_top_channel", label, "1"] == want.top_channel[0]
        assert 0 < metrics["attention_sink_mass", label] < 1
        at_sites = {"hidden": want.abs_max, **{site: values[layer] for site, values in largest.items()}}
        for site, value in at_sites.items():
            headroom = metrics["quantization_headroom_ratio", label, site, "fp8_e4m3", "none"]
            assert 448 / headroom == pytest.approx(value, rel=1e-4), (site, layer)
    assert metrics["attention_heads", "000"] == HEADS
