"""The recent past of every engine as ready-made JSON: dense for the last minutes, thinner for the hours before.

A point is encoded once, when it is recorded. An answer then only joins text, so that a large history does not hold
the interpreter's lock of the API server for long.
"""

from __future__ import annotations

import json
import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sluice.config import Live
from vllm_sluice.live import encode
from vllm_sluice.live.column import Column, Resolution
from vllm_sluice.live.encode import ABSENT, array, number, record
from vllm_sluice.live.point import LAYER_METRICS, LAYERED, Point, by_engine, has_past
from vllm_sluice.telemetry.collector import SnapshotCollector

MOST_SWITCHES = 500
"""Switches remembered for each engine."""

_EMPTY = "[]"
_BASELINE = "baseline_"
_PLAIN = [kept.metric for kept in LAYERED if not kept.by and not kept.metric.startswith(_BASELINE)]
_COUNTED = "_total"


@dataclass
class _Engine:
    """The past of one engine.

    Attributes
    ----------
    layers
        Layer labels in the order in which they were first seen; a row names its values by this order and may be
        shorter than it.
    rows
        One JSON list per point, by row of `Point.layered`.
    series
        One JSON number per point, by metric and label.
    latest
        One JSON list, of the last point, by row.
    patches
        At the last point: whether the patch was enabled, and when it was last changed.
    switches
        The time of the point that showed a switch, and the switch as JSON.
    """

    model_name: str = ""
    info: dict[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    rows: dict[str, Column[str]] = field(default_factory=dict)
    series: dict[tuple[str, str], Column[str]] = field(default_factory=dict)
    latest: dict[str, str] = field(default_factory=dict)
    patches: dict[str, tuple[bool, float]] = field(default_factory=dict)
    switches: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MOST_SWITCHES))
    seen: float = 0.0


class History:
    """Keeps `history_seconds`; safe to use from several threads.

    All points of the last 450 periods are kept, and of the time before at most 720, evenly. A statistic of the
    sliding window loses no maximum by that as long as two points are less than a window apart, which is 16 s for the
    default settings; switches of patches are kept apart and lose nothing.

    Parameters
    ----------
    collector
        Where the samples come from.
    settings
        Length of the history and time between two points.
    interval_seconds
        Time between two snapshots of a rank (`telemetry.interval_seconds`); a rank is called stale after three
        missing ones, and never before ten seconds.
    clock
        Seconds since the epoch.
    """

    def __init__(
        self,
        collector: SnapshotCollector,
        settings: Live,
        interval_seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self._collector = collector
        self._stale_after = max(10.0, 3 * interval_seconds)
        self._clock = clock
        self._resolution = Resolution.of(settings.history_seconds, settings.period_seconds)
        self._times: Column[float] = Column(self._resolution)
        self._engines: dict[str, _Engine] = {}
        self._lock = threading.Lock()

    def record(self) -> None:
        """Take one point."""
        points = by_engine(self._collector.samples())
        now = round(self._clock(), 2)
        with self._lock:
            times = self._times.values()
            if times and now <= times[-1]:
                # The clock was set back: older points would lie in the future.
                self._times = Column(self._resolution)
                self._engines.clear()
                times = []
            keep = self._keeps()
            self._times.append(now, keep)
            for name in points.keys() - self._engines.keys():
                self._engines[name] = _Engine()
            for name, engine in list(self._engines.items()):
                self._append(engine, points.get(name), now, times[-1] if times else now, keep)
                if engine.seen < (times[0] if times else now):
                    del self._engines[name]

    def as_json(
        self,
        since: float | None = None,
        points: int | None = None,
        engine: str | None = None,
        metrics: Collection[str] = LAYER_METRICS,
        step: int = 1,
        span: float | None = None,
    ) -> str:
        """Return points as JSON text.

        Parameters
        ----------
        since
            Only points after this time, in seconds since the epoch; negative counts back from now. Default: all.
        points
            Thin out evenly to at most this many points; the last one is always among them.
        engine
            Only this engine; without it, or if there is no such engine, all.
        metrics
            Metrics whose past is wanted, with all their rows, or single rows; the last point always has all.
        step
            Thin out to one point in this many periods at least, and the last one. With the answer's `step` a reader
            goes on where it stopped.
        span
            Also return by how much the counters rose in the last so many seconds.

        Returns
        -------
        str
            `times` (seconds since the epoch), `step` and `spacing_seconds` (points are at most so far apart, unless
            one was missed), `provisional` (true if the last point is here for being the last, not for the step),
            `names` and `models` of all engines, and per engine

            - `layers`, which name the values of every row, and `kept`, the names of all rows that have a past;
            - `rows` ([point][layer] by row), `series` ([point] by metric and label);
            - `latest` and `baseline` ([layer] by row), of the last point;
            - `switches` ([time, patch, enabled, generation or null]);
            - for a span `increase`: `seconds`, `rows` ([layer] by row) and `series` (by metric and label).

            Absent is null, a row may end early, infinity is `1e999`. Metrics are named as in the catalogue, without
            `sluice_`; a row of a metric that is kept by a label is `metric:label`.
        """
        now = self._clock()
        with self._lock:
            times = self._times.values()
            begin = -math.inf if since is None else since if since >= 0 else now + since
            first = bisect_right(times, begin)
            chosen = self._choose(times, first, points, step)
            spanned = range(bisect_left(times, now - span), len(times)) if span is not None else None
            names = sorted(self._engines, key=lambda name: (len(name), name))
            wanted = [engine] if engine in self._engines else names
            engines = [
                _engine_json(name, self._engines[name], metrics, times, chosen.indices, begin, spanned)
                for name in wanted
            ]
            models = {name: encode.text(self._engines[name].model_name) for name in names}
        older = bool(times) and self._resolution.older and first < len(times) - self._resolution.recent
        spacing = max(chosen.step, self._resolution.stride if older else 1) * self.settings.period_seconds
        return record(
            time=f"{now:.2f}",
            period_seconds=number(self.settings.period_seconds),
            history_seconds=number(self.settings.history_seconds),
            stale_after_seconds=number(self._stale_after),
            step=str(chosen.step),
            spacing_seconds=number(spacing),
            provisional=json.dumps(chosen.provisional),
            times=array(f"{times[i]:.2f}" for i in chosen.indices),
            names=array(map(encode.text, names)),
            models=record(**models),
            engines=array(engines),
        )

    def _keeps(self) -> bool:
        """Tell whether the recent point that goes next is kept among the older ones."""
        gone, before = self._times.next_out, self._times.last_older
        return gone is not None and (before is None or self._resolution.begins(gone, before, self._resolution.stride))

    def _choose(self, times: Sequence[float], first: int, points: int | None, step: int) -> _Choice:
        last = len(times) - 1
        while True:
            grid = [i for i in range(first, len(times)) if step == 1 or i == 0 or self._begins(times, i, step)]
            provisional = first <= last and last not in grid[-1:]
            if points is None or len(grid) + provisional <= points or step > len(times):
                return _Choice([*grid, last] if provisional else grid, step, provisional)
            step *= 2

    def _begins(self, times: Sequence[float], i: int, step: int) -> bool:
        return self._resolution.begins(times[i], times[i - 1], step)

    def _append(self, engine: _Engine, point: Point | None, now: float, before: float, keep: bool) -> None:
        if point is not None:
            engine.seen = now
            engine.model_name = point.model_name
            engine.info = {key: ", ".join(sorted(values)) for key, values in point.info.items()}
            seen = set(engine.layers)
            engine.layers += sorted({layer for row in point.layered.values() for layer in row} - seen)
            for name in filter(has_past, point.layered.keys() - engine.rows.keys()):
                engine.rows[name] = Column(self._resolution)
            for key in point.series.keys() - engine.series.keys():
                engine.series[key] = Column(self._resolution)
            _note_switches(engine, point, now, before)
        layered = point.layered if point else {}
        series = point.series if point else {}
        for key, values in list(engine.series.items()):
            values.append(number(series[key], key[0]) if key in series else ABSENT, keep)
            if key not in series and all(value is ABSENT for value in values.values()):
                del engine.series[key]
        engine.latest = {name: _row(row, engine.layers) for name, row in layered.items()}
        for name, rows in list(engine.rows.items()):
            rows.append(engine.latest.get(name, _EMPTY), keep)
            if name not in layered and all(row is _EMPTY for row in rows.values()):
                del engine.rows[name]


@dataclass(frozen=True)
class _Choice:
    indices: list[int]
    step: int
    provisional: bool


def _note_switches(engine: _Engine, point: Point, now: float, before: float) -> None:
    """Remember the patches that were switched since the last point, with the patch's own time where it tells one."""
    applied = [int(v) for (metric, label), v in point.series.items() if metric == "generation" and ":applied" in label]
    generation = str(max(applied)) if applied else ABSENT
    for (metric, patch), value in point.series.items():
        if metric != "patch_enabled":
            continue
        enabled = value > 0
        changed = point.series.get(("patch_last_change_timestamp_seconds", patch), 0.0)
        known = engine.patches.get(patch)
        engine.patches[patch] = enabled, changed
        if known is None or (enabled == known[0] and changed <= known[1]):
            continue
        at = min(changed, now) if changed > known[1] else now
        # A point after the patch's own time may still show the old state: the snapshot was older. In the order of
        # time, with the points' two digits, the switch comes after it.
        at = max(at, before)
        text = array((f"{at:.2f}", encode.text(patch), json.dumps(enabled), generation))
        engine.switches.append((now, text))


def _engine_json(
    name: str,
    engine: _Engine,
    metrics: Collection[str],
    times: Sequence[float],
    chosen: Sequence[int],
    begin: float,
    spanned: range | None,
) -> str:
    total = len(times)
    series: dict[str, dict[str, str]] = {}
    for (metric, label), values in sorted(engine.series.items()):
        series.setdefault(metric, {})[label] = _cells(values, chosen, total, ABSENT)
    rows = {row: column for row, column in engine.rows.items() if row in metrics or row.split(":")[0] in metrics}
    # A metric that is known, but was never seen, is there with empty rows.
    missing = {metric for metric in metrics if metric in LAYER_METRICS} - rows.keys()
    increase = {} if spanned is None else {"increase": _increase(engine, times, spanned)}
    return record(
        engine=encode.text(name),
        model_name=encode.text(engine.model_name),
        info=record(**{key: encode.text(value) for key, value in engine.info.items()}),
        layers=array(map(encode.text, engine.layers)),
        kept=array(map(encode.text, sorted(engine.rows))),
        rows=record(
            **{row: _cells(column, chosen, total, _EMPTY) for row, column in rows.items()},
            **{metric: array(_EMPTY for _ in chosen) for metric in missing},
        ),
        series=record(**{metric: record(**labels) for metric, labels in series.items()}),
        latest=_latest(engine),
        baseline=record(**{row: text for row, text in engine.latest.items() if row.startswith(_BASELINE)}),
        switches=array(text for noted, text in engine.switches if noted > begin and noted >= times[0]),
        **increase,
    )


def _latest(engine: _Engine) -> str:
    """Return the last point. Readers tell an idle engine by it, so it holds windows and plain counters alone."""
    shown = {
        row: text
        for row, text in engine.latest.items()
        if not row.startswith(_BASELINE) and not (":" in row and row.split(":")[0].endswith(_COUNTED))
    }
    return record(**{**dict.fromkeys(_PLAIN, _EMPTY), **shown})


def _cells(column: Column[str], chosen: Sequence[int], total: int, absent: str) -> str:
    cells = column.values()
    missing = total - len(cells)
    return array(cells[i - missing] if i >= missing else absent for i in chosen)


def _increase(engine: _Engine, times: Sequence[float], spanned: range) -> str:
    """Return by how much each counter rose over the points of a span, per layer where it is kept by layer."""
    rows: dict[str, str] = {}
    series: dict[str, dict[str, str]] = {}
    for name, column in engine.rows.items():
        if name.split(":")[0].endswith(_COUNTED):
            first, last = (json.loads(text) for text in _ends(column, len(times), spanned, _EMPTY))
            first += [None] * (len(last) - len(first))
            rows[name] = array(_rise(*pair) for pair in zip(first, last, strict=False))
    for (metric, label), column in sorted(engine.series.items()):
        if metric.endswith(_COUNTED):
            first, last = (json.loads(text) for text in _ends(column, len(times), spanned, ABSENT))
            series.setdefault(metric, {})[label] = _rise(first, last)
    seconds = times[-1] - times[spanned.start] if spanned else 0.0
    return record(
        seconds=f"{seconds:.2f}",
        rows=record(**rows),
        series=record(**{metric: record(**labels) for metric, labels in series.items()}),
    )


def _ends(column: Column[str], total: int, spanned: range, absent: str) -> tuple[str, str]:
    cells = column.values()
    start = max(0, spanned.start - (total - len(cells)))
    return (cells[start], cells[-1]) if start < len(cells) else (absent, absent)


def _rise(first: Any, last: Any) -> str:
    """Return the rise of a counter; one that fell began anew."""
    if last is None:
        return ABSENT
    return number(float(last if first is None or first > last else last - first))


def _row(values: Mapping[str, float], layers: Sequence[str]) -> str:
    if not values:
        return _EMPTY
    return array(number(values[layer]) if layer in values else ABSENT for layer in layers)
