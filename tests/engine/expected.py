"""What the probes should report, computed from the Hugging Face model's own tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_sluice.lab.reference import reference_model, reference_trace
from vllm_sluice.ops.residual import OTHER, residual_reference


@dataclass(frozen=True)
class Expected:
    """One layer's statistics over all looked-at tokens, named as the metrics are."""

    activation: dict[str, float]
    attention: dict[str, float]
    gate: dict[str, float]


def expected(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    *,
    first: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    massive: tuple[float, float] = (100.0, 1000.0),
) -> list[Expected]:
    """Trace sequences through the Hugging Face model and reduce.

    Parameters
    ----------
    sequences
        Token ids of each sequence.
    first
        Position from which each sequence's tokens are looked at (later than 0 after a prefix-cache hit).
    """
    model = reference_model(folder, dtype=dtype)
    first = first or [0] * len(sequences)
    traces = [reference_trace(model, list(ids)) for ids in sequences]
    layers = []
    for layer in range(len(traces[0].hidden)):
        hidden = torch.cat([t.hidden[layer].flatten(0, -2)[start:] for t, start in zip(traces, first, strict=True)])
        stats = residual_reference(hidden, torch.full((len(hidden),), OTHER), *massive)
        mass, four, entropy = [], [], []
        for trace, start in zip(traces, first, strict=True):
            probability = trace.attention[layer].double()
            probability = probability[0] if probability.dim() == 4 else probability
            for position in range(max(1, start), probability.shape[1]):
                row = probability[:, position, : position + 1]
                mass.append(row[:, 0])
                four.append(row[:, :4].sum(-1))
                entropy.append(-torch.special.xlogy(row, row).sum(-1) / math.log(position + 1))
        per_head = torch.stack(mass).mean(0)
        gates = None
        if traces[0].gate:
            gates = torch.cat(
                [t.gate[layer].double().flatten(0, -2)[start:] for t, start in zip(traces, first, strict=True)]
            )
        layers.append(
            Expected(
                activation={
                    "abs_max": stats.abs_max,
                    "median": stats.median,
                    "max_to_median_ratio": stats.abs_max / stats.median,
                    "rms": stats.rms,
                    "kurtosis": stats.kurtosis,
                    "top_abs.1": stats.top_abs[0],
                    "top_abs.2": stats.top_abs[1],
                    "top_abs.3": stats.top_abs[2],
                    "top_channel.1": stats.top_channel[0],
                    "top_channel.2": stats.top_channel[1],
                    "top_channel.3": stats.top_channel[2],
                },
                attention={
                    "sink_mass": per_head.mean().item(),
                    "first4_mass": torch.stack(four).mean().item(),
                    "entropy_ratio": torch.stack(entropy).mean().item(),
                    "sink_heads": float((per_head > 0.3).sum()),
                    "heads": float(len(per_head)),
                },
                gate={}
                if gates is None
                else {"mean": gates.mean().item(), "closed_ratio": (gates < 0.1).double().mean().item()},
            )
        )
    return layers
