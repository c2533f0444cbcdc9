"""The `gate` probe: how far the installed gates are open. Traced into the graph beside the gate itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from vllm_sluice.compat import Batch
from vllm_sluice.config import GateProbe, runtime_values
from vllm_sluice.ops.residual import IGNORED
from vllm_sluice.patches.gate import InstalledGate
from vllm_sluice.probes.base import Probe, Record, Reduction
from vllm_sluice.probes.rows import Rows
from vllm_sluice.telemetry.catalogue import layer_label
from vllm_sluice.telemetry.snapshot import Series


class GateObserver(nn.Module):
    """Accumulators of one layer: sum of gates, and counts of closed and of all gates.

    With `by_row` also the mean gate of each row of the pass, [max_tokens].
    """

    classes: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor

    def __init__(self, rows: Rows, closed_below: float, by_row: bool) -> None:
        super().__init__()
        device = rows.device
        self.by_row = by_row
        if by_row:
            self.register_buffer("means", torch.zeros(rows.max_tokens, device=device), persistent=False)
        self.closed_below = closed_below
        self.register_buffer("classes", rows.classes("gate"), persistent=False)
        self.register_buffer("sums", torch.zeros(1, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def forward(self, gate: torch.Tensor) -> None:
        """Accumulate gate values, float32, [tokens, gates]."""
        looked_at = (self.classes[: gate.shape[0]] < IGNORED).unsqueeze(1)
        self.sums.add_(torch.where(looked_at, gate, 0.0).sum().double())
        closed = ((gate < self.closed_below) & looked_at).sum()
        self.counts.add_(torch.stack([closed, looked_at.sum() * gate.shape[1]]))
        if self.by_row:
            self.means[: gate.shape[0]] = gate.mean(dim=1)


class InstalledGateProbe(Probe):
    """The installed `gate` probe of one rank; `by_row` for requests that ask for their own statistics."""

    kind = "gate"
    reductions: ClassVar[dict[str, Reduction]] = {"sums": "sum", "counts": "sum"}

    def __init__(self, settings: GateProbe, patch: InstalledGate, rows: Rows, by_row: bool = False) -> None:
        self.runtime = {}
        self.set(runtime_values(settings))
        self.layers = list(patch.layers)
        self._observers = [GateObserver(rows, settings.closed_below, by_row) for _ in self.layers]
        self._by_row = by_row
        self._gates = [len(patch.layers[layer].weight) for layer in self.layers]
        for layer, observer in zip(self.layers, self._observers, strict=True):
            patch.layers[layer].observer = observer

    def before(self, batch: Batch) -> None:
        """Nothing to prepare: the rows say what to look at."""

    def after(self, batch: Batch) -> None:
        """Nothing to add: all is done in the graph."""

    def request_record(self) -> dict[str, torch.Tensor]:
        """Make accumulators of a request: sum of row means, float64, and rows, int64, each [L]."""
        if not self._by_row:
            return {}
        layers, device = len(self.layers), self._observers[0].sums.device
        return {
            "sums": torch.zeros(layers, dtype=torch.float64, device=device),
            "rows": torch.zeros(layers, dtype=torch.int64, device=device),
        }

    def add_requests(
        self, batch: Batch, rows: Sequence[slice], records: Sequence[dict[str, torch.Tensor]]
    ) -> None:
        """Add the gates of each request's rows, those with NaN aside."""
        for own, record in zip(rows, records, strict=True):
            means = torch.stack([observer.means[own] for observer in self._observers]).double()
            finite = torch.isfinite(means)
            record["sums"] += torch.where(finite, means, 0.0).sum(dim=1)
            record["rows"] += finite.sum(dim=1)

    def request_values(self, record: Record) -> dict[int, list[float]]:
        """Return sum and number of gates by layer."""
        columns = zip(self.layers, self._gates, record["sums"].tolist(), record["rows"].tolist(), strict=True)
        return {layer: [total * gates, rows * gates] for layer, gates, total, rows in columns}

    def take(self) -> dict[str, torch.Tensor]:
        """Return and reset: sums [L, 1], counts [L, 2] (closed, all)."""
        taken = {name: torch.stack([getattr(o, name) for o in self._observers]) for name in ("sums", "counts")}
        for observer in self._observers:
            observer.sums.zero_()
            observer.counts.zero_()
        return taken

    def series(self) -> list[Series]:
        """Name the series, layer by layer."""
        return [
            Series(f"sluice_gate_{name}", (("layer", layer_label(layer)),))
            for layer in self.layers
            for name in ("mean", "closed_ratio")
        ]

    def values(self, window: Record | None, total: Record | None) -> np.ndarray:
        """Fill the series."""
        out = np.full((len(self.layers), 2), np.nan)
        if window is not None:
            closed, gates = window["counts"].T
            with np.errstate(divide="ignore", invalid="ignore"):
                out = np.column_stack([window["sums"][:, 0] / gates, closed / gates])
        out[[not self.looks_at(layer) for layer in self.layers]] = np.nan
        return out.reshape(-1)
