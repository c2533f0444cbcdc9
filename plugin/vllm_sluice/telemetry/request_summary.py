"""A request's own statistics: the summary that comes back with its answer, put together from what the ranks saw."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

ARGUMENT = "sluice.stats"
"""The request argument: true, and in the workers a ticket by which the request's records are found."""

_TICKET = re.compile(r"[0-9a-f]{48}")
_KEY = secrets.token_bytes(16)
"""Of this process: tickets of others are not taken from requests."""


def new_ticket() -> str:
    """Make a ticket."""
    number = secrets.token_hex(16)
    return number + _seal(number)


def is_ticket(value: object) -> bool:
    """Tell whether an argument's value looks like a ticket."""
    return isinstance(value, str) and _TICKET.fullmatch(value) is not None


def is_own_ticket(value: object) -> bool:
    """Tell whether an argument's value is a ticket that this process made."""
    return is_ticket(value) and hmac.compare_digest(_seal(str(value)[:32]), str(value)[32:])


def _seal(number: str) -> str:
    return hmac.new(_KEY, number.encode(), hashlib.sha256).hexdigest()[:16]


def summarise(replies: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine what the ranks of the request's engine answered into one summary.

    Hidden states are the same on all tensor-parallel ranks (the largest counts), heads are shared out among them
    (sums add up), and every pipeline stage has its own layers. The samples of one prompt are several requests.

    Parameters
    ----------
    replies
        Of each rank, by request, `{"tokens": int, "probes": {kind: {layer: numbers}}}` with the numbers of
        `Probe.request_values`; `{}` of ranks that did not see the request; or `{"error": message}`.

    Returns
    -------
    dict
        `tokens` (computed tokens that were seen), and of probes that are on: `max_activation` (largest finite value,
        layer, position, channel), `nonfinite` (entries that are NaN or infinite), `sink_mass` (mean attention to
        position 0, over heads and layers, of `queries_sampled` queries, each with the weight of the tokens that it
        stands for), `gate_mean` (of all gates, whether they act on the request or not); and under `layers` the same by
        layer. Or `error`. All numbers are finite.
    """
    replies = [reply for reply in replies if reply]
    if broken := next((reply["error"] for reply in replies if "error" in reply), None):
        return {"error": broken}
    if not replies:
        return {"error": "no probe has looked at this request; are the probes on?"}
    parts = [part for reply in replies for part in reply.values()]
    names = {name for reply in replies for name in reply}
    of_name = {name: [reply[name] for reply in replies if name in reply] for name in names}
    summary: dict[str, Any] = {"tokens": sum(max(part["tokens"] for part in same) for same in of_name.values())}
    queries = sum(max(_queries(part) for part in same) for same in of_name.values())
    if queries:
        summary["queries_sampled"] = queries
    layers: dict[str, dict[str, float]] = {}
    _add_largest(parts, summary, layers)
    _add_nonfinite(of_name.values(), summary, layers)
    for name, kind in (("sink_mass", "attention"), ("gate_mean", "gate")):
        if means := _means(parts, kind):
            summary[name] = sum(means.values()) / len(means)
            layers[name] = _named(means)
    return {**summary, "layers": layers}


def _add_largest(parts: list[Any], summary: dict[str, Any], layers: dict[str, dict[str, float]]) -> None:
    largest: dict[int, list[float]] = {}
    for part in parts:
        for layer, (value, position, channel, _) in _numbers(part, "residual"):
            if value >= 0 and value > largest.get(layer, [-1.0])[0]:
                largest[layer] = [value, position, channel]
    if largest:
        layer = max(sorted(largest), key=lambda number: largest[number][0])
        value, position, channel = largest[layer]
        summary["max_activation"] = {
            "value": value, "layer": layer, "position": int(position), "channel": int(channel)
        }  # fmt: skip
        layers["max_activation"] = _named({number: row[0] for number, row in largest.items()})


def _add_nonfinite(requests: Iterable[list[Any]], summary: dict[str, Any], layers: dict[str, dict[str, float]]) -> None:
    counts: dict[int, float] = {}
    looked = False
    for same in requests:
        of_request: dict[int, float] = {}
        for part in same:  # tensor-parallel ranks see the same entries
            for layer, (*_, bad) in _numbers(part, "residual"):
                of_request[layer] = max(of_request.get(layer, 0), bad)
                looked = True
        for layer, bad in of_request.items():
            counts[layer] = counts.get(layer, 0) + bad
    if looked:
        summary["nonfinite"] = sum(counts.values())
    if any(counts.values()):
        layers["nonfinite"] = _named({layer: bad for layer, bad in counts.items() if bad})


def _means(parts: list[Any], kind: str) -> dict[int, float]:
    sums: dict[int, list[float]] = {}
    for part in parts:
        for layer, (total, count, *_) in _numbers(part, kind):
            before = sums.get(layer, [0.0, 0.0])
            sums[layer] = [before[0] + total, before[1] + count]
    return {layer: total / count for layer, (total, count) in sums.items() if count}


def _queries(part: Mapping[str, Any]) -> int:
    return max((int(sampled) for _, (_, _, sampled) in _numbers(part, "attention")), default=0)


def _numbers(part: Mapping[str, Any], kind: str) -> list[tuple[int, list[float]]]:
    return [(int(layer), list(row)) for layer, row in part["probes"].get(kind, {}).items()]


def _named(by_layer: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): by_layer[layer] for layer in sorted(by_layer)}
