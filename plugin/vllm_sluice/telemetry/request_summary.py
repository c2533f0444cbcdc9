"""A request's own statistics: the summary that comes back with its answer, put together from what the ranks saw."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

ARGUMENT = "sluice.stats"
"""The request argument: true, and in the workers a ticket by which the request's records are found."""

_TICKET = re.compile(r"[0-9a-f]{32}")


def new_ticket() -> str:
    """Make a ticket."""
    return uuid.uuid4().hex


def is_ticket(value: object) -> bool:
    """Tell whether an argument's value is a ticket."""
    return isinstance(value, str) and _TICKET.fullmatch(value) is not None


def summarise(replies: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine what the ranks of the request's engine answered into one summary.

    Hidden states are the same on all tensor-parallel ranks (the largest counts), heads are shared out among them
    (sums add up), and every pipeline stage has its own layers.

    Parameters
    ----------
    replies
        Of each rank `{"tokens": int, "probes": {kind: {layer: numbers}}}` as `Probe.request_values` gives them, `{}`
        of ranks that did not see the request, or `{"error": message}`.

    Returns
    -------
    dict
        `tokens` (computed tokens that were seen), and of probes that are on: `max_activation` (value, layer, position,
        channel), `sink_mass` (mean attention of sampled queries to position 0, over heads and layers),
        `queries_sampled`, `gate_mean` (of all gates, whether they act on the request or not); and under `layers` the
        same by layer. Or `error`.
    """
    replies = [reply for reply in replies if reply]
    if broken := next((reply["error"] for reply in replies if "error" in reply), None):
        return {"error": broken}
    if not replies:
        return {"error": "no probe has looked at this request; are the probes on?"}
    largest: dict[int, list[float]] = {}
    sums: dict[str, dict[int, list[float]]] = {"attention": {}, "gate": {}}
    queries = 0
    for reply in replies:
        probes = reply["probes"]
        for layer, row in _by_number(probes.get("residual", {})):
            largest[layer] = max(largest.get(layer, row), row, key=lambda numbers: numbers[0])
        for _, (_, _, sampled) in _by_number(probes.get("attention", {})):
            queries = max(queries, int(sampled))
        for kind, layers in sums.items():
            for layer, (total, count, *_) in _by_number(probes.get(kind, {})):
                before = layers.get(layer, [0.0, 0.0])
                layers[layer] = [before[0] + total, before[1] + count]
    summary: dict[str, Any] = {"tokens": max(int(reply["tokens"]) for reply in replies)}
    by_layer: dict[str, dict[str, float]] = {}
    if largest:
        layer = max(sorted(largest), key=lambda number: largest[number][0])
        value, position, channel = largest[layer]
        summary["max_activation"] = {
            "value": value, "layer": layer, "position": int(position), "channel": int(channel)
        }  # fmt: skip
        by_layer["max_activation"] = {str(number): row[0] for number, row in sorted(largest.items())}
    for name, kind in (("sink_mass", "attention"), ("gate_mean", "gate")):
        means = {number: total / count for number, (total, count) in sorted(sums[kind].items()) if count}
        if means:
            summary[name] = sum(means.values()) / len(means)
            by_layer[name] = {str(number): mean for number, mean in means.items()}
    if queries:
        summary["queries_sampled"] = queries
    return {**summary, "layers": by_layer}


def _by_number(layers: Mapping[str, list[float]]) -> list[tuple[int, list[float]]]:
    return [(int(layer), list(row)) for layer, row in layers.items()]
