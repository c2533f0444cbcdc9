"""Sigmoid gate on the attention output (Qiu et al., arXiv 2505.06708, position G1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gate_logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute `W x + b`.

    Parameters
    ----------
    x
        Input of the attention block, [..., hidden].
    weight, bias
        Gate projection, [rows, hidden] and [rows]; rows = heads (head-wise) or heads * head_size (element-wise).

    Returns
    -------
    torch.Tensor
        Logits, [tokens, rows], dtype of `x`.
    """
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias)


def gate_values(logits: torch.Tensor, sharpness: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Turn logits into gate values `f + (1 - f) * sigmoid(logits / temperature)`, float32, shape of `logits`.

    Parameters
    ----------
    logits
        `W x + b`, [tokens, rows].
    sharpness
        1 / temperature, float32, scalar tensor; 1 leaves the trained gate as it is.
    floor
        Smallest value f of a gate, float32, scalar tensor; 0 leaves the trained gate as it is.
    """
    return floor + (1 - floor) * torch.sigmoid(logits.float() * sharpness)


def apply_gate(out: torch.Tensor, gate: torch.Tensor, acts: torch.Tensor, heads: int) -> torch.Tensor:
    """Multiply the attention output by its gate in the rows where `acts` holds; leave other rows bit for bit.

    Parameters
    ----------
    out
        Attention output, [tokens, heads * head_size].
    gate
        Gate values in (0, 1), float32, [tokens, heads] or [tokens, heads * head_size].
    acts
        Whether the gate acts on each row, bool, [tokens], on the device.
    heads
        Query heads of this rank.
    """
    per_head = out.view(out.shape[0], heads, -1)
    factor = gate.to(out.dtype).view(out.shape[0], heads, -1)
    return torch.where(acts.view(-1, 1, 1), per_head * factor, per_head).reshape(out.shape)


def gate_reference(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, heads: int,
    temperature: float = 1.0, floor: float = 0.0,
) -> torch.Tensor:
    """Gate in float64, written from the formula `out * (f + (1 - f) * sigmoid((W x + b) / t))`."""
    values = 1 / (1 + torch.exp(-(x.double() @ weight.double().T + bias.double()) / temperature))
    values = floor + (1 - floor) * values
    per_head = out.double().view(out.shape[0], heads, -1)
    return (per_head * values.view(out.shape[0], heads, -1)).reshape(out.shape)
