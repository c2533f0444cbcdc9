"""The twin: what gated and ungated twins share, and what the gate does."""

import pytest
import torch

from vllm_sluice.lab.twin import Trace, Twin, TwinConfig


def tiny(gate="none", **changes):
    shape = {"vocab_size": 64, "hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32, "context": 32}
    return TwinConfig(**{**shape, "gate": gate, **changes})


def build(gate, seed=0):
    torch.manual_seed(seed)
    return Twin(tiny(gate))


@pytest.mark.parametrize("gate", ["head", "element"])
def test_gated_and_ungated_twin_of_one_seed_share_their_weights(gate):
    vanilla, gated = build("none").state_dict(), build(gate).state_dict()
    assert {name for name in gated if ".output_gate." not in name} == set(vanilla)
    for name, tensor in vanilla.items():
        assert torch.equal(tensor, gated[name]), name


def test_another_seed_gives_other_weights():
    assert not torch.equal(build("head").lm_head.weight, build("head", seed=1).lm_head.weight)


@pytest.mark.parametrize(("gate", "rows"), [("head", 2), ("element", 16)])
def test_gate_starts_from_its_initial_bias(gate, rows):
    gate_layer = build(gate).model.layers[1].self_attn.output_gate
    assert gate_layer.weight.shape == (rows, 16)
    assert torch.equal(gate_layer.bias, torch.full((rows,), -1.0))
    assert 0 < gate_layer.weight.std() < 0.1


@pytest.mark.parametrize("gate", ["none", "head", "element"])
def test_tracing_does_not_change_the_logits(gate):
    twin, ids, trace = build(gate), torch.randint(0, 64, (3, 20)), Trace()
    assert torch.allclose(twin(ids), twin(ids, trace), atol=1e-6)
    assert [h.shape for h in trace.hidden] == [(3, 20, 16)] * 2
    assert [a.shape for a in trace.attention] == [(3, 2, 20, 20)] * 2
    assert [g.shape for g in trace.gate] == [(3, 20, twin.config.gate_rows)] * (2 if gate != "none" else 0)


def test_attention_is_causal_and_sums_to_one():
    trace = Trace()
    build("none")(torch.randint(0, 64, (2, 12)), trace)
    for attention in trace.attention:
        assert torch.all(attention.triu(1) == 0)
        assert torch.allclose(attention.sum(-1), torch.ones(2, 2, 12))


@pytest.mark.parametrize("gate", ["head", "element"])
def test_an_open_gate_is_no_gate_and_a_shut_one_is_no_attention(gate):
    vanilla, gated, ids = build("none"), build(gate), torch.randint(0, 64, (2, 12))
    for layer in gated.model.layers:
        torch.nn.init.constant_(layer.self_attn.output_gate.bias, 100.0)
    assert torch.allclose(gated(ids), vanilla(ids), atol=1e-6)
    for layer, plain in zip(gated.model.layers, vanilla.model.layers, strict=True):
        torch.nn.init.constant_(layer.self_attn.output_gate.bias, -100.0)
        torch.nn.init.zeros_(plain.self_attn.o_proj.weight)
    assert torch.allclose(gated(ids), vanilla(ids), atol=1e-6)


def test_an_element_gate_with_equal_rows_per_head_is_a_head_gate():
    head, element, ids = build("head"), build("element"), torch.randint(0, 64, (2, 12))
    for of_head, of_element in zip(head.model.layers, element.model.layers, strict=True):
        weight, bias = of_head.self_attn.output_gate.parameters()
        of_element.self_attn.output_gate.weight.data = weight.data.repeat_interleave(8, dim=0)
        of_element.self_attn.output_gate.bias.data = bias.data.repeat_interleave(8)
    assert torch.allclose(head(ids), element(ids), atol=1e-6)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="hidden size 16 is not a multiple of 3 heads"):
        tiny(heads=3)
    with pytest.raises(ValueError, match=r"gate bias init 0\.5 is above 0"):
        tiny("head", gate_bias_init=0.5)
