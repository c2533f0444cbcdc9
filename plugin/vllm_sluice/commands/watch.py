"""`sluice watch`: a line for each change of a server's run-time values, pause, file and ranks, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from vllm_sluice.commands.answers import Change, Changes, Control, State
from vllm_sluice.commands.changes import RESULTS, values, who
from vllm_sluice.commands.client import Client
from vllm_sluice.commands.problem import Problem
from vllm_sluice.commands.state import lag
from vllm_sluice.commands.terminal import Line, Piece, Style, duration, moment, plural, say

_LIMIT = 100
_GOOD = ("running", "good", "up to date", "allowed")

Facts = Mapping[str, str]
"""What is watched and how it is, such as `rank pp0-tp0 of engine 0`: `up to date`."""


def run(client: Client, interval: float) -> None:
    """Print changes for ever; a server that stops answering is a change, too.

    Raises
    ------
    Problem
        If there is no server in the beginning.
    """
    watched = Watch(client)
    say([watched.begin()])
    while True:
        time.sleep(interval)
        lines = watched.look()
        if lines:
            say(lines)


class Watch:
    """Compares what a server says with what it said before."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._facts: Facts = {}
        self._seen: set[tuple[int, float, str]] = set()
        self._lost = False

    def begin(self) -> Line:
        """Take a first look; return a line that says what there is.

        Raises
        ------
        Problem
            If the server does not answer.
        """
        state, changes = self._ask()
        self._facts = facts(state)
        self._seen = set(map(_identity, changes))
        known = None if state.control is None else state.control.generation
        generation = "generation not known" if known is None else f"generation {known}"
        ranks = plural(sum(len(engine.ranks) for engine in state.engines), "rank")
        odd = "".join(f"; {what}: {how}" for what, how in self._facts.items() if how not in _GOOD)
        return _line(state.time, f"watching {self._client.url}: {generation}, {ranks}{odd}")

    def look(self) -> list[Line]:
        """Look again; return what is new."""
        try:
            state, changes = self._ask()
        except Problem as error:
            lost, self._lost = self._lost, True
            return [] if lost else [_line(time.time(), str(error), "red")]
        lines = [_line(state.time, f"{self._client.url} answers again", "green")] if self._lost else []
        self._lost = False
        lines += [_change(change) for change in changes if _identity(change) not in self._seen]
        self._seen = set(map(_identity, changes))
        now = facts(state)
        lines += [
            _line(state.time, f"{what}: {how}", "green" if how in _GOOD else "yellow")
            for what, how in _differences(self._facts, now)
        ]
        self._facts = now
        return lines

    def _ask(self) -> tuple[State, tuple[Change, ...]]:
        changes: tuple[Change, ...] = ()
        state = self._client.read(State, "state")
        if state.control is not None:
            changes = self._client.read(Changes, "changes", limit=_LIMIT).changes
        return state, changes


def facts(state: State) -> Facts:
    """Return what is watched of a state."""
    found: dict[str, str] = {}
    for engine in state.engines:
        for rank in engine.ranks:
            found[f"rank {rank.rank} of engine {engine.engine}"] = lag(rank) if rank.lags else "up to date"
    control = state.control
    found["changing"] = _changing(control)
    if control is not None:
        found["requests"] = "paused, and not by a change of Sluice" if control.paused_by_others else "running"
        if control.file is not None:
            bad = f"cannot be used: {control.file.error or 'see the log'}"
            found[f"file {control.file.path}"] = "good" if control.file.good else bad
    return found


def _changing(control: Control | None) -> str:
    if control is None:
        return "switched off"
    if control.error is not None:
        return f"not possible: {control.error}"
    return "allowed" if control.writable else "read-only"


def _differences(before: Facts, now: Facts) -> Iterator[tuple[str, str]]:
    for what, how in now.items():
        if before.get(what) != how:
            yield what, how
    for what in sorted(before.keys() - now.keys()):
        yield what, "gone"


def _identity(change: Change) -> tuple[int, float, str]:
    return change.generation, change.time, change.result


def _change(change: Change) -> Line:
    took = "" if change.seconds is None else f" after {duration(change.seconds)}"
    error = f": {change.error}" if change.error else ""
    return [
        Piece(f"{moment(change.time)}  generation {change.generation} by {who(change)} "),
        Piece(change.result, RESULTS.get(change.result, "")),
        Piece(f"{took}, {values(change)}{error}"),
    ]


def _line(now: float, text: str, style: Style = "") -> Line:
    return [Piece(f"{moment(now)}  "), Piece(text, style)]
