"""What the admin API and the live page answer, checked; members that this version does not know are left out.

Texts are made safe to print: one line, and no control character of the server reaches the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def one_line(text: str) -> str:
    """Return a text as one line of printable characters."""
    joined = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in joined)


Text = Annotated[str, AfterValidator(one_line)]


class Answer(BaseModel):
    """One JSON object of an answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


# ------------------------------------------------------------------------------------------------ GET state
class Patch(Answer):
    """A patch of one engine; None is what no rank has reported."""

    installed: bool | None = None
    enabled: bool | None = None
    last_change: float | None = None


class Generations(Answer):
    """The generation that a rank was asked for, and the one that it applies; None before its first snapshot."""

    desired: int | None = None
    applied: int | None = None


class Rank(Answer):
    """One worker process."""

    rank: Text
    version: Text
    vllm_version: Text
    fingerprint: Text
    generation: Generations
    snapshot_age_seconds: float | None = None

    @property
    def lags(self) -> bool:
        """Whether the rank does not apply what it was asked for."""
        return self.generation.desired != self.generation.applied


class Engine(Answer):
    """One engine with its ranks."""

    engine: Text
    model_name: Text
    patches: Mapping[Text, Patch]
    ranks: tuple[Rank, ...]


class Value(Answer):
    """A run-time value and where it comes from; `wanted` is what the settings say, None from a server without it."""

    value: Any
    origin: Text
    wanted: Any = None


class File(Answer):
    """The configuration file that the server follows."""

    path: Text
    good: bool
    error: Text | None = None
    restart_needed: tuple[Text, ...] | None = None


class Group(Answer):
    """What one group of a trial generated; mean log-probability of its tokens and standard error of that, nats."""

    tokens: int
    requests: int | None = None
    mean: float | None = None
    error: float | None = None
    nonfinite: int = 0


class Trial(Answer):
    """A switch that the guard tries on a `share` of the requests."""

    patch: Text
    enabled: bool
    share: float
    since: float
    who: Text
    measured: Mapping[Text, Group] | None = None
    reason: Text | None = None


class Control(Answer):
    """The run-time state of the whole server, or only the `error` that says why it is not known.

    `paused_seconds` tells how long the engine has been paused.
    """

    error: Text | None = None
    generation: int | None = None
    values: Mapping[Text, Value] = {}
    switching: bool = False
    paused_seconds: float | None = None
    file: File | None = None
    writable: bool = True
    guard: Trial | None = None

    @property
    def paused_by_others(self) -> bool:
        """Whether the engine is paused, and not by a change that is under way."""
        return self.paused_seconds is not None and not self.switching


class State(Answer):
    """Answer of `state`; `control` is None where changing is switched off."""

    time: float
    engines: tuple[Engine, ...]
    control: Control | None = None


# ------------------------------------------------------------------------------------------------ changes
class Delta(Answer):
    """One value before and after."""

    before: Any = Field(alias="from")
    after: Any = Field(alias="to")


Deltas = Mapping[Text, Delta]


class Outcome(Answer):
    """Answer of a change; `tried`: the guard tries it first."""

    generation: int
    changed: Deltas
    paused: bool = False
    seconds: float | None = None
    ranks: int | None = None
    tried: bool = False


class Preview(Answer):
    """Answer of `dry-run`."""

    generation: int
    changed: Deltas
    pauses: bool = False


class Change(Answer):
    """One entry of the audit."""

    generation: int
    time: float
    who: Text
    source: Text
    changed: Deltas
    result: Text
    error: Text | None = None
    seconds: float | None = None


class Changes(Answer):
    """Answer of `changes`, oldest first."""

    changes: tuple[Change, ...]


# ------------------------------------------------------------------------------------------------ GET live.json
Numbers = tuple[float | None, ...]


class LiveEngine(Answer):
    """What one engine measured: `latest` [layer] by metric, `series` [time] by metric and label."""

    engine: Text
    model_name: Text
    layers: tuple[Text, ...]
    series: Mapping[str, Mapping[Text, Numbers]]
    latest: Mapping[str, Numbers]


class Live(Answer):
    """Answer of `live.json`; `names` are all engines."""

    time: float
    stale_after_seconds: float
    times: tuple[float, ...]
    names: tuple[Text, ...]
    engines: tuple[LiveEngine, ...]
