"""Enough of PromQL's grammar to say which series an expression reads and how; Prometheus itself checks the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_WORDS = frozenset(
    {
        "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset", "and", "or", "unless", "sum",
        "min", "max", "avg", "count", "quantile", "topk", "bottomk", "count_values", "inf", "nan",
    }
)  # fmt: skip
_LABEL_LISTS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_NAME = re.compile(r"(?<![\w:$.\"'])([a-zA-Z_:][\w:]*)")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_RANGED = ("rate", "increase", "irate", "delta", "deriv", "changes", "resets")


@dataclass(frozen=True)
class Selector:
    """A selector: metric, matchers by label (`=~$job`), range, and the functions around it, the innermost first."""

    metric: str
    matchers: dict[str, str]
    span: str
    functions: tuple[str, ...]

    @property
    def as_rate(self) -> bool:
        """Whether a counter is read as what it should be read as."""
        return any(function in _RANGED for function in self.functions)


def selectors(expr: str) -> Iterator[Selector]:
    """Yield every selector of an expression."""
    plain = _without_strings(_LABEL_LISTS.sub(lambda found: " " * len(found.group()), expr))
    for found in _NAME.finditer(plain):
        name, rest = found.group(1), plain[found.end() :].lstrip()
        if name in _WORDS or rest.startswith("(") or _inside_braces(plain, found.start()):
            continue
        start = found.end() + len(plain[found.end() :]) - len(rest)
        braces = expr[start : expr.index("}", start) + 1] if rest.startswith("{") else ""
        after = plain[start + len(braces) :]
        span = after[1 : after.index("]")] if after.startswith("[") else ""
        matchers = {label: operator + value for label, operator, value in _MATCHER.findall(braces)}
        yield Selector(name, matchers, span, _around(plain, found.start()))


def variables(text: str) -> set[str]:
    """Return the names of the variables in a text: `$name`, `${name}` and `${name:format}`."""
    return set(re.findall(r"\$\{?(\w+)", text))


def _without_strings(expr: str) -> str:
    return re.sub(r"\"[^\"]*\"|'[^']*'", lambda found: '"' + "_" * (len(found.group()) - 2) + '"', expr)


def _inside_braces(plain: str, place: int) -> bool:
    before = plain[:place]
    return before.count("{") > before.count("}") or before.count("[") > before.count("]")


def _around(plain: str, place: int) -> tuple[str, ...]:
    """Return the names before the parentheses that are open at a place, the innermost first."""
    depth, names = 0, []
    for index in range(place - 1, -1, -1):
        if plain[index] == ")":
            depth += 1
        elif plain[index] == "(":
            if depth == 0:
                names.append("".join(re.findall(r"(\w+)\s*$", plain[:index])))
            depth = max(0, depth - 1)
    return tuple(name for name in names if name)
