"""What the page keeps of the metrics, and the samples of one moment as a point of it.

Nothing here looks into the catalogue: a metric that no probe writes is simply absent from the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_sluice.telemetry.collector import Sample

_PREFIX = "sluice_"
_ALL = "all"
_INFO = ("info", "baseline_info")

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
"""Kept at every point for every layer; what an answer holds if nobody asks for something else."""


@dataclass(frozen=True)
class Kept:
    """A metric of which something is kept.

    Attributes
    ----------
    metric
        Name without `sluice_`.
    by
        Labels whose values stay apart.
    combine
        What becomes of all other labels but the layer.
    past
        Kept at every point; else at the last one only.
    """

    metric: str
    by: tuple[str, ...] = ()
    combine: Callable[[float, float], float] = lambda a, b: a + b
    past: bool = True


_NUMERIC_FORMAT = ("format", "scale")

LAYERED = (
    *map(Kept, LAYER_METRICS),
    # By layer and position for the rates of a span, summed up for a glance.
    Kept("massive_activations_total", ("position",)),
    Kept("massive_activations_total", past=False),
    # The tightest site over time; which site that is only now.
    Kept("quantization_headroom_ratio", _NUMERIC_FORMAT, min),
    Kept("quantization_headroom_ratio", (*_NUMERIC_FORMAT, "site"), min, past=False),
    Kept("quantization_snr_decibels", (*_NUMERIC_FORMAT, "site"), min, past=False),
    Kept("activation_rms", past=False),
    Kept("activation_top_abs", past=False),
    Kept("activation_top_channel", past=False),
    Kept("nonfinite_total", past=False),
    Kept("baseline_activation_abs_max", past=False),
    Kept("baseline_activation_max_to_median_ratio", past=False),
    Kept("baseline_attention_sink_mass", past=False),
)
"""Kept for every layer; of ranked metrics rank 1."""

SERIES = (
    Kept("patch_installed", ("patch",)),
    Kept("patch_enabled", ("patch",)),
    Kept("patch_last_change_timestamp_seconds", ("patch",)),
    Kept("generation", ("rank", "kind")),
    Kept("engine_paused", combine=max),
    Kept("config_file_good", combine=min),
    Kept("config_restart_needed", combine=max),
    Kept("tokens_observed_total", ("phase",)),
    Kept("start_tokens_observed_total"),
    Kept("nonfinite_total"),
    Kept("massive_activations_total", ("position",)),
    Kept("quantization_clipped_total", ("site",)),
    Kept("quantization_elements_total", ("site",)),
    Kept("probe_errors_total", ("probe",)),
    Kept("snapshot_age_seconds", ("rank",)),
)
"""Kept for the engine as a whole; a metric without labels of its own is one series named `all`."""


@dataclass
class Point:
    """The samples of one engine at one time.

    Attributes
    ----------
    layered
        Value by row and layer; a row is named by the metric and the labels of `Kept.by`, joined by colons.
    series
        Value by metric and label.
    """

    model_name: str
    info: dict[str, set[str]] = field(default_factory=dict)
    layered: dict[str, dict[str, float]] = field(default_factory=dict)
    series: dict[tuple[str, str], float] = field(default_factory=dict)


def by_engine(samples: Iterable[Sample]) -> dict[str, Point]:
    """Return a point for each engine."""
    points: dict[str, Point] = {}
    for sample in samples:
        metric = sample.metric.removeprefix(_PREFIX)
        labels = dict(sample.labels)
        point = points.setdefault(labels.pop("engine"), Point(labels.pop("model_name")))
        if metric in _INFO:
            for key, value in labels.items():
                point.info.setdefault(key, set()).add(value)
        for kept in _SERIES_OF.get(metric, ()):
            name = metric, ":".join(labels[label] for label in kept.by) or _ALL
            point.series[name] = _joined(kept, point.series.get(name), sample.value)
        # The rank of a channel, where there is one; of a worker there is none in a metric of layers.
        for kept in _LAYERED_OF.get(metric, ()) if labels.get("rank", "1") == "1" else ():
            row = point.layered.setdefault(":".join((metric, *(labels[label] for label in kept.by))), {})
            row[labels["layer"]] = _joined(kept, row.get(labels["layer"]), sample.value)
    return points


def _joined(kept: Kept, known: float | None, value: float) -> float:
    return value if known is None else kept.combine(known, value)


def _by_metric(all_kept: Iterable[Kept]) -> dict[str, list[Kept]]:
    found: dict[str, list[Kept]] = {}
    for kept in all_kept:
        found.setdefault(kept.metric, []).append(kept)
    return found


_SERIES_OF = _by_metric(SERIES)
_LAYERED_OF = _by_metric(LAYERED)
_PAST = {(kept.metric, len(kept.by)) for kept in LAYERED if kept.past}


def has_past(row: str) -> bool:
    """Tell whether a row of a point is kept at every point."""
    metric, *labels = row.split(":")
    return (metric, len(labels)) in _PAST
