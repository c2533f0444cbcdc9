"""Simulated quantization against its float64 definition, on fresh random input."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.test_ops import fresh
from vllm_sluice.config import Config
from vllm_sluice.ops.quantization import (
    LARGEST,
    PAIRS,
    energies,
    noise_reference,
    observe,
    quantize,
    quantize_reference,
)
from vllm_sluice.ops.residual import IGNORED, OTHER
from vllm_sluice.probes.installer import ProbeSet
from vllm_sluice.probes.quantization import _HEADROOMS, InstalledQuantization
from vllm_sluice.telemetry.catalogue import QUANTIZED_PAIRS

FORMATS = tuple(LARGEST)

# Signal and noise are sums of squares of float32 numbers in float64. Each quantized value differs from the float64
# one by at most a few units in the 24th bit, except where x / scale is within 1e-7 of a tie: then it rounds the other
# way, with the same error. int8 has the larger ratio of value to error, 254 at the end of the range, which gives
# 254 * 2^-23 = 3e-5 relative error of one entry's error, and twice that of its square.
ENERGY = 1e-4

reals = st.floats(min_value=-1e4, max_value=1e4, width=32)


@settings(max_examples=200)
@given(values=st.lists(reals, min_size=1, max_size=64), exponent=st.integers(-12, 12), number=st.sampled_from(FORMATS))
def test_with_a_scale_that_is_a_power_of_two_every_value_equals_the_definition(values, exponent, number):
    """All is exact then: ties, values below the smallest normal number, and values beyond the range."""
    x = torch.tensor(values)
    largest = LARGEST[number] * 2.0**exponent
    found = quantize(x, torch.tensor(largest), number)
    assert found.double().tolist() == quantize_reference(x, largest, number).tolist()


def test_the_definition_keeps_every_value_of_the_format():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[torch.isfinite(codes)]
    assert len(codes) == 254
    assert torch.equal(quantize_reference(codes, 448.0, "fp8_e4m3"), codes)
    halves = (codes.unique()[1:] + codes.unique()[:-1]) / 2
    rounded = quantize_reference(halves, 448.0, "fp8_e4m3")
    assert torch.isin(rounded, codes).all()  # and nothing else comes out
    whole = torch.arange(-127, 128).double()
    assert torch.equal(quantize_reference(whole, 127.0, "int8"), whole)
    assert quantize_reference(torch.tensor([0.5, 1.5, -2.5, 300.0]), 127.0, "int8").tolist() == [0.0, 2.0, -2.0, 127.0]
    assert quantize_reference(torch.tensor([1e9, -1e9]), 448.0, "fp8_e4m3").tolist() == [448.0, -448.0]


def rows_with_everything(generator: torch.Generator) -> torch.Tensor:
    """Make rows with outlier channels, a massive token, zeros, NaN and infinity, [4 sites, 24 rows, 96]."""
    x = torch.randn(4, 24, 96, generator=generator)
    x[:, :, 7] *= 60.0
    x[1, 0] *= 500.0
    x[2] *= 1e-6
    x[3, 5] = 0.0
    x[0, 3, 4], x[0, 9, 1], x[1, 2, 2] = math.nan, math.inf, -math.inf
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energies_equal_the_reference(dtype):
    generator = fresh()
    for _ in range(5):
        x = rows_with_everything(generator).to(dtype)
        looked_at = torch.rand(24, generator=generator) < 0.8
        limit = torch.tensor([30.0, math.inf, 1e-7, 200.0])  # clips, unknown, clips nearly all, clips hardly any
        found = energies(x, looked_at, limit)
        assert found.shape == (4, len(PAIRS), 2)
        for site, rows in enumerate(x[:, looked_at].double()):
            signal = torch.where(torch.isfinite(rows), rows, 0.0).square().sum().item()
            for index, (number, scale) in enumerate(PAIRS):
                if scale == "static" and math.isinf(limit[site]):
                    assert found[site, index].tolist() == [0.0, 0.0]
                    continue
                noise = noise_reference(rows, number, scale, limit[site].item())
                assert found[site, index].tolist() == pytest.approx([signal, noise], rel=ENERGY), (site, number, scale)


@settings(max_examples=100)
@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_subnormal=False), min_size=8, max_size=8), min_size=1, max_size=6
    ),
    limit=st.floats(min_value=2.0**-10, max_value=2.0**20, width=32),
)
def test_energies_are_finite_and_no_larger_than_the_signal_for_any_input(rows, limit):
    found = energies(torch.tensor([rows]), torch.ones(len(rows), dtype=torch.bool), torch.tensor([limit]))
    assert torch.isfinite(found).all()
    # Rounding to nearest never errs by more than the value itself; clipping neither.
    assert (found[..., 1] <= found[..., 0] * (1 + 1e-6)).all()


def test_zeros_lose_nothing():
    found = energies(torch.zeros(1, 3, 8), torch.ones(3, dtype=torch.bool), torch.tensor([1.0]))
    assert not found.any()
    exact = torch.tensor([[[127.0, 3.0, -64.0, 0.0]]])
    found = energies(exact, torch.ones(1, dtype=torch.bool), torch.tensor([127.0]))
    assert found[0, [index for index, (number, _) in enumerate(PAIRS) if number == "int8"], 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_observer_equals_its_definition(dtype):
    generator = fresh()
    for _ in range(5):
        x = (torch.randn(40, 64, generator=generator) * 10).to(dtype)
        x[3, 3], x[4, 4], x[30, 1] = math.nan, math.inf, 1e6
        classes = torch.full((40,), OTHER, dtype=torch.int8)
        classes[torch.rand(40, generator=generator) < 0.3] = IGNORED
        classes[30] = IGNORED  # the largest value is in a row that does not count
        peak, counts, limit = torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.tensor([15.0])
        for part in (slice(0, 13), slice(13, 40)):
            observe(x[part], classes[part], limit, peak, counts)
        kept = x[classes != IGNORED].double()
        kept = kept[torch.isfinite(kept)].abs()
        assert peak.item() == kept.max().item()
        assert counts.tolist() == [len(kept), int((kept > 15.0).sum())]
        assert counts[1] > 0
        before = (peak.clone(), counts.clone())
        observe(x, torch.full((40,), IGNORED, dtype=torch.int8), limit, peak, counts)
        assert torch.equal(peak, before[0]) and torch.equal(counts, before[1])


def test_the_catalogue_names_what_the_probe_measures():
    assert QUANTIZED_PAIRS["sluice_quantization_snr_decibels"] == PAIRS
    assert all(number in LARGEST or number == "serving" for number, _ in _HEADROOMS)
    assert InstalledQuantization.reductions == {"peak": "max", "counts": "sum", "energies": "sum"}


def test_a_probe_that_is_enabled_in_vain_is_named_in_the_log(caplog):
    nothing = {kind: {"install": False} for kind in ("residual", "attention", "gate")}
    with caplog.at_level(logging.WARNING, logger="vllm.sluice"):
        ProbeSet(Config(probes={**nothing, "quantization": {"install": False, "enabled": True}}), nn.Module(), None, {})
        assert caplog.text == ""
        ProbeSet(Config(probes={**nothing, "quantization": {"enabled": True}}), nn.Module(), None, {})
    assert "the probe is not built into the model; set probes.quantization.install" in caplog.text
