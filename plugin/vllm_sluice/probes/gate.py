"""The `gate` probe: how far the installed gates are open. Traced into the graph beside the gate itself."""

from __future__ import annotations

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
    """Accumulators of one layer: sum of gates, and counts of closed and of all gates."""

    classes: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor

    def __init__(self, rows: Rows, closed_below: float) -> None:
        super().__init__()
        device = rows.device
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


class InstalledGateProbe(Probe):
    """The installed `gate` probe of one rank."""

    kind = "gate"
    reductions: ClassVar[dict[str, Reduction]] = {"sums": "sum", "counts": "sum"}

    def __init__(self, settings: GateProbe, patch: InstalledGate, rows: Rows) -> None:
        self.runtime = {}
        self.set(runtime_values(settings))
        self.layers = list(patch.layers)
        self._observers = [GateObserver(rows, settings.closed_below) for _ in self.layers]
        for layer, observer in zip(self.layers, self._observers, strict=True):
            patch.layers[layer].observer = observer

    def before(self, batch: Batch) -> None:
        """Nothing to prepare: the rows say what to look at."""

    def after(self, batch: Batch) -> None:
        """Nothing to add: all is done in the graph."""

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
        return out.reshape(-1)
