"""Histogram of magnitudes with logarithmic bins, from which a quantile is read with a bounded relative error."""

from __future__ import annotations

import numpy as np
import torch

BINS_PER_OCTAVE = 32
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -24, 24
BINS = BINS_PER_OCTAVE * (_HIGHEST_OCTAVE - _LOWEST_OCTAVE)
QUANTILE_ERROR = 2 ** (1 / (2 * BINS_PER_OCTAVE)) - 1
"""Relative error of a quantile at most: half a bin, 1.09 %; for magnitudes within 2^-24..2^24."""


def add_to_histogram(histogram: torch.Tensor, magnitudes: torch.Tensor, rows: torch.Tensor) -> None:
    """Add magnitudes to histograms in place, without a host synchronisation.

    Parameters
    ----------
    histogram
        Counts, int64, [layers, BINS].
    magnitudes
        Non-negative values, [layers, sampled rows, hidden]; values outside the range go to the outer bins.
    rows
        1 for rows to count and 0 for rows to leave out, int64, [sampled rows]. Non-finite values are left out.
    """
    finite = torch.isfinite(magnitudes)
    octave = torch.log2(magnitudes.float().clamp_min(2.0**_LOWEST_OCTAVE))
    octave = torch.where(finite, octave, 0.0)
    bins = ((octave - _LOWEST_OCTAVE) * BINS_PER_OCTAVE).floor().long().clamp_(0, BINS - 1)
    weights = (finite * rows.view(1, -1, 1)).long()
    histogram.scatter_add_(1, bins.flatten(1), weights.flatten(1))


def quantile(histogram: np.ndarray, share: float) -> np.ndarray:
    """Read a quantile.

    Parameters
    ----------
    histogram
        Counts, [layers, BINS].
    share
        0..1; 0.5 is the median.

    Returns
    -------
    numpy.ndarray
        Geometric middle of the bin that holds the quantile, float64, [layers]; NaN for an empty histogram.
    """
    cumulative = histogram.cumsum(axis=1)
    total = cumulative[:, -1]
    rank = np.ceil(share * total).clip(1)
    index = (cumulative < rank[:, None]).sum(axis=1)
    middle = 2.0 ** (_LOWEST_OCTAVE + (index + 0.5) / BINS_PER_OCTAVE)
    return np.where(total > 0, middle, np.nan)
