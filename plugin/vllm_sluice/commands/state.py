"""`sluice state`: a running server's engines, ranks, patches and run-time values, and what is not as it should be."""

from __future__ import annotations

import json
from collections.abc import Iterator

from vllm_sluice.commands.answers import Control, Engine, Patch, Rank, State, Trial, Value
from vllm_sluice.commands.terminal import Line, Piece, Style, duration, line, moment, table

_LONG_PAUSE = 10.0
_ORIGINS: dict[str, Style] = {"admin": "cyan", "default": "dim"}


def report(state: State, url: str) -> list[Line]:
    """Return the report on a state that a server at `url` gave."""
    lines: list[Line] = [_header(state.control, url)]
    for engine in state.engines:
        lines += [line(""), *_engine(engine, state.time)]
    if state.control is not None and state.control.values:
        lines += [line(""), *_values(state.control)]
    if state.control is not None and state.control.guard is not None:
        lines += [line(""), *_trial(state.control.guard, state.time)]
    found = warnings(state)
    if found:
        lines += [line(""), *(line(f"! {text}", "yellow") for text in found)]
    return lines


def warnings(state: State) -> list[str]:
    """Say what is not as it should be, with the remedy."""
    found = [] if state.engines else ["no worker reports; while a model loads this is normal, else see the log"]
    found += [
        f"engine {engine.engine}, rank {rank.rank}: {lag(rank)}; if that lasts longer than a second, see its log"
        for engine in state.engines
        for rank in engine.ranks
        if rank.lags
    ]
    if state.control is not None:
        found += _control_warnings(state.control)
    return found


def lag(rank: Rank) -> str:
    """Say how far a rank is from what it was asked for."""
    return f"applies generation {_known(rank.generation.applied)}, asked for is {_known(rank.generation.desired)}"


def _header(control: Control | None, url: str) -> Line:
    server = Piece(url, "bold")
    if control is None:
        return [server, Piece(": run-time values cannot be changed (its setting control.enabled is false)")]
    if control.generation is None:
        return [server, Piece(": the run-time state is not known", "yellow")]
    if control.switching:
        doing = Piece("a change is under way", "cyan")
    elif control.paused_seconds is not None:
        doing = Piece(f"paused for {duration(control.paused_seconds)}", "yellow")
    else:
        doing = Piece("running", "green")
    only = "" if control.writable else ", read-only (it has no admin token)"
    return [server, Piece(f": generation {control.generation}, "), doing, Piece(only)]


def _engine(engine: Engine, now: float) -> Iterator[Line]:
    versions = sorted({f"Sluice {rank.version}, vLLM {rank.vllm_version}" for rank in engine.ranks})
    yield [
        Piece(f"engine {engine.engine}", "bold"),
        Piece(f": {engine.model_name}"),
        Piece(f" ({'; '.join(versions)})" if versions else "", "dim"),
    ]
    yield line("")
    yield from _indented(table([_head("rank", "generation", "snapshot", "fingerprint"), *map(_rank, engine.ranks)]))
    yield line("")
    if engine.patches:
        rows = [_patch(name, patch, now) for name, patch in sorted(engine.patches.items())]
        yield from _indented(table([_head("patch", "installed", "acts", "since"), *rows]))
    else:
        yield line("  no patch")


def _rank(rank: Rank) -> tuple[Piece, ...]:
    age = rank.snapshot_age_seconds
    return (
        Piece(rank.rank),
        Piece(_known(rank.generation.applied), "yellow" if rank.lags else ""),
        Piece("none yet" if age is None else f"{duration(age)} ago"),
        Piece(rank.fingerprint, "dim"),
    )


def _patch(name: str, patch: Patch, now: float) -> tuple[Piece, ...]:
    since = "the start"
    if patch.last_change is not None:
        since = f"{moment(patch.last_change)}, {duration(max(0.0, now - patch.last_change))} ago"
    acts = {True: Piece("on", "green"), False: Piece("off", "yellow"), None: Piece("?")}[patch.enabled]
    installed = {True: "yes", False: "no", None: "?"}[patch.installed]
    return (
        Piece(name),
        Piece(installed),
        acts if patch.installed else Piece("-"),
        Piece(since if patch.installed else "-"),
    )


def _values(control: Control) -> list[Line]:
    rows = [_value(key, value) for key, value in sorted(control.values.items())]
    return table([_head("run-time value", "in force", "from"), *rows])


def _trial(trial: Trial, now: float) -> Iterator[Line]:
    """Say what the guard tries and how the groups do."""
    what = f"patches.{trial.patch}.enabled: {json.dumps(trial.enabled)}"
    since = duration(max(0.0, now - trial.since))
    tries = f": tries {what} on {trial.share:.0%} of the requests, for {since} ({trial.who})"
    yield [Piece("guard", "bold"), Piece(tries)]
    for name, group in sorted((trial.measured or {}).items()):
        mean = "-" if group.mean is None else f"{group.mean:.3f}"
        error = "" if group.error is None else f" (error {group.error:.3f})"
        what = f"{group.tokens} tokens" + ("" if group.requests is None else f" of {group.requests} requests")
        yield line(f"  {name}: {what}, mean log-probability {mean} nats{error}, {group.nonfinite} non-finite")
    if trial.reason:
        yield line(f"  {trial.reason}")


def _value(key: str, value: Value) -> tuple[Piece, ...]:
    return Piece(key), Piece(json.dumps(value.value)), Piece(value.origin, _ORIGINS.get(value.origin, ""))


def _control_warnings(control: Control) -> Iterator[str]:
    if control.error is not None or control.generation is None:
        yield f"no change can be made: {control.error or 'the server does not say why; see its log'}"
    if control.paused_seconds is not None and control.paused_by_others:
        yield (
            f"the engine has been paused for {duration(control.paused_seconds)}, and not by a change of Sluice: "
            "requests wait, and changes are refused until whoever paused it resumes it"
        )
    elif control.paused_seconds is not None and control.paused_seconds > _LONG_PAUSE:
        yield f"a change has kept the engine paused for {duration(control.paused_seconds)}; see the server's log"
    for key, known in sorted(control.values.items()):
        if known.wanted is not None and known.wanted != known.value and not control.switching:
            yield (
                f"{key} is {json.dumps(known.value)}, but the settings say {json.dumps(known.wanted)}; "
                "`sluice changes` says why that is not in force"
            )
    file = control.file
    if file is not None and not file.good:
        yield f"{file.path} cannot be used, so what was read before stays in force: {file.error or 'see the log'}"
    if file is not None and file.restart_needed:
        yield f"{file.path} changes {', '.join(file.restart_needed)}, which takes a restart of the server"


def _head(*titles: str) -> tuple[Piece, ...]:
    return tuple(Piece(title, "dim") for title in titles)


def _indented(lines: list[Line]) -> Iterator[Line]:
    for pieces in lines:
        yield [Piece("  "), *pieces]


def _known(generation: int | None) -> str:
    return "?" if generation is None else str(generation)
