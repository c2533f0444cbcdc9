"""The metric catalogue: every metric that Sluice exports, once. `/metrics`, the docs and dashboards follow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter"]
Combine = Literal["max", "min", "sum", "mean"]
Detail = Literal["standard", "full"]

COMMON_LABELS = ("model_name", "engine")
"""On every metric: the served model's name and the data-parallel index, as vLLM labels its own metrics."""


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue.

    Attributes
    ----------
    name
        Full name; counters end in `_total`.
    kind
        Prometheus type.
    help
        One sentence for `/metrics` and the docs.
    unit
        Base unit, or `1` for a pure number, or `activation` for the hidden state's own scale.
    labels
        Labels besides `COMMON_LABELS`.
    combine
        How the values of several ranks of one engine become one (hidden states are replicated over tensor-parallel
        ranks, heads are sharded).
    windowed
        True for a statistic of the sliding window: it can fall, and it is left out when the window saw nothing.
    group
        Section in the docs.
    detail
        `standard`, or `full` for a metric that is exported only with telemetry.detail: full.
    """

    name: str
    kind: Kind
    help: str
    unit: str
    labels: tuple[str, ...]
    combine: Combine
    windowed: bool
    group: str
    detail: Detail = "standard"


def _gauge(
    name: str, text: str, unit: str, labels: tuple[str, ...], combine: Combine, group: str,
    detail: Detail = "standard",
) -> Metric:
    windowed = group not in ("patch", "baseline", "monitor")
    return Metric(f"sluice_{name}", "gauge", text, unit, labels, combine, windowed, group, detail)


def _counter(name: str, text: str, unit: str, labels: tuple[str, ...], combine: Combine, group: str) -> Metric:
    return Metric(f"sluice_{name}_total", "counter", text, unit, labels, combine, False, group)


_LAYER = ("layer",)
_RANKED = ("layer", "rank")
_SITE = ("layer", "site")
_QUANTIZED = ("layer", "site", "format", "scale")

CATALOGUE: tuple[Metric, ...] = (
    _gauge("activation_abs_max", "Largest absolute value of the hidden state after the layer, over the window.",
           "activation", _LAYER, "max", "residual"),
    _gauge("activation_median",
           "Median absolute value of the hidden state of sampled tokens; from a histogram, error at most 1.1 %.",
           "activation", _LAYER, "max", "residual"),
    _gauge("activation_max_to_median_ratio", "sluice_activation_abs_max divided by sluice_activation_median.",
           "1", _LAYER, "max", "residual"),
    _gauge("activation_rms", "Root mean square of the hidden state over tokens and channels.",
           "activation", _LAYER, "max", "residual", "full"),
    _gauge("activation_kurtosis", "Kurtosis of the hidden state over tokens and channels (3 for a Gaussian).",
           "1", _LAYER, "max", "residual"),
    _gauge("activation_top_abs", "Largest absolute value of the channel that is rank 1, 2 or 3 by that value.",
           "activation", _RANKED, "max", "residual", "full"),
    _gauge("activation_top_channel", "Index of the channel behind sluice_activation_top_abs.",
           "1", _RANKED, "max", "residual"),
    _counter("massive_activations",
             "Hidden-state entries above massive_min and massive_ratio times the median, by token position.",
             "1", ("layer", "position"), "max", "residual"),
    _counter("nonfinite", "NaN and infinite entries of the hidden state.", "1", _LAYER, "max", "residual"),
    _gauge("attention_sink_mass", "Mean attention of sampled queries to position 0, over heads.",
           "1", _LAYER, "mean", "attention"),
    _gauge("attention_first4_mass", "Mean attention of sampled queries to positions 0 to 3, over heads.",
           "1", _LAYER, "mean", "attention", "full"),
    _gauge("attention_sink_heads", "Heads whose mean attention to position 0 is above the sink threshold.",
           "1", _LAYER, "sum", "attention"),
    _gauge("attention_heads", "Query heads looked at.", "1", _LAYER, "sum", "attention", "full"),
    _gauge("attention_entropy_ratio", "Attention entropy divided by the logarithm of the visible keys, over heads.",
           "1", _LAYER, "mean", "attention", "full"),
    _gauge("gate_mean", "Mean gate value.", "1", _LAYER, "mean", "gate"),
    _gauge("gate_closed_ratio", "Share of gates below closed_below (default 0.1).",
           "1", _LAYER, "mean", "gate", "full"),
    _gauge("quantization_headroom_ratio",
           "Largest value that format and scale can hold divided by the largest absolute value seen; below 1 it clips.",
           "1", _QUANTIZED, "min", "quantization"),
    _gauge("quantization_snr_decibels",
           "Signal-to-noise ratio of sampled tokens after simulated quantization; absent if nothing is lost.",
           "decibels", _QUANTIZED, "min", "quantization"),
    _counter("quantization_elements", "Finite entries looked at.", "1", _SITE, "max", "quantization"),
    _counter("quantization_clipped", "Entries beyond the baseline's static range; absent without a baseline.",
             "1", _SITE, "max", "quantization"),
    _gauge("serving_dtype_max", "Largest finite value of the dtype that the model is served in.",
           "activation", (), "max", "baseline"),
    _gauge("baseline_good", "1 if the configured baseline can be used on every rank; absent without one.",
           "1", (), "min", "baseline"),
    _gauge("baseline_info", "1 for the section of the baseline that is in force: its hash and its patch state.",
           "1", ("baseline", "patches"), "max", "baseline"),
    _gauge("baseline_activation_abs_max", "sluice_activation_abs_max as the section in force recorded it.",
           "activation", _LAYER, "max", "baseline"),
    _gauge("baseline_activation_max_to_median_ratio",
           "sluice_activation_max_to_median_ratio as the section in force recorded it.",
           "1", _LAYER, "max", "baseline"),
    _gauge("baseline_attention_sink_mass", "sluice_attention_sink_mass as the section in force recorded it.",
           "1", _LAYER, "max", "baseline"),
    _counter("tokens_observed", "Tokens that the probes looked at.", "1", ("phase",), "max", "monitor"),
    _counter("start_tokens_observed",
             "Tokens at position 0 that the probes looked at; those in the prefix cache are not computed again.",
             "1", (), "max", "monitor"),
    _counter("queries_sampled", "Queries whose attention was recomputed.", "1", ("phase",), "max", "monitor"),
    _gauge("patch_installed", "1 if the patch is built into the model on every rank.", "1", ("patch",), "min", "patch"),
    _gauge("patch_enabled", "1 if the installed patch acts on every rank.", "1", ("patch",), "min", "patch"),
    _gauge("patch_parameter", "Run-time parameter of the installed patch, whether it acts or not; equal on all ranks.",
           "1", ("patch", "parameter"), "max", "patch"),
    _gauge("patch_last_change_timestamp_seconds", "When the patch was last switched or a parameter set; absent before.",
           "seconds", ("patch",), "max", "patch"),
    _gauge("generation", "Generation of the run-time state: desired and applied, per rank.",
           "1", ("rank", "kind"), "max", "patch"),
    _gauge("engine_paused", "1 while generation is paused, for a switch or by somebody else.", "1", (), "max", "patch"),
    _gauge("guard_running", "1 while the guard tries a switch on a share of the requests; absent without a trial.",
           "1", ("patch",), "max", "patch"),
    _gauge("guard_tokens", "Tokens that the group generated in the guard's trial; absent without a trial.",
           "1", ("patch", "group"), "max", "patch"),
    _gauge("guard_logprob", "Mean log-probability of the tokens that the group generated in the guard's trial.",
           "nats", ("patch", "group"), "max", "patch"),
    _gauge("guard_nonfinite", "Rows of logits with NaN or infinity in the group in the guard's trial.",
           "1", ("patch", "group"), "max", "patch"),
    _counter("switches", "Changes of the run-time state by result: applied, rolled_back, failed or tried (guarded).",
             "1", ("result",), "max", "patch"),
    _counter("switch_seconds", "Time that changes of the run-time state took.", "seconds", (), "max", "patch"),
    _gauge("config_file_good", "0 if the configuration file cannot be used and the last good state stays.",
           "1", (), "min", "patch"),
    _gauge("config_restart_needed", "Settings in the configuration file that only a restart can bring into force.",
           "1", (), "max", "patch"),
    _gauge("snapshot_age_seconds", "Age of the rank's last snapshot.", "seconds", ("rank",), "max", "monitor"),
    _gauge("probe_enabled", "1 if the probe looks at tokens on every rank, 0 if it is off; absent if not installed.",
           "1", ("probe",), "min", "monitor"),
    _gauge("probe_failed", "1 if the probe went off on a rank because of its errors; absent if not installed.",
           "1", ("probe",), "max", "monitor"),
    _counter("probe_errors", "Errors inside a probe; the server goes on without it.",
             "1", ("probe",), "sum", "monitor"),
    _counter("probe_seconds", "Time that the probe's work outside the compiled graph took in the worker.",
             "seconds", ("probe",), "sum", "monitor"),
    _gauge("start_timestamp_seconds", "When the rank began to count; of several ranks the youngest.",
           "seconds", (), "max", "monitor"),
    _counter("forward_seconds", "Time of real forward passes as the worker's host sees it, work around them left out.",
             "seconds", (), "sum", "monitor"),
    _gauge("telemetry_interval_seconds", "Time between two snapshots of a rank.", "seconds", (), "max", "monitor"),
    _gauge("telemetry_window_seconds", "Length of the sliding window.", "seconds", (), "max", "monitor"),
    _gauge("exported_series", "Series that Sluice exports in this scrape.", "1", (), "sum", "monitor"),
    _gauge("info", "Always 1; versions and the fingerprint of what is installed as labels.",
           "1", ("version", "vllm_version", "fingerprint"), "max", "monitor"),
)  # fmt: skip

QUANTIZED_PAIRS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "sluice_quantization_headroom_ratio": (
        ("serving", "none"), ("fp8_e4m3", "none"), ("int8", "static"), ("fp8_e4m3", "static"),
    ),
    "sluice_quantization_snr_decibels": (
        ("int8", "per_token"), ("int8", "per_tensor"), ("int8", "static"),
        ("fp8_e4m3", "per_token"), ("fp8_e4m3", "per_tensor"), ("fp8_e4m3", "static"),
    ),
}  # fmt: skip
"""Values that the labels `format` and `scale` have together; `static` takes a baseline."""

OPTIONAL_GROUPS = ("quantization", "baseline")
"""Groups that are exported only where the configuration asks for them."""

STANDARD_RANKS = ("1",)
"""Ranks of `activation_top_channel` that `standard` exports."""

BY_NAME = {metric.name: metric for metric in CATALOGUE}


def is_exported(metric: Metric, labels: Mapping[str, str], detail: Detail) -> bool:
    """Tell whether a series is on /metrics at this level of detail."""
    if detail == "full":
        return True
    ranked = "layer" in labels and "rank" in labels
    return metric.detail == "standard" and (not ranked or labels["rank"] in STANDARD_RANKS)


def layer_label(layer: int) -> str:
    """Return the `layer` label: zero-padded, so that text order is layer order."""
    return f"{layer:03d}"
