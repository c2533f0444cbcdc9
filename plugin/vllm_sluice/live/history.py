"""The recent past of every engine: a ring buffer of points, kept as ready-made JSON.

A point is encoded once, when it is recorded. An answer then only joins text, so that a large history does not hold
the interpreter's lock of the API server for long.
"""

from __future__ import annotations

import json
import math
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_sluice.config import Live
from vllm_sluice.telemetry.collector import Sample, SnapshotCollector

_PREFIX = "sluice_"

LAYER_METRICS = (
    "activation_abs_max",
    "activation_median",
    "activation_max_to_median_ratio",
    "activation_kurtosis",
    "attention_sink_mass",
    "attention_entropy_ratio",
    "attention_sink_heads",
    "attention_heads",
    "gate_mean",
    "gate_closed_ratio",
)
"""Kept at every point for every layer."""

LATEST_METRICS = (
    "activation_rms",
    "activation_top_abs",
    "activation_top_channel",
    "nonfinite_total",
    "massive_activations_total",
)
"""Also kept for every layer, but at the last point only; of the ranked ones rank 1, counters summed over all but the
layer."""

SERIES_METRICS: Mapping[str, str | None] = {
    "patch_installed": "patch",
    "patch_enabled": "patch",
    "patch_last_change_timestamp_seconds": "patch",
    "tokens_observed_total": "phase",
    "nonfinite_total": None,
    "massive_activations_total": "position",
    "probe_errors_total": "probe",
    "snapshot_age_seconds": "rank",
}
"""Kept at every point per value of this label, summed over all others; None sums to one series named `all`."""

_LAYERED = (*LAYER_METRICS, *LATEST_METRICS)
_ALL = "all"
_ABSENT = "null"


@dataclass
class _Point:
    """The samples of one engine at one time, by metric and layer or by metric and label."""

    model_name: str
    info: dict[str, set[str]] = field(default_factory=dict)
    layered: dict[str, dict[str, float]] = field(default_factory=dict)
    series: dict[tuple[str, str], float] = field(default_factory=dict)


@dataclass
class _Engine:
    """The past of one engine.

    Attributes
    ----------
    layers
        Layer labels in the order in which they were first seen; a row names its values by this order and may be
        shorter than it.
    rows
        Per metric of `LAYER_METRICS` one JSON list per point.
    series
        Per metric of `SERIES_METRICS` and label one JSON number per point; a series that began later is shorter and
        ends at the same point.
    latest
        Per metric of `LAYER_METRICS` and `LATEST_METRICS` one JSON list, of the last point.
    """

    rows: dict[str, deque[str]]
    model_name: str = ""
    info: dict[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    series: dict[tuple[str, str], deque[str]] = field(default_factory=dict)
    latest: dict[str, str] = field(default_factory=dict)
    seen: float = 0.0


class History:
    """Keeps `history_seconds / period_seconds` points; safe to use from several threads.

    A point takes about 7 bytes per layer and metric: 4 MB for 32 layers and the default settings.

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
        self._length = max(2, math.ceil(settings.history_seconds / settings.period_seconds))
        self._times: deque[float] = deque(maxlen=self._length)
        self._engines: dict[str, _Engine] = {}
        self._lock = threading.Lock()

    def record(self) -> None:
        """Take one point."""
        points = _by_engine(self._collector.samples())
        now = round(self._clock(), 2)
        with self._lock:
            if self._times and now <= self._times[-1]:
                # The clock was set back: older points would lie in the future.
                self._times.clear()
                self._engines.clear()
            self._times.append(now)
            for name in points.keys() - self._engines.keys():
                self._engines[name] = _Engine({metric: deque(maxlen=self._length) for metric in LAYER_METRICS})
            for name, engine in list(self._engines.items()):
                self._append(engine, points.get(name), now)
                if engine.seen < self._times[0]:
                    del self._engines[name]

    def as_json(
        self,
        since: float | None = None,
        points: int | None = None,
        engine: str | None = None,
        metrics: Collection[str] = LAYER_METRICS,
    ) -> str:
        """Return points as JSON text.

        Parameters
        ----------
        since
            Only points after this time, in seconds since the epoch; negative counts back from now. Default: all.
        points
            Thin out evenly to at most this many points; the last one is always among them. A window statistic loses
            no maximum by that as long as the points are less than a window apart.
        engine
            Only this engine; without it, or if there is no such engine, all.
        metrics
            The metrics of `LAYER_METRICS` whose past is wanted; the last point always has all.

        Returns
        -------
        str
            `times` (seconds since the epoch), `step` (one in so many points is given) and per engine `rows`
            ([point][layer] by metric, layers named by `layers`), `series` ([point] by metric and label) and `latest`
            ([layer] by metric). Absent is null, a row may end early, infinity is `1e999`. Metrics are named as in
            the catalogue, without `sluice_`.
        """
        now = self._clock()
        with self._lock:
            times = list(self._times)
            begin = -math.inf if since is None else since if since >= 0 else now + since
            first = bisect_right(times, begin)
            step = max(1, math.ceil((len(times) - first) / points)) if points else 1
            chosen = range(len(times) - 1, first - 1, -step)[::-1]
            names = sorted(self._engines, key=lambda name: (len(name), name))
            wanted = [engine] if engine in self._engines else names
            engines = [_engine_json(name, self._engines[name], metrics, chosen, len(times)) for name in wanted]
        return _object(
            time=f"{now:.2f}",
            period_seconds=_number(self.settings.period_seconds),
            history_seconds=_number(self.settings.history_seconds),
            stale_after_seconds=_number(self._stale_after),
            step=str(step),
            times=_list(f"{times[i]:.2f}" for i in chosen),
            names=_list(map(_text, names)),
            engines=_list(engines),
        )

    def _append(self, engine: _Engine, point: _Point | None, now: float) -> None:
        if point is not None:
            engine.seen = now
            engine.model_name = point.model_name
            engine.info = {key: ", ".join(sorted(values)) for key, values in point.info.items()}
            seen = set(engine.layers)
            engine.layers += sorted({layer for row in point.layered.values() for layer in row} - seen)
            for key in point.series.keys() - engine.series.keys():
                engine.series[key] = deque(maxlen=self._length)
        layered = point.layered if point else {}
        series = point.series if point else {}
        for key, values in list(engine.series.items()):
            values.append(_number(series[key], key[0]) if key in series else _ABSENT)
            if key not in series and all(value is _ABSENT for value in values):
                del engine.series[key]
        engine.latest = {metric: _row(layered.get(metric, {}), engine.layers) for metric in _LAYERED}
        for metric, rows in engine.rows.items():
            rows.append(engine.latest[metric])


def _by_engine(samples: Iterable[Sample]) -> dict[str, _Point]:
    points: dict[str, _Point] = {}
    for sample in samples:
        metric = sample.metric.removeprefix(_PREFIX)
        labels = dict(sample.labels)
        point = points.setdefault(labels.pop("engine"), _Point(labels.pop("model_name")))
        if metric == "info":
            for key, value in labels.items():
                point.info.setdefault(key, set()).add(value)
        if metric in SERIES_METRICS:
            name = metric, labels.get(SERIES_METRICS[metric] or "", _ALL)
            point.series[name] = point.series.get(name, 0.0) + sample.value
        if metric in _LAYERED and labels.get("rank", "1") == "1":
            row = point.layered.setdefault(metric, {})
            row[labels["layer"]] = row.get(labels["layer"], 0.0) + sample.value
    return points


def _engine_json(name: str, engine: _Engine, metrics: Collection[str], chosen: Sequence[int], total: int) -> str:
    series: dict[str, dict[str, str]] = {}
    for (metric, label), values in sorted(engine.series.items()):
        series.setdefault(metric, {})[label] = _column(values, chosen, total, _ABSENT)
    return _object(
        engine=_text(name),
        model_name=_text(engine.model_name),
        info=_object(**{key: _text(value) for key, value in engine.info.items()}),
        layers=_list(map(_text, engine.layers)),
        rows=_object(**{m: _column(rows, chosen, total, "[]") for m, rows in engine.rows.items() if m in metrics}),
        series=_object(**{metric: _object(**labels) for metric, labels in series.items()}),
        latest=_object(**engine.latest),
    )


def _column(values: deque[str], chosen: Sequence[int], total: int, absent: str) -> str:
    cells = list(values)
    missing = total - len(cells)
    return _list(cells[i - missing] if i >= missing else absent for i in chosen)


def _row(values: Mapping[str, float], layers: Sequence[str]) -> str:
    if not values:
        return "[]"
    return _list(_number(values[layer]) if layer in values else _ABSENT for layer in layers)


def _number(value: float, metric: str = "") -> str:
    """Return a JSON number: counts exact, times to a tenth of a second, all else with five significant digits."""
    if math.isnan(value):
        return _ABSENT
    if math.isinf(value):
        # JSON has no infinity, but this is a valid number that every reader of doubles takes for it.
        return "1e999" if value > 0 else "-1e999"
    if metric.endswith("timestamp_seconds"):
        return f"{value:.1f}"
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.5g}"


def _text(value: str) -> str:
    return json.dumps(value)


def _list(items: Iterable[str]) -> str:
    return f"[{','.join(items)}]"


def _object(**members: str) -> str:
    return "{" + ",".join(f"{_text(key)}:{value}" for key, value in members.items()) + "}"
