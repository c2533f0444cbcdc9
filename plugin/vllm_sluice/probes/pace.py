"""When a probe samples a forward pass, so that what it costs is bounded by the clock and not by the traffic."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_SHARE = 0.02
"""Largest share of the wall time that sampling may take, as far as the host sees it."""


class Pace:
    """At most one sampled pass in `interval` seconds, and rarer where sampling takes long; 0 samples every pass."""

    def __init__(self, interval: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.interval = interval
        self._clock = clock
        self._next = clock()

    def due(self) -> bool:
        """Tell whether the coming pass is to be sampled."""
        return self._clock() >= self._next or self.interval == 0

    def sampled(self, began: float) -> None:
        """Say that sampling a pass took from `began`, on the same clock, until now."""
        now = self._clock()
        self._next = now + max(self.interval, (now - began) * (1 / MOST_SHARE - 1))

    def now(self) -> float:
        """Read the clock."""
        return self._clock()
