"""Every kernel against its float64 reference, on fresh random input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sluice.ops.attention import probabilities, summarise, summary_reference
from vllm_sluice.ops.gate import apply_gate, gate_logits, gate_reference, gate_values
from vllm_sluice.ops.histogram import BINS, QUANTILE_ERROR, add_to_histogram, quantile
from vllm_sluice.ops.residual import DELIMITER, IGNORED, OTHER, START, accumulate, residual_reference


def fresh() -> torch.Generator:
    """Return a generator seeded from the system; pytest shows the seed if a test fails."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


def accumulators(hidden: int) -> dict[str, torch.Tensor]:
    return {
        "channel_max": torch.zeros(hidden),
        "moments": torch.zeros(4, dtype=torch.float64),
        "counts": torch.zeros(6, dtype=torch.int64),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_accumulators_equal_the_reference(dtype):
    generator = fresh()
    for _ in range(10):
        tokens, hidden = 57, 96
        x = torch.randn(tokens, hidden, generator=generator)
        x[3, 7], x[11, 7], x[20, 90] = 900.0, -1200.0, 250.0
        x = x.to(dtype)
        classes = torch.randint(0, 3, (tokens,), generator=generator).to(torch.int8)
        want = residual_reference(x, classes, 100.0, 300.0)
        state = accumulators(hidden)
        threshold = torch.tensor([max(100.0, 300.0 * want.median)])
        for part in (slice(0, 20), slice(20, tokens)):  # chunks add up
            accumulate(x[part], classes[part], threshold, **state)
        entries = state["counts"][2].item()
        mean, second, third, fourth = (state["moments"] / entries).tolist()
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        assert state["counts"].tolist() == [tokens, 0, tokens * hidden, *want.massive]
        assert state["channel_max"].max().item() == want.abs_max
        assert state["channel_max"].topk(3).indices.tolist() == want.top_channel
        assert math.sqrt(second) == pytest.approx(want.rms, rel=1e-6)
        assert central / (second - mean**2) ** 2 == pytest.approx(want.kurtosis, rel=1e-5)


def test_ignored_rows_and_non_finite_entries_leave_no_trace():
    x = torch.randn(12, 16, generator=fresh())
    classes = torch.full((12,), OTHER, dtype=torch.int8)
    classes[0], classes[4] = START, DELIMITER
    clean, dirty = accumulators(16), accumulators(16)
    accumulate(x[:8], classes[:8], torch.tensor([1.0]), **clean)
    x[8:], classes[8:] = 1e30, IGNORED
    accumulate(x, classes, torch.tensor([1.0]), **dirty)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name

    x[2, 3], x[5, 1] = float("nan"), float("-inf")
    state = accumulators(16)
    accumulate(x[:8], classes[:8], torch.tensor([1.0]), **state)
    want = residual_reference(x[:8], classes[:8], 1.0, 0.0)
    assert state["counts"].tolist() == [8, 2, 8 * 16 - 2, *want.massive]
    assert state["channel_max"].max().item() == pytest.approx(want.abs_max)
    assert torch.isfinite(state["moments"]).all()


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(min_value=2.0**-23, max_value=2.0**23, width=32), min_size=1, max_size=400),
    share=st.sampled_from([0.1, 0.5, 0.9, 0.99]),
)
def test_a_quantile_is_within_its_bound(values, share):
    magnitudes = torch.tensor(values).view(1, 1, -1)
    histogram = torch.zeros(1, BINS, dtype=torch.int64)
    add_to_histogram(histogram, magnitudes, torch.ones(1, dtype=torch.int64))
    exact = np.sort(np.array(values, dtype=np.float64))[math.ceil(share * len(values)) - 1]
    # A value on the edge of a bin may be put into its neighbour by the rounding of log2 in float32.
    assert quantile(histogram.numpy(), share)[0] == pytest.approx(exact, rel=QUANTILE_ERROR + 2e-6)


def test_a_histogram_leaves_out_rows_and_non_finite_values():
    magnitudes = torch.tensor([[[1.0, 2.0], [float("nan"), 4.0], [8.0, 8.0]]])
    histogram = torch.zeros(1, BINS, dtype=torch.int64)
    add_to_histogram(histogram, magnitudes, torch.tensor([1, 1, 0]))
    assert histogram.sum() == 3
    assert np.isnan(quantile(np.zeros((1, BINS), dtype=np.int64), 0.5)[0])


@pytest.mark.parametrize("rows", ["head", "element"])
def test_the_gate_equals_its_reference(rows):
    generator = fresh()
    tokens, heads, size, hidden = 9, 4, 8, 24
    out = torch.randn(tokens, heads * size, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)
    count = heads if rows == "head" else heads * size
    weight, bias = torch.randn(count, hidden, generator=generator), torch.randn(count, generator=generator)
    gate = gate_values(gate_logits(x, weight, bias), torch.ones(()), torch.zeros(()))
    on = apply_gate(out, gate, torch.ones(tokens, dtype=torch.bool), heads)
    off = apply_gate(out, gate, torch.zeros(tokens, dtype=torch.bool), heads)
    want = gate_reference(out, x, weight, bias, heads)
    assert torch.allclose(on.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(off, out)
    assert not torch.equal(on, out)
    mixed = apply_gate(out, gate, torch.arange(tokens) % 2 == 0, heads)
    assert torch.equal(mixed[::2], on[::2])
    assert torch.equal(mixed[1::2], out[1::2])


def test_temperature_and_floor_of_a_gate_equal_the_reference():
    generator = fresh()
    out, x = torch.randn(9, 32, generator=generator), torch.randn(9, 24, generator=generator)
    weight, bias = torch.randn(4, 24, generator=generator), torch.randn(4, generator=generator)
    gate = gate_values(gate_logits(x, weight, bias), torch.tensor(1 / 2.5), torch.tensor(0.2))
    assert gate.min() > 0.2
    assert gate.max() < 1
    got = apply_gate(out, gate, torch.ones(9, dtype=torch.bool), 4)
    want = gate_reference(out, x, weight, bias, 4, temperature=2.5, floor=0.2)
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)


def by_block(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Lay keys, [queries, length, kv_heads, head_dim], out as the cache does, transposed in blocks of `size`."""
    return keys.unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_attention_summaries_equal_the_reference(heads, kv_heads):
    generator = fresh()
    queries, length, dim, scale = 5, 40, 16, 0.25
    query = torch.randn(queries, heads, dim, generator=generator)
    keys = torch.randn(queries, length, kv_heads, dim, generator=generator)
    keys[:, 0] *= 4.0
    positions = torch.tensor([1, 2, 17, 38, 39])
    rest = torch.arange(length).view(1, -1) > positions.view(-1, 1)
    keys[rest] = float("nan")  # what lies behind the query in its last block must not matter
    keys = torch.nan_to_num(keys, nan=1e4)
    found = summarise(probabilities(query, by_block(keys, 8), positions, scale), positions)
    for index, position in enumerate(positions.tolist()):
        want = summary_reference(query[index], keys[index], position, scale)
        # A probability next to 1 is rounded to a multiple of 2^-24, so the entropy, whose slope is 1 there, has an
        # absolute error of some 1e-7 in float32 however small it is.
        for name, (row, error) in enumerate(zip(want, (1e-7, 1e-7, 1e-6), strict=True)):
            assert found[name, index].tolist() == pytest.approx(row, rel=1e-5, abs=error)


def test_a_soft_cap_is_applied_before_the_softmax():
    generator = fresh()
    query, keys = torch.randn(1, 2, 8, generator=generator), torch.randn(1, 6, 2, 8, generator=generator)
    got = probabilities(query, by_block(keys, 3), torch.tensor([5]), 3.0, soft_cap=2.0)[0]
    for head in range(2):
        scores = 2.0 * torch.tanh(3.0 * keys[0, :, head].double() @ query[0, head].double() / 2.0)
        assert torch.allclose(got[head].double(), torch.softmax(scores, 0), atol=1e-6)
