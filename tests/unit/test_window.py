"""The sliding window: maxima fall, nothing is lost, totals stay."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_sluice.probes.window import Window


class FakeProbe:
    """Only what a window asks of a probe."""

    reductions: ClassVar = {"peak": "max", "count": "sum"}


def record(peak: float, count: int) -> dict[str, np.ndarray]:
    return {"peak": np.array([peak]), "count": np.array([count])}


def test_a_maximum_falls_when_its_slot_leaves_the_window():
    window = Window(FakeProbe, 60.0)
    window.add(record(100.0, 1), now=0.0)
    for second in range(1, 60):
        window.add(record(1.0, 1), now=float(second))
    assert window.current(59.0)["peak"] == 100.0
    window.add(record(2.0, 1), now=70.0)
    assert window.current(70.0)["peak"] == 2.0
    assert window.total["peak"] == 100.0
    assert window.total["count"] == 61


def test_an_idle_window_has_nothing_to_say():
    window = Window(FakeProbe, 10.0)
    assert window.current(0.0) is None
    window.add(record(1.0, 1), now=0.0)
    assert window.current(5.0) is not None
    assert window.current(11.0) is None
    assert window.total["count"] == 1


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1e6), st.integers(0, 100)), min_size=1, max_size=80))
def test_a_window_covers_at_least_its_length_and_at_most_a_slot_more(steps):
    window = Window(FakeProbe, 12.0)
    now, seen = 0.0, []
    for wait, peak, count in steps:
        now += wait
        window.add(record(peak, count), now)
        seen.append((now, peak, count))
        found = window.current(now)
        inside = [s for s in seen if s[0] >= now - 11.0]  # a slot is a twelfth: 1 s
        longest = [s for s in seen if s[0] >= now - 13.0]
        assert sum(s[2] for s in inside) <= found["count"][0] <= sum(s[2] for s in longest)
        assert max(s[1] for s in inside) <= found["peak"][0] <= max(s[1] for s in longest)
