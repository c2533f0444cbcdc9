"""Writes docs/metrics.md from the catalogue of metrics."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path

from vllm_sluice.commands.problem import Problem
from vllm_sluice.telemetry.catalogue import (
    CATALOGUE,
    COMMON_LABELS,
    OPTIONAL_GROUPS,
    QUANTIZED_PAIRS,
    STANDARD_RANKS,
    Detail,
    Metric,
    is_exported,
)

LABEL_VALUES: dict[str, tuple[str, ...]] = {
    "rank": ("1", "2", "3"),
    "position": ("start", "delimiter", "other"),
    "site": ("hidden", "attention_input", "mlp_input"),
}
"""Values of the labels that multiply a layer's series."""

_GROUPS = {
    "residual": (
        "Hidden states",
        "The hidden state of layer l is the residual stream after decoder layer l. Every real token counts; padding, "
        "warm-up and profiling do not. Written by the `residual` probe.",
    ),
    "attention": (
        "Attention",
        "Exact probabilities of sampled queries, recomputed from the query and the paged KV cache. Written by the "
        "`attention` probe.",
    ),
    "gate": ("Gates", "Values of installed gates, over heads and real tokens. Written by the `gate` probe."),
    "quantization": (
        "Quantization",
        "What INT8 and FP8 would do to the hidden state and to the inputs of the matrix products, on real traffic; "
        "[quantization.md](quantization.md) says how to read it. Written by the `quantization` probe, which is off by "
        "default (`probes.quantization.install`).",
    ),
    "baseline": (
        "Baseline",
        "What the numbers above are compared with. Written from the calibration file that `telemetry.baseline` names.",
    ),
    "patch": ("Patches", "What is built into the model, what acts, and whether every rank agrees."),
    "monitor": ("Sluice itself", "Whether the numbers above are there, fresh and affordable."),
}
_COMBINED = {"max": "largest", "min": "smallest", "sum": "sum", "mean": "mean"}
_LABELS = """\
| label | values |
| --- | --- |
| `model_name` | served name of the model, as in vLLM's own metrics |
| `engine` | data-parallel index, as in vLLM's own metrics |
| `layer` | decoder layer, zero-padded (`007`), so that text order is layer order |
| `rank` | of `sluice_activation_top_*`: 1, 2, 3; elsewhere the worker's place in its engine, such as `pp0-tp1` |
| `position` | class of a token: `start` (position 0), `delimiter` or `other` |
| `phase` | `prefill` or `decode` |
| `result` | `applied`, `rolled_back` (the old state holds), `failed`, or `tried` (the guard began a trial) |
| `site` | `hidden` (state after the layer), `attention_input` (of the q, k and v projections) or `mlp_input` |
| `format` | `int8`, `fp8_e4m3`, or `serving`, the dtype that the model is served in |
| `scale` | `per_token`, `per_tensor` (over the sampled tokens of a pass), `static` (the baseline's) or `none` |
| `baseline`, `patches` | hash of the baseline's section in force, and its patch state, such as `gate=1` |
| `group` | `canary`, which runs under the new state, or `rest` |
| `patch`, `probe` | kind of the patch or probe |
| `parameter` | a run-time parameter of the patch, such as `temperature` |
| `kind` | of `sluice_generation`: `desired` or `applied` |
"""
_HEAD = """\
# Metrics

<!-- Made from plugin/vllm_sluice/telemetry/catalogue.py by `make docs`; do not edit. -->

Sluice adds these to the server's own `/metrics`, with one API server and with several.

- **Windowed** metrics describe the last `telemetry.window_seconds` (60 by default). They can fall, a scrape never
  resets them, and when the window saw nothing they are left out rather than repeated.
- Counters start at 0 and rise as long as the engine lives.
- The column *exported* says `full` for what `/metrics` has only with `telemetry.detail: full`.
- Tensor-parallel and pipeline-parallel ranks of one engine are combined into one series; the column *ranks* says how.
  Data-parallel engines stay apart by `engine`.
"""


def page() -> str:
    """Return docs/metrics.md."""
    parts = [_HEAD, _budget(), "\n## Labels\n\n", _LABELS]
    for group, (title, text) in _GROUPS.items():
        rows = [_row(metric) for metric in CATALOGUE if metric.group == group]
        parts += [f"\n## {title}\n\n{text}\n\n", _table(rows)]
    return "".join(parts)


def check(path: Path, expected: str) -> None:
    """Raise `Problem` if a file is not the page."""
    try:
        found = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}; make it with: make docs") from None
    if found != expected:
        raise Problem(f"{path} does not match the catalogue of metrics; make it anew with: make docs")


def series_per_layer(detail: Detail, group: str | None = None) -> int:
    """Return how many series a layer has on `/metrics`, of one group or of all that are there by default."""
    return sum(
        is_exported(metric, labels, detail)
        for metric in CATALOGUE
        if "layer" in metric.labels
        and (group == metric.group or (group is None and metric.group not in OPTIONAL_GROUPS))
        for labels in label_sets(metric)
    )


def label_sets(metric: Metric, layers: Iterable[str] = ("000",)) -> list[dict[str, str]]:
    """Return the labels of all series that a metric of layers can have."""
    pairs = QUANTIZED_PAIRS.get(metric.name, ((),))
    plain = [label for label in metric.labels if label not in ("format", "scale")]
    values = [tuple(layers) if label == "layer" else LABEL_VALUES[label] for label in plain]
    return [
        dict(zip(metric.labels, (*chosen, *pair), strict=True)) for chosen in product(*values) for pair in pairs
    ]


def _budget() -> str:
    def counted(detail: Detail) -> str:
        counts = [
            (title.lower(), series_per_layer(detail, group))
            for group, (title, _) in _GROUPS.items()
            if group not in OPTIONAL_GROUPS
        ]
        listed = ", ".join(f"{title} {count}" for title, count in counts if count)
        return f"{series_per_layer(detail)} series ({listed})"

    probe = series_per_layer("standard", "quantization")
    static = sum(pair[1] == "static" for pairs in QUANTIZED_PAIRS.values() for pair in pairs) + 1  # and the clipped
    without = probe - static * len(LABEL_VALUES["site"])
    return (
        f"- A layer has {counted('standard')} by default,\n"
        f"  and {counted('full')} with `telemetry.detail: full`.\n"
        f"  The `quantization` probe adds {probe} a layer at either level, {without} without a baseline,\n"
        "  a third of that for each site in `probes.quantization.sites`; a baseline adds "
        f"{series_per_layer('standard', 'baseline')}.\n"
        "  `sluice_exported_series` counts all series of a scrape. The live page shows full detail either way.\n"
    )


def _row(metric: Metric) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in metric.labels if label not in COMMON_LABELS)
    unit = "number" if metric.unit == "1" else metric.unit
    windowed = "yes" if metric.windowed else ""
    ranked = {"layer", "rank"} <= set(metric.labels)
    default = f"rank {', '.join(STANDARD_RANKS)}" if ranked else "yes"
    exported = default if metric.detail == "standard" else "full"
    return f"`{metric.name}`", metric.kind, unit, labels, exported, windowed, _COMBINED[metric.combine], metric.help


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head = ("name", "type", "unit", "labels", "exported", "windowed", "ranks", "meaning")
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")
