"""What a probe is: device accumulators, a way to take them, and a way to turn a window of them into values.

A probe's accumulators are named tensors. `take` hands them out and resets them; over time the records are combined
by the reduction that the probe declares for each name. Nothing between two takes waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from vllm_sluice.compat import Batch
from vllm_sluice.telemetry.baseline import Section
from vllm_sluice.telemetry.snapshot import Series

Reduction = Literal["max", "sum"]
Record = Mapping[str, np.ndarray]


class Probe(ABC):
    """One installed probe on one rank."""

    kind: ClassVar[str]
    reductions: ClassVar[Mapping[str, Reduction]]
    """How two values of an accumulator become one, by name."""
    enabled: bool
    runtime: dict[str, Any]
    """Run-time values, as configured or last set."""
    layers: list[int]
    """Decoder layers that the probe sees on this rank."""

    @abstractmethod
    def before(self, batch: Batch) -> None:
        """Tell the device which rows of the coming pass to look at. Must not wait for the device."""

    @abstractmethod
    def after(self, batch: Batch) -> None:
        """Do the work that follows the forward pass, on the same stream. Must not wait for the device."""

    @abstractmethod
    def take(self) -> dict[str, torch.Tensor]:
        """Return copies of the accumulators and reset them, in stream order."""

    @abstractmethod
    def series(self) -> list[Series]:
        """Name the series that `values` fills, in its order."""

    @abstractmethod
    def values(self, window: Record | None, total: Record | None) -> np.ndarray:
        """Turn records into exported values.

        Parameters
        ----------
        window
            Combination of the records in the sliding window, None if it saw nothing.
        total
            Combination of all records since the start, None before the first.

        Returns
        -------
        numpy.ndarray
            float64, [series]; NaN where there is nothing to report.
        """

    def request_record(self) -> dict[str, torch.Tensor]:
        """Make accumulators for one request that asks for its own statistics; empty if the probe has none for it."""
        return {}

    def before_requests(self, batch: Batch, rows: Sequence[slice]) -> None:  # noqa: B027 - most have nothing to choose
        """Get ready for requests in the coming pass that ask, `rows` of the batch each; after `before`."""

    def add_requests(  # noqa: B027 - a probe without request_record has nothing to add
        self, batch: Batch, rows: Sequence[slice], records: Sequence[dict[str, torch.Tensor]]
    ) -> None:
        """Add what the pass showed of each asking request to its record. Must not wait for the device."""

    def request_values(self, record: Record) -> dict[int, list[float]]:
        """Turn a request's record into plain numbers by layer, which `telemetry.request_summary` puts together."""
        return {}

    def looks_at(self, layer: int) -> bool:
        """Tell whether a decoder layer is among those whose statistics of the window are reported.

        Counters go on in any case: one that comes back after a while would look like a sudden rise.
        """
        return self.runtime["layers"] == "all" or layer in self.runtime["layers"]

    def set(self, values: Mapping[str, Any]) -> None:
        """Take run-time values: `enabled` and the kind's own."""
        self.runtime |= values
        self.enabled = bool(self.runtime["enabled"])

    def calibrate(self, section: Section | None) -> None:  # noqa: B027 - most probes compare with nothing
        """Take the limits that a baseline recorded for the patch state now in force; None: there is none."""

    def steer(self, window: Record) -> None:  # noqa: B027 - most probes need no feedback
        """Adjust the device's thresholds to what the window says."""


def combine(probe: type[Probe], first: Record, second: Record) -> dict[str, np.ndarray]:
    """Combine two records of a probe, name by name."""
    return {
        name: np.maximum(first[name], second[name]) if how == "max" else first[name] + second[name]
        for name, how in probe.reductions.items()
    }
