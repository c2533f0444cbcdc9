"""`sluice enable`, `disable` and `set`: change run-time values, or say what would change."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from vllm_sluice.commands.answers import Deltas, Outcome, Preview
from vllm_sluice.commands.client import Client, Conflict
from vllm_sluice.commands.problem import Problem
from vllm_sluice.commands.terminal import Line, Piece, duration, line, plural, say, table

Edits = Mapping[str, Any]
"""Dotted key, such as `patches.gate.enabled`, to value; None drops what an admin set."""


def preview(client: Client, edits: Edits, if_generation: int | None) -> None:
    """Print what a change would do.

    Raises
    ------
    Problem
        If the server refuses the values; a `Conflict` if it is at another generation.
    """
    answer = _ask(client, edits, if_generation)
    if not answer.changed:
        say([line(f"nothing would change; generation {answer.generation} is in force")])
        return
    pauses = "requests would pause for it" if answer.pauses else "no request would wait for it"
    say([*deltas(answer.changed), line(f"would make generation {answer.generation + 1}; {pauses}")])


def make(client: Client, edits: Edits, if_generation: int | None, *, guarded: bool = True) -> None:
    """Change values and print what was changed.

    There is one request for each patch and each probe. With several, all values are checked before the first request,
    and a generation that was asked for is that of the first; each further one then follows the one before.

    Raises
    ------
    Problem
        If the server refuses or cannot carry out a change; a `Conflict` if it is at another generation.
    """
    kinds = _by_kind(edits)
    if len(kinds) > 1:
        _ask(client, edits, if_generation)
        say([line(f"{len(kinds)} requests, one for each of {', '.join(kinds)}")])
    expected = if_generation
    for done, (kind, values) in enumerate(kinds.items()):
        try:
            path = kind.replace(".", "/") + ("" if guarded else "?guard=false")
            outcome = client.put(Outcome, path, values, expected)
        except Problem:
            if done:
                rest = list(kinds)
                print(
                    f"sluice: only {', '.join(rest[:done])} was changed; {', '.join(rest[done:])} was not, because:",
                    file=sys.stderr,
                )
            raise
        say(_report(outcome))
        expected = None if if_generation is None else outcome.generation


def deltas(changed: Deltas) -> list[Line]:
    """Return a line for each value that differs."""
    rows = [
        (Piece(key, "bold"), Piece(json.dumps(delta.before)), Piece("->", "dim"), Piece(json.dumps(delta.after)))
        for key, delta in sorted(changed.items())
    ]
    return table(rows) if rows else []


def _ask(client: Client, edits: Edits, if_generation: int | None) -> Preview:
    tree: dict[str, dict[str, Any]] = {}
    for kind, values in _by_kind(edits).items():
        section, _, name = kind.partition(".")
        tree.setdefault(section, {})[name] = values
    answer = client.post(Preview, "dry-run", tree)
    if if_generation is not None and answer.generation != if_generation:
        raise Conflict(
            f"generation {if_generation} was asked for, but {client.url} is at {answer.generation}; "
            "`sluice changes` says what changed",
            412,
        )
    return answer


def _by_kind(edits: Edits) -> dict[str, dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for dotted, value in edits.items():
        kind, _, key = dotted.rpartition(".")
        kinds.setdefault(kind, {})[key] = value
    return kinds


def _report(outcome: Outcome) -> list[Line]:
    if not outcome.changed:
        return [line(f"nothing to change; generation {outcome.generation} stays")]
    if outcome.tried:
        text = "the guard tries it on a share of the requests first; `sluice state` shows how it goes"
        return [*deltas(outcome.changed), [Piece(text, "cyan")]]
    ranks = "" if outcome.ranks is None else f" on {plural(outcome.ranks, 'rank')}"
    time = "" if outcome.seconds is None else f" after {duration(outcome.seconds)}"
    paused = ", requests paused meanwhile" if outcome.paused else ""
    in_force = Piece(f"generation {outcome.generation} in force", "green")
    return [*deltas(outcome.changed), [in_force, Piece(f"{ranks}{time}{paused}")]]
