"""The `residual` probe: statistics of the hidden state after every decoder layer.

In the graph: largest |h| of each channel, four moments, counts (all tokens), and copies of a few sampled rows. Right
after the forward pass: the sampled rows enter a histogram, from which the median is read (error at most 1.1 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from vllm_sluice.compat import Batch
from vllm_sluice.config import ResidualProbe, runtime_values
from vllm_sluice.ops.histogram import BINS, add_to_histogram, quantile
from vllm_sluice.ops.residual import POSITION_CLASSES, accumulate, row_maxima
from vllm_sluice.probes.base import Probe, Record, Reduction
from vllm_sluice.probes.pace import Pace
from vllm_sluice.probes.rows import Rows, spread
from vllm_sluice.probes.taps import Tap, listen
from vllm_sluice.telemetry.catalogue import layer_label
from vllm_sluice.telemetry.snapshot import Series

TOP = 3
_PER_LAYER = ("abs_max", "median", "max_to_median_ratio", "rms", "kurtosis")


class ResidualObserver(nn.Module):
    """Accumulators of one layer; called in the graph with the hidden state, [tokens, hidden].

    With `by_row` also what `row_maxima` says of each row of the pass, [max_tokens].
    """

    classes: torch.Tensor
    sample: torch.Tensor
    threshold: torch.Tensor
    channel_max: torch.Tensor
    moments: torch.Tensor
    counts: torch.Tensor
    sampled: torch.Tensor
    largest: torch.Tensor
    channel: torch.Tensor
    nonfinite: torch.Tensor

    def __init__(self, hidden: int, rows: Rows, sample: torch.Tensor, dtype: torch.dtype, by_row: bool) -> None:
        super().__init__()
        device = rows.device
        self.by_row = by_row
        if by_row:
            self.register_buffer("largest", torch.zeros(rows.max_tokens, device=device), persistent=False)
            for name in ("channel", "nonfinite"):
                self.register_buffer(name, torch.zeros(rows.max_tokens, dtype=torch.int64, device=device), False)
        self.register_buffer("classes", rows.classes("residual"), persistent=False)
        self.register_buffer("sample", sample, persistent=False)
        self.register_buffer("threshold", torch.full((1,), torch.inf, device=device), persistent=False)
        self.register_buffer("channel_max", torch.zeros(hidden, device=device), persistent=False)
        self.register_buffer("moments", torch.zeros(4, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("counts", torch.zeros(6, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("sampled", torch.zeros(len(sample), hidden, dtype=dtype, device=device), persistent=False)

    def forward(self, hidden: torch.Tensor) -> None:
        """Accumulate; traced into the model's graph."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        accumulate(
            hidden, self.classes[: hidden.shape[0]], self.threshold, self.channel_max, self.moments, self.counts
        )
        self.sampled.copy_(hidden.index_select(0, self.sample))
        if self.by_row:
            row_maxima(hidden, self.classes[: hidden.shape[0]], self.largest, self.channel, self.nonfinite)


class InstalledResidual(Probe):
    """The installed `residual` probe of one rank; `by_row` for requests that ask for their own statistics."""

    kind = "residual"
    reductions: ClassVar[dict[str, Reduction]] = {
        "channel_max": "max", "moments": "sum", "counts": "sum", "histogram": "sum", "tokens": "sum",
    }  # fmt: skip

    def __init__(
        self, settings: ResidualProbe, taps: list[Tap], hidden: int, rows: Rows, dtype: torch.dtype,
        by_row: bool = False,
    ) -> None:
        device = rows.device
        self.runtime = {}
        self.set(runtime_values(settings))
        self._sampling = False
        self._steered = False
        self._settings = settings
        self.layers = [tap.layer for tap in taps]
        self._sample = torch.zeros(settings.sample_rows, dtype=torch.int64, device=device)
        self._weight = torch.zeros(settings.sample_rows, dtype=torch.int64, device=device)
        self._histogram = torch.zeros(len(taps), BINS, dtype=torch.int64, device=device)
        self._prefill = self._decode = self._starts = 0
        self._by_row = by_row
        self._observers = [ResidualObserver(hidden, rows, self._sample, dtype, by_row) for _ in taps]
        for tap, observer in zip(taps, self._observers, strict=True):
            listen(tap, observer, "sluice_residual")

    def before(self, batch: Batch) -> None:
        """Spread the sampled rows evenly over the batch, if a sample is due."""
        self._sampling = self.pace.due()
        if self._sampling:
            spread(batch.tokens, self._sample, self._weight)

    def after(self, batch: Batch) -> None:
        """Add the sampled rows to the histogram."""
        prefill = batch.prefill_tokens
        self._prefill += prefill
        self._decode += batch.tokens - prefill
        if prefill:
            self._starts += int((batch.computed == 0).sum())
        if not self._sampling:
            return
        began = self.pace.now()
        try:
            sampled = torch.stack([observer.sampled for observer in self._observers]).float().abs()
            add_to_histogram(self._histogram, sampled, self._weight)
        finally:
            self._sample.zero_()  # an index beyond the next, smaller batch would stop the model
            self.pace.sampled(began)

    def request_record(self) -> dict[str, torch.Tensor]:
        """Make accumulators of a request: largest |h|, its position and channel, non-finite entries; each [L]."""
        if not self._by_row:
            return {}
        layers, device = len(self.layers), self._sample.device
        return {
            "largest": torch.full((layers,), -1.0, device=device),
            "position": torch.zeros(layers, dtype=torch.int64, device=device),
            "channel": torch.zeros(layers, dtype=torch.int64, device=device),
            "nonfinite": torch.zeros(layers, dtype=torch.int64, device=device),
        }

    def add_requests(
        self, batch: Batch, rows: Sequence[slice], records: Sequence[dict[str, torch.Tensor]]
    ) -> None:
        """Keep the largest value of each request, layer by layer, and where it was; the first of equal ones."""
        for own, record in zip(rows, records, strict=True):
            largest = torch.stack([observer.largest[own] for observer in self._observers])
            channel = torch.stack([observer.channel[own] for observer in self._observers])
            value, row = largest.max(dim=1)
            found = {
                "largest": value,
                "position": batch.positions[own].long()[row],
                "channel": channel.gather(1, row.unsqueeze(1))[:, 0],
            }
            better = value > record["largest"]
            for name, tensor in found.items():
                record[name].copy_(torch.where(better, tensor, record[name]))
            record["nonfinite"] += torch.stack([observer.nonfinite[own].sum() for observer in self._observers])

    def request_values(self, record: Record) -> dict[int, list[float]]:
        """Return largest finite |h| (-1 if there is none), position, channel and non-finite entries by layer."""
        names = ("largest", "position", "channel", "nonfinite")
        columns = zip(self.layers, *(record[name].tolist() for name in names), strict=True)
        return {layer: numbers for layer, *numbers in columns}

    def set(self, values: Mapping[str, Any]) -> None:
        """Take `enabled`, `layers` and `interval_seconds`."""
        super().set(values)
        self.pace = Pace(self.runtime["interval_seconds"])

    def take(self) -> dict[str, torch.Tensor]:
        """Return and reset: channel_max [L, hidden], moments [L, 4], counts [L, 6], histogram [L, BINS], tokens [3].

        `tokens`: prefill, decode, and those at position 0.
        """
        taken = {
            name: torch.stack([getattr(observer, name) for observer in self._observers])
            for name in ("channel_max", "moments", "counts")
        }
        taken["histogram"] = self._histogram.clone()
        for observer in self._observers:
            observer.channel_max.zero_()
            observer.moments.zero_()
            observer.counts.zero_()
        taken["tokens"] = torch.tensor([self._prefill, self._decode, self._starts])
        self._histogram.zero_()
        self._prefill = self._decode = self._starts = 0
        return taken

    def steer(self, window: Record) -> None:
        """Set the massive-activation threshold of each layer from the window's median."""
        self._steered = True
        for observer, median in zip(self._observers, quantile(window["histogram"], 0.5).tolist(), strict=True):
            if not np.isnan(median):
                observer.threshold.fill_(max(self._settings.massive_min, self._settings.massive_ratio * median))

    def series(self) -> list[Series]:
        """Name the series: layer by layer, then the tokens looked at."""
        named = []
        for layer in self.layers:
            label = ("layer", layer_label(layer))
            named += [Series(f"sluice_activation_{name}", (label,)) for name in _PER_LAYER]
            for name in ("top_abs", "top_channel"):
                named += [
                    Series(f"sluice_activation_{name}", (label, ("rank", str(rank + 1)))) for rank in range(TOP)
                ]
            named.append(Series("sluice_nonfinite_total", (label,)))
            named += [
                Series("sluice_massive_activations_total", (label, ("position", name))) for name in POSITION_CLASSES
            ]
        named += [Series("sluice_tokens_observed_total", (("phase", p),)) for p in ("prefill", "decode")]
        return [*named, Series("sluice_start_tokens_observed_total", ())]

    def values(self, window: Record | None, total: Record | None) -> np.ndarray:
        """Fill the series."""
        layers = len(self.layers)
        out = np.full((layers, len(_PER_LAYER) + 2 * TOP + 4), np.nan)
        if window is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                out[:, : len(_PER_LAYER) + 2 * TOP] = self._window_values(window)
            out[window["counts"][:, 2] == 0] = np.nan  # nothing seen, or nothing finite
        out[[not self.looks_at(layer) for layer in self.layers]] = np.nan
        counts = np.zeros((layers, 6)) if total is None else total["counts"]
        out[:, -4] = counts[:, 1]
        if self._steered:  # until the thresholds are known nothing is counted, which is not the same as none
            out[:, -3:] = counts[:, 3:6]
        tokens = np.zeros(3) if total is None else total["tokens"]
        return np.concatenate([out.reshape(-1), tokens])

    def _window_values(self, window: Record) -> np.ndarray:
        channel_max = window["channel_max"].astype(np.float64)
        median = quantile(window["histogram"], 0.5)
        mean, second, third, fourth = (window["moments"] / window["counts"][:, 2:3]).T
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        largest = channel_max.max(axis=1)
        top = np.argsort(-channel_max, axis=1, kind="stable")[:, :TOP]
        return np.column_stack(
            [
                largest,
                median,
                largest / median,
                np.sqrt(second),
                central / variance**2,
                np.take_along_axis(channel_max, top, axis=1),
                top.astype(np.float64),
            ]
        )
