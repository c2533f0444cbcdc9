"""Statistics of the hidden state: one pass that fuses into the graph, and its float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

START, DELIMITER, OTHER, IGNORED = 0, 1, 2, 3
"""Position class of a row: position 0 of its sequence, a delimiter token, another token, not a token to look at."""

POSITION_CLASSES = ("start", "delimiter", "other")


def accumulate(
    hidden: torch.Tensor,
    classes: torch.Tensor,
    threshold: torch.Tensor,
    channel_max: torch.Tensor,
    moments: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Add the rows of one forward pass to the accumulators, in place. Traced into the model's graph.

    Non-finite entries are counted and otherwise left out.

    Parameters
    ----------
    hidden
        Hidden state, [tokens, hidden].
    classes
        Position class of each row, int8, [tokens]; `IGNORED` rows leave no trace.
    threshold
        |h| from which an entry is massive, float32, [1].
    channel_max
        Largest |h| of each channel so far, float32, [hidden].
    moments
        Sums of h, h^2, h^3, h^4, float64, [4].
    counts
        int64, [6]: looked-at rows, non-finite entries, finite entries, massive entries by position class.
    """
    # Row by row first: that fuses with the norm, which reduces over the same rows.
    x = hidden.float()
    looked_at = classes < IGNORED
    counted = torch.isfinite(x) & looked_at.unsqueeze(1)
    x = torch.where(counted, x, 0.0)
    magnitude = x.abs()
    square = x * x
    finite = counted.float().sum(dim=1).long()
    massive = (magnitude >= threshold).float().sum(dim=1).long()
    powers = (x, square, square * x, square * square)
    channel_max.copy_(torch.maximum(channel_max, magnitude.amax(dim=0)))
    moments.add_(torch.stack([power.sum(dim=1).double().sum() for power in powers]))
    counts.add_(
        torch.stack(
            [
                looked_at.sum(),
                torch.where(looked_at, x.shape[1] - finite, 0).sum(),
                finite.sum(),
                torch.where(classes == START, massive, 0).sum(),
                torch.where(classes == DELIMITER, massive, 0).sum(),
                torch.where(classes == OTHER, massive, 0).sum(),
            ]
        )
    )


def row_maxima(
    hidden: torch.Tensor, classes: torch.Tensor, largest: torch.Tensor, channel: torch.Tensor, nonfinite: torch.Tensor
) -> None:
    """Write the largest finite |h| of each row, its channel, and non-finite entries. Traced into the model's graph.

    Parameters
    ----------
    hidden, classes
        As in `accumulate`; `IGNORED` rows count as rows of nothing.
    largest
        float32, [>= tokens]; written in its first rows; -1 where nothing is finite.
    channel
        int64, [>= tokens]; the first channel that holds the largest value.
    nonfinite
        int64, [>= tokens]; number of NaN and infinite entries.
    """
    x = hidden.float()
    looked_at = (classes < IGNORED).unsqueeze(1)
    finite = torch.isfinite(x)
    found = torch.where(finite & looked_at, x.abs(), -1.0).max(dim=1)
    largest[: len(x)] = found.values
    channel[: len(x)] = found.indices
    nonfinite[: len(x)] = (~finite & looked_at).sum(dim=1)


@dataclass(frozen=True)
class ResidualReference:
    """Float64 statistics of one layer's hidden state."""

    abs_max: float
    median: float
    rms: float
    kurtosis: float
    top_abs: list[float]
    top_channel: list[int]
    massive: list[int]
    nonfinite: int


def residual_reference(hidden: torch.Tensor, classes: torch.Tensor, massive_min: float, massive_ratio: float,
                       top: int = 3) -> ResidualReference:
    """Compute the statistics from their definitions, in float64.

    The massive-activation criterion is that of Sun et al. (arXiv 2402.17762): |h| >= massive_min and
    |h| >= massive_ratio times the median of |h| over all entries. The median is exact: the mean of the two middle
    entries.
    """
    x = hidden.double()
    finite = torch.isfinite(x)
    flat = x[finite]
    magnitude = flat.abs()
    ordered = magnitude.sort().values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    threshold = max(massive_min, massive_ratio * median.item())
    centred = flat - flat.mean()
    channels = torch.where(finite, x, 0.0).abs().amax(dim=0).topk(top)
    massive = ((x.abs() >= threshold) & finite).sum(dim=1)
    return ResidualReference(
        abs_max=magnitude.max().item(),
        median=median.item(),
        rms=flat.pow(2).mean().sqrt().item(),
        kurtosis=(centred.pow(4).mean() / centred.pow(2).mean().pow(2)).item(),
        top_abs=channels.values.tolist(),
        top_channel=channels.indices.tolist(),
        massive=[int(massive[classes == c].sum()) for c in (START, DELIMITER, OTHER)],
        nonfinite=int((~finite).sum()),
    )
