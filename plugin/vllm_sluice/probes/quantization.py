"""The `quantization` probe: how much of what goes into the matrix products would survive INT8 and FP8.

In the graph, for every site of every layer: largest |x|, entries beyond the baseline's static range (all tokens), and
copies of a few sampled rows. Right after a sampled forward pass those rows are quantized and compared; signal and
noise add up, and the window's ratio is exported in dB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from vllm_sluice.compat import Batch
from vllm_sluice.config import QuantizationProbe, Site, runtime_values
from vllm_sluice.ops.quantization import LARGEST, PAIRS, energies, observe
from vllm_sluice.probes.base import Probe, Record, Reduction
from vllm_sluice.probes.pace import Pace
from vllm_sluice.probes.rows import Rows, spread
from vllm_sluice.probes.taps import Input, Taps, listen, listen_to_input
from vllm_sluice.telemetry.baseline import Section
from vllm_sluice.telemetry.catalogue import QUANTIZED_PAIRS, layer_label
from vllm_sluice.telemetry.snapshot import Series

_HEADROOMS = QUANTIZED_PAIRS["sluice_quantization_headroom_ratio"]
_ENTRIES_AT_ONCE = 4 << 20
"""Sampled entries that are quantized together: bounds the memory that vLLM's profiling run does not see."""


class SiteObserver(nn.Module):
    """Accumulators of one site; called in the graph with what is there, [tokens, width]."""

    classes: torch.Tensor
    sample: torch.Tensor
    limit: torch.Tensor
    peak: torch.Tensor
    counts: torch.Tensor
    sampled: torch.Tensor

    def __init__(self, width: int, rows: Rows, sample: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        device = rows.device
        self.register_buffer("classes", rows.classes("quantization"), persistent=False)
        self.register_buffer("sample", sample, persistent=False)
        self.register_buffer("limit", torch.full((1,), torch.inf, device=device), persistent=False)
        self.register_buffer("peak", torch.zeros(1, device=device), persistent=False)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("sampled", torch.zeros(len(sample), width, dtype=dtype, device=device), persistent=False)

    def forward(self, x: torch.Tensor) -> None:
        """Accumulate; traced into the model's graph."""
        x = x.reshape(-1, x.shape[-1])
        observe(x, self.classes[: x.shape[0]], self.limit, self.peak, self.counts)
        self.sampled.copy_(x.index_select(0, self.sample))


@dataclass(frozen=True)
class _Place:
    layer: int
    site: Site
    observer: SiteObserver


class InstalledQuantization(Probe):
    """The installed `quantization` probe of one rank."""

    kind = "quantization"
    reductions: ClassVar[dict[str, Reduction]] = {"peak": "max", "counts": "sum", "energies": "sum"}

    def __init__(
        self, settings: QuantizationProbe, taps: Taps, hidden: int, rows: Rows, dtype: torch.dtype
    ) -> None:
        device = rows.device
        self.runtime = {}
        self.set(runtime_values(settings))
        self._dtype_max = torch.finfo(dtype).max
        self._sampling = False
        self._sample = torch.zeros(settings.sample_rows, dtype=torch.int64, device=device)
        self._looked_at = torch.zeros(settings.sample_rows, dtype=torch.bool, device=device)
        self._places: list[_Place] = []

        def observer(layer: int, site: Site, width: int) -> SiteObserver:
            made = SiteObserver(width, rows, self._sample, dtype)
            self._places.append(_Place(layer, site, made))
            return made

        if "hidden" in settings.sites:
            for tap in taps.hidden:
                listen(tap, observer(tap.layer, "hidden", hidden), "sluice_quantization_hidden")
        inputs: dict[Site, list[Input]] = {"attention_input": taps.attention_inputs, "mlp_input": taps.mlp_inputs}
        for site in [site for site in inputs if site in settings.sites]:
            for entry in inputs[site]:
                listen_to_input(entry, observer(entry.layer, site, entry.width), f"sluice_quantization_{site}")
        self._places.sort(key=lambda place: place.layer)
        self.layers = sorted({place.layer for place in self._places})
        self._limits = np.full(len(self._places), np.inf)
        self._energies = torch.zeros(len(self._places), len(PAIRS), 2, dtype=torch.float64, device=device)

    def before(self, batch: Batch) -> None:
        """Spread the sampled rows evenly over the batch, if a sample is due."""
        self._sampling = self.pace.due()
        if self._sampling:
            spread(batch.tokens, self._sample, self._looked_at)

    def after(self, batch: Batch) -> None:
        """Quantize the sampled rows and add up signal and noise."""
        if not self._sampling:
            return
        began = self.pace.now()
        try:
            for first, last in self._groups():
                observers = [place.observer for place in self._places[first:last]]
                sampled = torch.stack([observer.sampled for observer in observers])
                limits = torch.cat([observer.limit for observer in observers])
                self._energies[first:last] += energies(sampled, self._looked_at, limits)
        finally:
            self._sample.zero_()  # an index beyond the next, smaller batch would stop the model
            self.pace.sampled(began)

    def _groups(self) -> list[tuple[int, int]]:
        """Cut the places into runs of equal width and bounded size."""
        groups: list[tuple[int, int]] = []
        for index, place in enumerate(self._places):
            shape = place.observer.sampled.shape
            if groups:
                first = groups[-1][0]
                fits = (index - first + 1) * shape.numel() <= _ENTRIES_AT_ONCE
                if fits and self._places[first].observer.sampled.shape == shape:
                    groups[-1] = (first, index + 1)
                    continue
            groups.append((index, index + 1))
        return groups

    def set(self, values: Mapping[str, Any]) -> None:
        """Take `enabled`, `layers` and `interval_seconds`."""
        super().set(values)
        self.pace = Pace(self.runtime["interval_seconds"])

    def calibrate(self, section: Section | None) -> None:
        """Take the ends of the static ranges from a baseline; without one nothing is static."""
        for index, place in enumerate(self._places):
            layer = section.layers.get(layer_label(place.layer)) if section else None
            limit = layer.sites.get(place.site) if layer else None
            self._limits[index] = np.inf if limit is None else limit
            place.observer.limit.fill_(float(self._limits[index]))

    def take(self) -> dict[str, torch.Tensor]:
        """Return and reset, for the P places: peak [P, 1], counts [P, 2], energies [P, pairs, 2]."""
        observers = [place.observer for place in self._places]
        taken = {name: torch.stack([getattr(o, name) for o in observers]) for name in ("peak", "counts")}
        taken["energies"] = self._energies.clone()
        for observer in observers:
            observer.peak.zero_()
            observer.counts.zero_()
        self._energies.zero_()
        return taken

    def series(self) -> list[Series]:
        """Name the series, place by place: headrooms, signal-to-noise ratios, counters."""
        named = []
        for place in self._places:
            where = (("layer", layer_label(place.layer)), ("site", place.site))
            for name, pairs in (("headroom_ratio", _HEADROOMS), ("snr_decibels", PAIRS)):
                for number_format, scale in pairs:
                    labels = (*where, ("format", number_format), ("scale", scale))
                    named.append(Series(f"sluice_quantization_{name}", labels))
            named += [Series(f"sluice_quantization_{name}_total", where) for name in ("elements", "clipped")]
        return named

    def values(self, window: Record | None, total: Record | None) -> np.ndarray:
        """Fill the series.

        Left out are ratios of a window without entries or with zeros only, what needs a baseline while there is none,
        and the signal-to-noise ratio of values that the format holds exactly.
        """
        places = len(self._places)
        static = np.where(np.isfinite(self._limits), self._limits, np.nan)
        headroom, snr = np.full((places, len(_HEADROOMS)), np.nan), np.full((places, len(PAIRS)), np.nan)
        if window is not None:
            peak = np.where(window["peak"][:, 0] > 0, window["peak"][:, 0], np.nan).astype(np.float64)
            fixed = np.full(places, 1.0)
            headroom = np.column_stack([fixed * self._dtype_max, fixed * LARGEST["fp8_e4m3"], static, static])
            headroom /= peak[:, None]
            signal, noise = np.where(window["energies"] > 0, window["energies"], np.nan).transpose(2, 0, 1)
            snr = 10 * np.log10(signal / noise)
            snr[:, [scale == "static" for _, scale in PAIRS]] += 0 * static[:, None]  # NaN where there is no range now
        counts = np.zeros((places, 2)) if total is None else total["counts"].astype(np.float64)
        counts[:, 1] += 0 * static  # not compared with anything is not the same as none clipped
        hidden = [not self.looks_at(place.layer) for place in self._places]
        headroom[hidden], snr[hidden] = np.nan, np.nan
        return np.column_stack([headroom, snr, counts]).reshape(-1)
