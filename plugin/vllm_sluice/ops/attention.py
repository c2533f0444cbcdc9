"""Attention probabilities of sampled queries, recomputed from the query and its keys, and what is read from them."""

from __future__ import annotations

import math

import torch

FIRST = 4
"""Positions whose mass counts as the first few (StreamingLLM, Xiao et al., arXiv 2309.17453, keeps four)."""


def probabilities(
    query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scale: float, soft_cap: float = 0.0
) -> torch.Tensor:
    """Recompute causal attention probabilities.

    Parameters
    ----------
    query
        Sampled queries, rotary embedding applied, [queries, heads, head_dim].
    keys
        Keys of each query's own sequence, transposed, block by block as the cache holds them:
        [queries, blocks, kv_heads, head_dim, block_size]; those after the query's position are ignored, whatever
        they hold.
    positions
        Position of each query in its sequence, int64, [queries].
    scale, soft_cap
        Factor of the scores; scores become `soft_cap * tanh(score / soft_cap)` if that is above 0.

    Returns
    -------
    torch.Tensor
        float32, [queries, heads, blocks * block_size]; 0 after the query's position.
    """
    queries, heads, dim = query.shape
    _, blocks, kv_heads, _, size = keys.shape
    grouped = query.float().view(queries, 1, kv_heads, heads // kv_heads, dim)
    scores = grouped @ keys.float()  # [queries, blocks, kv_heads, group, block_size]
    scores = scores.permute(0, 2, 3, 1, 4).reshape(queries, heads, blocks * size) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    visible = torch.arange(blocks * size, device=keys.device) <= positions.view(-1, 1, 1)
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)


def summarise(probability: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Reduce probabilities to what is exported.

    Parameters
    ----------
    probability
        [queries, heads, length].
    positions
        Position of each query, int64, [queries], at least 1.

    Returns
    -------
    torch.Tensor
        [3, queries, heads]: mass on position 0, mass on the first four positions, entropy divided by the logarithm
        of the number of visible keys (position + 1).
    """
    entropy = -torch.special.xlogy(probability, probability).sum(dim=-1)
    most = torch.log((positions + 1).to(probability.dtype)).view(-1, 1)
    return torch.stack([probability[..., 0], probability[..., :FIRST].sum(dim=-1), entropy / most])


def summary_reference(
    query: torch.Tensor, keys: torch.Tensor, position: int, scale: float
) -> tuple[list[float], list[float], list[float]]:
    """Sink mass, first-four mass and entropy ratio of one query, per head, in float64 and plain loops.

    `query` is [heads, head_dim], `keys` [length, kv_heads, head_dim].
    """
    group = query.shape[0] // keys.shape[1]
    sink, first, ratio = [], [], []
    for head in range(query.shape[0]):
        scores = [
            scale * torch.dot(query[head].double(), keys[key, head // group].double()).item()
            for key in range(position + 1)
        ]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        row = [weight / sum(weights) for weight in weights]
        sink.append(row[0])
        first.append(sum(row[:FIRST]))
        ratio.append(-sum(p * math.log(p) for p in row if p > 0) / math.log(position + 1))
    return sink, first, ratio
