"""When a probe samples."""

from __future__ import annotations

from vllm_sluice.probes.pace import MOST_SHARE, Pace


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_pass_in_an_interval_is_sampled():
    clock = Clock()
    pace = Pace(0.25, clock)
    assert pace.due()
    pace.sampled(clock.now)
    clock.now += 0.24
    assert not pace.due()
    clock.now += 0.02
    assert pace.due()


def test_slow_sampling_becomes_rare_enough_to_keep_its_share():
    clock = Clock()
    pace = Pace(0.25, clock)
    start, spent = clock.now, 0.0
    while clock.now < start + 1000:
        if pace.due():
            began = clock.now
            clock.now += 0.1
            spent += 0.1
            pace.sampled(began)
        clock.now += 0.01
    assert 0.9 * MOST_SHARE < spent / (clock.now - start) <= MOST_SHARE


def test_an_interval_of_zero_samples_every_pass_whatever_it_costs():
    clock = Clock()
    pace = Pace(0.0, clock)
    for _ in range(3):
        assert pace.due()
        began = clock.now
        clock.now += 5.0
        pace.sampled(began)
    assert pace.due()
