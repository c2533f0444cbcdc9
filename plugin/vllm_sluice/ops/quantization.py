"""Simulated INT8 and FP8 quantization of activations: range, clipping and noise, and its float64 reference.

Quantizing x with the scale s means `s * round(clamp(x / s))`, symmetric and without a zero point, as vLLM's W8A8
kernels do it. `round` goes to the nearest value of the format, ties to even; beyond the format's largest value it
saturates.
"""

from __future__ import annotations

from typing import Literal

import torch

from vllm_sluice.ops.residual import IGNORED

Format = Literal["int8", "fp8_e4m3"]
Scale = Literal["per_token", "per_tensor", "static"]

LARGEST: dict[Format, float] = {"int8": 127.0, "fp8_e4m3": 448.0}
"""Largest value of each format; INT8's -128 is not used."""

PAIRS: tuple[tuple[Format, Scale], ...] = (
    ("int8", "per_token"), ("int8", "per_tensor"), ("int8", "static"),
    ("fp8_e4m3", "per_token"), ("fp8_e4m3", "per_tensor"), ("fp8_e4m3", "static"),
)  # fmt: skip
"""What `energies` tries: the format, and where its scale comes from (largest |x| of the token's row, of all sampled
rows of the site, or of a baseline)."""


def observe(
    x: torch.Tensor, classes: torch.Tensor, limit: torch.Tensor, peak: torch.Tensor, counts: torch.Tensor
) -> None:
    """Add the rows of one forward pass to the accumulators, in place. Traced into the model's graph.

    Non-finite entries are left out.

    Parameters
    ----------
    x
        Activations, [tokens, width].
    classes
        Position class of each row, int8, [tokens]; `IGNORED` rows leave no trace.
    limit
        Largest |x| that the baseline's scale can hold, float32, [1]; infinite without a baseline.
    peak
        Largest |x| so far, float32, [1].
    counts
        int64, [2]: finite entries, entries beyond the limit.
    """
    # Row by row first: that fuses with what produces x, which often reduces over the same rows.
    magnitude = x.float().abs()
    counted = torch.isfinite(magnitude) & (classes < IGNORED).unsqueeze(1)
    magnitude = torch.where(counted, magnitude, 0.0)
    peak.copy_(torch.maximum(peak, magnitude.amax(dim=1).amax()))
    finite = counted.float().sum(dim=1).long().sum()
    clipped = (magnitude > limit).float().sum(dim=1).long().sum()
    counts.add_(torch.stack([finite, clipped]))


def quantize(x: torch.Tensor, largest: torch.Tensor, number_format: Format) -> torch.Tensor:
    """Quantize and dequantize, so that `largest` becomes the format's largest value; float32, shape of `x`.

    Parameters
    ----------
    x
        Finite values, float32.
    largest
        |x| at the end of the range, float32, broadcast to `x`; 0 for rows of zeros.
    number_format
        `int8` or `fp8_e4m3`.
    """
    end = LARGEST[number_format]
    scale = largest / end
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = (x / scale).clamp(-end, end)  # not every PyTorch's cast to FP8 saturates: some give NaN
    rounded = scaled.round() if number_format == "int8" else scaled.to(torch.float8_e4m3fn).float()
    return (rounded * scale).clamp(-largest, largest)  # near float32's end the product may round to infinity


def energies(sampled: torch.Tensor, looked_at: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Quantize sampled rows in every way of `PAIRS` and add up signal and noise.

    Parameters
    ----------
    sampled
        Sampled rows of several sites, [sites, rows, width].
    looked_at
        Whether a row counts, bool, [rows]. Non-finite entries count as 0.
    limit
        Largest |x| of the static scale, float32, [sites]; infinite where there is none: nothing is added then.

    Returns
    -------
    torch.Tensor
        float64, [sites, pairs, 2]: sum of x^2, sum of (x - quantized x)^2.
    """
    x = sampled.float()
    x = torch.where(torch.isfinite(x) & looked_at.view(1, -1, 1), x, 0.0)
    known = torch.isfinite(limit)
    per_token = x.abs().amax(dim=2, keepdim=True)
    largest: dict[Scale, torch.Tensor] = {
        "per_token": per_token,
        "per_tensor": per_token.amax(dim=1, keepdim=True),
        "static": torch.where(known, limit, 1.0).view(-1, 1, 1),
    }
    signal = _energy(x)
    found = []
    for number_format, scale in PAIRS:
        noise = _energy(x - quantize(x, largest[scale], number_format))
        pair = torch.stack([signal, noise], dim=1)
        found.append(pair * known.unsqueeze(1) if scale == "static" else pair)
    return torch.stack(found, dim=1)


def _energy(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().sum(dim=(1, 2))


def quantize_reference(x: torch.Tensor, largest: float | torch.Tensor, number_format: Format) -> torch.Tensor:
    """Quantize and dequantize in float64, from the definition of the formats; `x` is finite, `largest` above 0.

    FP8-E4M3 (OCP): 4 bits of exponent with bias 7, 3 bits of mantissa, so values of magnitude 2^e..2^(e+1) lie
    2^(e-3) apart, and those below the smallest normal number 2^-6 lie 2^-9 apart; the largest is 448.
    """
    end = LARGEST[number_format]
    scaled = x.double() * (end / largest)
    step = torch.ones_like(scaled)
    if number_format == "fp8_e4m3":
        _, exponent = torch.frexp(scaled)  # |scaled| is in [2^(exponent - 1), 2^exponent)
        step = torch.exp2((exponent - 1).clamp(min=-6).double() - 3)
    return ((scaled / step).round() * step).clamp(-end, end) * (largest / end)


def noise_reference(x: torch.Tensor, number_format: Format, scale: Scale, limit: float = 0.0) -> float:
    """Sum of squared errors of quantizing rows `x`, [rows, width], in float64; `limit` is the static scale's end.

    Non-finite entries are left out. All of `x` is one tensor for `per_tensor`.
    """
    x = torch.where(torch.isfinite(x), x, 0.0).double()
    x = x[x.abs().amax(dim=1) > 0]
    if len(x) == 0:
        return 0.0
    largest: float | torch.Tensor = limit
    if scale != "static":
        largest = x.abs().amax(dim=1, keepdim=True) if scale == "per_token" else x.abs().max().item()
    return (x - quantize_reference(x, largest, number_format)).square().sum().item()
