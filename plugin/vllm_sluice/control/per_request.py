"""What a request may ask for in `vllm_xargs`: checked in the API server, before the request reaches the engine.

`{"sluice.stats": true}` asks for the request's own statistics, which come back with the answer.
`{"sluice.gate": false}` chooses whether the patch `gate` acts on this request. Cached keys and values hold for one
state of the patches only, so a request that chooses gets a cache salt that names its choice; one that does not shares
the cache of the server's own state.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from vllm_sluice import compat
from vllm_sluice.control.guard import ARGUMENT, group_of
from vllm_sluice.telemetry import request_summary
from vllm_sluice.telemetry.collector import SnapshotCollector
from vllm_sluice.telemetry.request_summary import is_own_ticket
from vllm_sluice.telemetry.snapshot import Snapshot

PREFIX = "sluice."
"""Every key that begins so is Sluice's."""

STATISTICS = request_summary.ARGUMENT
_ARGUMENTS = "vllm_xargs"
_SALT = "sluice:"
_SALT_LENGTH = 128
"""VLLM takes salts up to this length (entrypoints/generate/base/protocol.py), and external KV stores rely on it."""
_CACHE_SECONDS = 5.0
_MOST_STREAMS = 10_000


def key(kind: str) -> str:
    """Return the argument that chooses whether a patch acts."""
    return f"{PREFIX}{kind}"


def ask_for_statistics(arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """Return a request's arguments with a ticket in them, and the ticket, if it asks for its own statistics."""
    if arguments.get(STATISTICS) not in (True, 1):
        return None
    ticket = request_summary.new_ticket()
    return {**arguments, STATISTICS: ticket}, ticket


class RequestCheck:
    """Checks the arguments of requests and gives each combination of choices its own part of the prefix cache.

    Parameters
    ----------
    enabled
        Whether this server lets requests choose (`control.per_request`).
    kinds
        All patch kinds.
    installed
        Which patches are installed in this server, and which probes are on.
    trial
        Returns the guard's trial under way (`journal.Record.guard`), or None; None if there is no guard.
    """

    def __init__(
        self, enabled: bool, kinds: Sequence[str], installed: Installed,
        trial: Callable[[], Mapping[str, Any] | None] | None = None,
    ) -> None:
        self._enabled = enabled
        self._kinds = {key(kind): kind for kind in kinds}
        self._installed = installed
        self._trial = trial
        self._streams: dict[str, None] = {}

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, bool]:
        """Return what a request chose, by patch kind; empty if it leaves everything to the server.

        Raises
        ------
        Exception
            That vLLM answers with status 400, if an argument is unknown, has the wrong type or cannot be granted.
        """
        ours = {name: value for name, value in arguments.items() if name.startswith(PREFIX)}
        for name, value in ours.items():
            if problem := self._problem(name, value):
                raise compat.bad_request(problem, _ARGUMENTS)
        return {self._kinds[name]: bool(value) for name, value in ours.items() if name in self._kinds}

    def validate_openai(self, request: compat.OpenAIRequest) -> None:
        """Check the arguments of an OpenAI request as `validate` does, and whether its answer can hold what it asks.

        The beam search of vLLM would drop the arguments; a streamed answer has no place for statistics, and one answer
        to several prompts has one place for all.
        """
        self._refuse_imitation(request.salt)
        arguments = request.arguments
        names = sorted(name for name in arguments if name.startswith(PREFIX))
        self.validate(arguments)
        if names and request.beam_search:
            problem = f"vLLM's beam search ignores {_ARGUMENTS}; drop use_beam_search or the choice"
            raise compat.bad_request(f"{', '.join(names)}: {problem}", _ARGUMENTS)
        if not arguments.get(STATISTICS):
            return
        if not isinstance(arguments[STATISTICS], int):
            raise compat.bad_request(f"{STATISTICS}: true or false expected", _ARGUMENTS)
        if request.streamed:
            raise compat.bad_request(f"{STATISTICS}: a streamed answer cannot carry them; drop stream", _ARGUMENTS)
        if request.prompts > 1:
            problem = f"one answer to {request.prompts} prompts cannot carry them; send a request for each"
            raise compat.bad_request(f"{STATISTICS}: {problem}", _ARGUMENTS)

    def admit(
        self, request_id: str, arguments: Mapping[str, Any], salt: str | None, streams: bool = False
    ) -> tuple[Mapping[str, Any], str | None]:
        """Return a request's arguments and cache salt: its own, extended by what it chose or what the guard tries.

        Raises
        ------
        Exception
            As `validate` does, and if the request's own salt imitates one of Sluice's.
        """
        self._refuse_imitation(salt)
        chosen = self.validate(arguments)
        if self._is_stream(request_id, streams):
            if chosen or arguments.get(STATISTICS):
                names = sorted(name for name in arguments if name.startswith(PREFIX))
                raise compat.bad_request(f"{names[0]}: a streamed input cannot choose", _ARGUMENTS)
            return arguments, salt
        trial = self._trial() if self._trial is not None else None
        if trial and not chosen:
            group = group_of(request_id, trial["number"], trial["share"])
            arguments = {**arguments, ARGUMENT: f"{trial['number']}:{group}:{request_id}"}
            if group == "canary":
                chosen = {trial["patch"]: bool(trial["enabled"])}
                arguments[key(trial["patch"])] = int(trial["enabled"])
        return arguments, self._salt(chosen, salt)

    def _refuse_imitation(self, salt: str | None) -> None:
        guarded = self._trial is not None
        # Before a trial too: what was cached under such a salt would be taken for the canary's.
        if (self._enabled or guarded) and salt is not None and _SALT in salt:
            raise compat.bad_request(f"cache_salt {salt!r} contains {_SALT!r}, which Sluice adds itself", "cache_salt")

    def _is_stream(self, request_id: str, streams: bool) -> bool:
        """Tell whether this is a part of an input that comes in parts, which keep the first part's salt.

        `streams` says so of all parts but the last.
        """
        if streams:
            self._streams[request_id] = None
            while len(self._streams) > _MOST_STREAMS:
                self._streams.pop(next(iter(self._streams)))
            return True
        if request_id in self._streams:
            del self._streams[request_id]
            return True
        return False

    def _salt(self, chosen: Mapping[str, bool], salt: str | None) -> str | None:
        if not chosen:
            return salt
        suffix = _SALT + ",".join(f"{kind}={int(acts)}" for kind, acts in sorted(chosen.items()))
        if salt is None:
            return suffix
        if len(salt) + len(suffix) + 1 > _SALT_LENGTH:
            salt = hashlib.sha256(salt.encode()).hexdigest()
        return f"{salt}|{suffix}"

    def _problem(self, name: str, value: Any) -> str | None:
        if not self._enabled:
            return f"{name}: this server does not let requests choose; it needs control.per_request: true and a restart"
        if name not in (STATISTICS, *self._kinds):
            return f"{name}: unknown key; known: {', '.join(sorted((STATISTICS, *self._kinds)))}"
        truth = isinstance(value, int) and value in (0, 1)  # vLLM turns JSON's true and false into 1 and 0
        ticketed = name == STATISTICS and is_own_ticket(value)  # `ask_for_statistics` put it there
        if not truth and not ticketed:
            return f"{name}: true or false expected, found {value!r}"
        return self._not_there(name)

    def _not_there(self, name: str) -> str | None:
        if name == STATISTICS:
            on = self._installed.probes()
            return None if on else f"{name}: no probe is on in this server; `sluice state` says what is installed"
        installed = self._installed.patches()
        if self._kinds[name] not in installed:
            return (
                f"{name}: the patch {self._kinds[name]} is not installed in this server; "
                f"installed: {', '.join(sorted(installed)) or 'none'}"
            )
        return None


class Installed(Protocol):
    """What there is in a server."""

    def patches(self) -> Collection[str]:
        """Return the kinds of patches that are installed."""

    def probes(self) -> Collection[str]:
        """Return the kinds of probes that are on."""


class InstalledOnRanks:
    """What every rank of this server has installed, as the ranks' snapshots say; read again after a few seconds."""

    def __init__(self, collector: SnapshotCollector, clock: Callable[[], float] = time.monotonic) -> None:
        self._collector = collector
        self._clock = clock
        self._read_at = -float("inf")
        self._patches: frozenset[str] = frozenset()
        self._probes: frozenset[str] = frozenset()

    def patches(self) -> frozenset[str]:
        """Return the kinds of patches that are installed on every rank."""
        self._refresh()
        return self._patches

    def probes(self) -> frozenset[str]:
        """Return the kinds of probes that are on, on every rank."""
        self._refresh()
        return self._probes

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._read_at > _CACHE_SECONDS:
            self._read_at = now
            snapshots = self._collector.snapshots()
            self._patches = _on_all(snapshots, "sluice_patch_installed", "patch")
            self._probes = _on_all(snapshots, "sluice_probe_enabled", "probe")


def _on_all(snapshots: Sequence[Snapshot], metric: str, label: str) -> frozenset[str]:
    """Return the values of a label for which every rank has a 1."""
    ranks = [
        {
            dict(series.labels)[label]
            for series, value in zip(snapshot.series, snapshot.values.tolist(), strict=True)
            if series.metric == metric and value == 1
        }
        for snapshot in snapshots
    ]
    return frozenset(set.intersection(*ranks)) if ranks else frozenset()
