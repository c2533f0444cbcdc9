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


def apply_gate(out: torch.Tensor, gate: torch.Tensor, enabled: torch.Tensor, heads: int) -> torch.Tensor:
    """Multiply the attention output by its gate where `enabled` holds; otherwise return it bit for bit.

    Parameters
    ----------
    out
        Attention output, [tokens, heads * head_size].
    gate
        Gate values in (0, 1), float32, [tokens, heads] or [tokens, heads * head_size].
    enabled
        Whether the gate acts, bool, scalar tensor on the device.
    heads
        Query heads of this rank.
    """
    per_head = out.view(out.shape[0], heads, -1)
    factor = gate.to(out.dtype).view(out.shape[0], heads, -1)
    return torch.where(enabled, per_head * factor, per_head).reshape(out.shape)


def gate_reference(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, heads: int
) -> torch.Tensor:
    """Gate in float64, written from the formula `out * sigmoid(W x + b)`; shapes as in the fast version."""
    values = 1 / (1 + torch.exp(-(x.double() @ weight.double().T + bias.double())))
    per_head = out.double().view(out.shape[0], heads, -1)
    return (per_head * values.view(out.shape[0], heads, -1)).reshape(out.shape)
