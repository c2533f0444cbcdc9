"""Metrics that the dashboards show and the catalogue does not have yet; a name that it has is taken from there."""

from __future__ import annotations

from vllm_sluice.telemetry.catalogue import CATALOGUE, Metric

_LAYER = ("layer",)
_SITE = ("layer", "site")
_FORMAT = ("layer", "site", "format", "scale")


def _gauge(name: str, labels: tuple[str, ...] = (), windowed: bool = False) -> Metric:
    return Metric(f"sluice_{name}", "gauge", name.replace("_", " "), "1", labels, "max", windowed, "pending")


def _counter(name: str, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(f"sluice_{name}_total", "counter", name.replace("_", " "), "1", labels, "max", False, "pending")


PENDING = (
    _gauge("baseline_info", ("baseline", "patches")),
    _gauge("baseline_activation_abs_max", _LAYER),
    _gauge("baseline_activation_max_to_median_ratio", _LAYER),
    _gauge("baseline_attention_sink_mass", _LAYER),
    _gauge("quantization_headroom_ratio", _FORMAT, windowed=True),
    _counter("quantization_clipped", _SITE),
    _counter("quantization_elements", _SITE),
    _gauge("quantization_snr_decibels", _FORMAT, windowed=True),
    _counter("forward_seconds"),
    _gauge("serving_dtype_max"),
    _gauge("telemetry_interval_seconds"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*PENDING, *CATALOGUE)}
"""Everything that Sluice exports, by name."""
