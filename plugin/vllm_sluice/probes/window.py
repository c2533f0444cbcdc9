"""A sliding window over records, in a dozen slots, so that maxima can fall without a reset on scrape."""

from __future__ import annotations

from collections import deque

from vllm_sluice.probes.base import Probe, Record, combine

_SLOTS = 12


class Window:
    """Combines a probe's records over the last `seconds`, give or take a slot (a twelfth), and since the start."""

    def __init__(self, probe: type[Probe], seconds: float) -> None:
        self._probe = probe
        self._seconds = seconds
        self._slots: deque[tuple[float, Record]] = deque()
        self.total: Record | None = None

    def add(self, record: Record, now: float) -> None:
        """Add a record taken at `now` (seconds, monotonic)."""
        self.total = record if self.total is None else combine(self._probe, self.total, record)
        if self._slots and now - self._slots[-1][0] < self._seconds / _SLOTS:
            began, last = self._slots[-1]
            self._slots[-1] = (began, combine(self._probe, last, record))
        else:
            self._slots.append((now, record))

    def current(self, now: float) -> Record | None:
        """Return the combination of the records of the last window, or None if there are none."""
        while self._slots and now - self._slots[0][0] > self._seconds:
            self._slots.popleft()
        combined: Record | None = None
        for _, record in self._slots:
            combined = record if combined is None else combine(self._probe, combined, record)
        return combined
