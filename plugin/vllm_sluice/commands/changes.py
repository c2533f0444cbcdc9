"""`sluice changes`: the latest changes of a server's run-time values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vllm_sluice.commands.answers import Change
from vllm_sluice.commands.terminal import Line, Piece, Style, duration, line, moment, table

RESULTS: Mapping[str, Style] = {"applied": "green", "rolled back": "yellow", "failed": "red", "tried": "cyan"}


def report(changes: Sequence[Change]) -> list[Line]:
    """Return a table with a row for each change, and a line below those that did not go well."""
    if not changes:
        return [line("no change yet")]
    titles = ("time", "generation", "who", "result", "took", "changed")
    head = [Piece(title, "dim") for title in titles]
    first, *rows = table([head, *map(_row, changes)])
    lines = [first]
    for change, row in zip(changes, rows, strict=True):
        lines.append(row)
        if change.error:
            lines.append([Piece("  ! "), Piece(change.error, RESULTS.get(change.result, ""))])
    return lines


def who(change: Change) -> str:
    """Name who made a change; what the source adds stands behind the name."""
    return change.who if change.who == change.source else f"{change.who} ({change.source})"


def values(change: Change) -> str:
    """Return what changed, in one line."""
    parts = [
        f"{key}: {json.dumps(delta.before)} -> {json.dumps(delta.after)}"
        for key, delta in sorted(change.changed.items())
    ]
    return ", ".join(parts) or "nothing"


def _row(change: Change) -> tuple[Piece, ...]:
    return (
        Piece(moment(change.time)),
        Piece(str(change.generation)),
        Piece(who(change)),
        Piece(change.result, RESULTS.get(change.result, "")),
        Piece("" if change.seconds is None else duration(change.seconds)),
        Piece(values(change)),
    )
