"""A bounded list of points: all of the last ones, and of the older ones one in so many."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

RECENT_POINTS = 450
OLDER_POINTS = 720

T = TypeVar("T")


@dataclass(frozen=True)
class Resolution:
    """How many points are kept, and how far they are apart.

    Attributes
    ----------
    period
        Seconds between two points.
    recent
        Newest points, all kept.
    older
        Points kept of the time before, `stride` periods apart.
    """

    period: float
    recent: int
    older: int
    stride: int

    @classmethod
    def of(cls, history: float, period: float) -> Resolution:
        """Return what covers `history` seconds in at most `RECENT_POINTS + OLDER_POINTS` points and a few."""
        length = max(2, math.ceil(history / period))
        recent = min(length, RECENT_POINTS)
        stride = thinned(length - recent, OLDER_POINTS)
        return cls(period, recent, math.ceil((length - recent) / stride), stride)

    def begins(self, time: float, before: float, step: int) -> bool:
        """Tell whether a point is the first of its stretch of `step` periods, given the one before it.

        Stretches begin at fixed times, so that a reader who asks again and again gets the same points, and so that
        two API servers choose alike.
        """
        length = self.period * step
        return time // length != before // length


def thinned(count: int, most: int) -> int:
    """Return the smallest power of two that leaves at most `most` of `count` points."""
    step = 1
    while count > most * step:
        step *= 2
    return step


class Column(Generic[T]):
    """What one thing was at every point; a column that began later is shorter and ends at the same point."""

    def __init__(self, resolution: Resolution) -> None:
        self._recent: deque[T] = deque()
        self._room = resolution.recent
        self._older: deque[T] = deque(maxlen=resolution.older)

    def append(self, value: T, keep: bool) -> None:
        """Add a point; the oldest of the recent ones goes, or if `keep` joins the older ones."""
        if self._recent and self._recent[-1] == value:
            value = self._recent[-1]  # one object for what stays the same
        self._recent.append(value)
        if len(self._recent) > self._room:
            gone = self._recent.popleft()
            if keep:
                self._older.append(gone)

    def values(self) -> list[T]:
        """Return all points, the oldest first."""
        return [*self._older, *self._recent]

    @property
    def next_out(self) -> T | None:
        """The recent point that goes when the next one comes; None while there is room."""
        return self._recent[0] if len(self._recent) == self._room else None

    @property
    def last_older(self) -> T | None:
        """The newest of the older points."""
        return self._older[-1] if self._older else None
