"""What the quantization probe should report, from the Hugging Face model's own tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine import EVERY_ROW
from vllm_sluice.lab.reference import reference_model
from vllm_sluice.ops.quantization import LARGEST, PAIRS, noise_reference

EVERY_ROW_QUANTIZED = {
    **EVERY_ROW,
    "SLUICE_PROBES__QUANTIZATION__INSTALL": "true",
    "SLUICE_PROBES__QUANTIZATION__SAMPLE_ROWS": "64",
    "SLUICE_PROBES__QUANTIZATION__INTERVAL_SECONDS": "0",
}
CHUNK = 64
"""Tokens of one forward pass, as the engines of the tests have it."""


@dataclass(frozen=True)
class Tolerance:
    """Relative error of the largest value, and decibels of the signal-to-noise ratio."""

    peak: float
    decibels: float


# float32: vLLM and Hugging Face differ by 1e-6 relative. An entry's error of quantization is at least 1 / 254 of the
# range's end and changes by 1e-6 of the entry, so by 3e-4 of itself with a random sign: 1e-3 dB over a tensor (measured
# 2e-4). bfloat16: the tensors themselves differ by up to 2^-8, and of a largest value that is one more rounding.
FLOAT32 = Tolerance(1e-5, 2e-3)
BFLOAT16 = Tolerance(0.05, 0.5)


def site_tensors(
    folder: Path, sequences: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, *, gate_enabled: bool = True
) -> dict[tuple[str, str], list[torch.Tensor]]:
    """Return what is at each site, {(layer label, site): one [tokens, hidden] per sequence}, by hooks."""
    model = reference_model(folder, dtype=dtype, gate_enabled=gate_enabled)
    found: dict[tuple[str, str], list[torch.Tensor]] = {}

    def keep(layer: int, site: str) -> Callable[[torch.Tensor], None]:
        return lambda x: found.setdefault((f"{layer:03d}", site), []).append(x.flatten(0, -2))

    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            entering, feeding, leaving = (keep(index, site) for site in ("attention_input", "mlp_input", "hidden"))
            handles = (
                layer.self_attn.register_forward_pre_hook(
                    lambda _m, args, kwargs, keep=entering: keep(kwargs["hidden_states"] if kwargs else args[0]),
                    with_kwargs=True,
                ),
                layer.mlp.register_forward_pre_hook(lambda _m, args, keep=feeding: keep(args[0])),
                layer.register_forward_hook(
                    lambda _m, _args, out, keep=leaving: keep(out[0] if isinstance(out, tuple) else out)
                ),
            )
            for handle in handles:
                hooks.callback(handle.remove)
        for ids in sequences:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return found


def passes(tensors: Sequence[torch.Tensor], prompts: Sequence[int]) -> list[torch.Tensor]:
    """Cut each sequence into the forward passes that it takes alone: the prompt in chunks, then token by token."""
    cut: list[torch.Tensor] = []
    for x, prompt in zip(tensors, prompts, strict=True):
        cut += [*x[:prompt].split(CHUNK), *(x[prompt:].split(1) if len(x) > prompt else ())]
    return cut


def check_quantization(
    metrics: Mapping[tuple[str, ...], float], sites: Mapping[tuple[str, str], list[torch.Tensor]],
    prompts: Sequence[int], tolerance: Tolerance, dtype: torch.dtype = torch.float32,
    limits: Mapping[tuple[str, str], float] | None = None,
) -> None:
    """Compare every exported number with the reference; `limits` are the baseline's, by layer label and site.

    The sequences must have run one after the other.
    """
    for (layer, site), tensors in sites.items():
        whole = torch.cat(list(tensors)).double()
        peak, signal = whole.abs().max().item(), whole.square().sum().item()
        limit = (limits or {}).get((layer, site))

        def metric(name: str, *labels: str, layer: str = layer, site: str = site) -> Any:
            return metrics.get((f"quantization_{name}", layer, site, *labels))

        def about(value: float) -> Any:
            return pytest.approx(value, rel=tolerance.peak)

        assert metric("elements_total") == whole.numel()
        assert metric("headroom_ratio", "serving", "none") == about(torch.finfo(dtype).max / peak), (layer, site)
        assert metric("headroom_ratio", "fp8_e4m3", "none") == about(448 / peak)
        for number in LARGEST:
            assert metric("headroom_ratio", number, "static") == (None if limit is None else about(limit / peak))
        clipped = None if limit is None else int((whole.abs() > limit).sum())
        assert metric("clipped_total") == (None if clipped is None else pytest.approx(clipped, abs=2, rel=1e-3))
        for number, scale in PAIRS:
            found = metric("snr_decibels", number, scale)
            if scale == "static" and limit is None:
                assert found is None
                continue
            noise = sum(noise_reference(rows, number, scale, limit or 0.0) for rows in passes(tensors, prompts))
            wanted = 10 * math.log10(signal / noise)
            assert found == pytest.approx(wanted, abs=tolerance.decibels), (layer, site, number, scale)
