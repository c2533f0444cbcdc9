"""JSON text, put together from parts that were encoded before."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

ABSENT = "null"


def number(value: float, metric: str = "") -> str:
    """Return a JSON number: counts exact, times to a tenth of a second, all else with five significant digits."""
    if math.isnan(value):
        return ABSENT
    if math.isinf(value):
        # JSON has no infinity, but this is a valid number that every reader of doubles takes for it.
        return "1e999" if value > 0 else "-1e999"
    if metric.endswith("timestamp_seconds"):
        return f"{value:.1f}"
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.5g}"


def text(value: str) -> str:
    """Return a JSON string."""
    return json.dumps(value)


def array(items: Iterable[str]) -> str:
    """Return a JSON array of encoded items."""
    return f"[{','.join(items)}]"


def record(**members: str) -> str:
    """Return a JSON object of encoded members."""
    return "{" + ",".join(f"{text(key)}:{value}" for key, value in members.items()) + "}"
