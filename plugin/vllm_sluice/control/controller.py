"""Makes changes: reads the layers of settings, switches all ranks, and keeps the journal. One in every API server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_sluice import config
from vllm_sluice.config import Loaded
from vllm_sluice.control import state
from vllm_sluice.control.followed_file import FollowedFile
from vllm_sluice.control.journal import Change, Journal, Record, write_whole
from vllm_sluice.control.state import Installed, Refused, Values
from vllm_sluice.control.switch import AlreadyPaused, Engines, StillPaused, SwitchFailed, switch
from vllm_sluice.telemetry import rundir

logger = logging.getLogger("vllm.sluice.control")


class Moved(RuntimeError):
    """The generation is not the one that the change was made for."""


class TimedOut(RuntimeError):
    """The change takes longer than `control.timeout_seconds`; it is carried to its end."""


class NotReady(RuntimeError):
    """The ranks do not report, so nothing can be changed."""


class TrialUnderWay(RuntimeError):
    """The guard is trying a change, and nothing else is changed meanwhile."""


class RankReport(NamedTuple):
    """What a rank says in its snapshot.

    Attributes
    ----------
    desired, applied
        The generation that it was asked for last, and the one that it has.
    failed
        Probes that went off because of their errors.
    """

    desired: int
    applied: int
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """What a change did: `changed` is empty if everything was as asked already.

    `tried` says that nothing is in force yet: the guard tries the change on a share of the requests first.
    """

    generation: int
    changed: dict[str, dict[str, Any]]
    paused: bool = False
    seconds: float = 0.0
    ranks: int = 0
    tried: bool = False


class Controller:
    """Changes the run-time state of all ranks of all engines.

    Parameters
    ----------
    journal
        What the API servers of this server share.
    engines
        The engines.
    started
        The configuration that the server was started with.
    reports
        Returns what each rank reports, by name; raises `NotReady` if ranks are missing.
    """

    def __init__(
        self, journal: Journal, engines: Engines, started: Loaded, reports: Callable[[], Mapping[str, RankReport]]
    ) -> None:
        self.journal = journal
        self.engines = engines
        self.started = started
        self.reports = reports
        self.settings: config.Control = started.config.control
        self.file = FollowedFile(journal, started)
        self._installed: Installed | None = None
        self._running: set[asyncio.Task[Outcome]] = set()

    # ------------------------------------------------------------------------------------------------ reading
    async def installed(self) -> Installed:
        """Return what every rank has built in; asks the ranks once."""
        if self._installed is None:
            replies = await self._ask()
            patches, probes = ([frozenset(reply[section]) for reply in replies] for section in state.SECTIONS)
            self._installed = Installed(frozenset.intersection(*patches), frozenset.union(*probes))
        return self._installed

    async def describe(self) -> dict[str, Any]:
        """Return the state with the origin of every value, as plain JSON data."""
        record = self.journal.read()
        installed = await self.installed()
        loaded = state.with_admin(self.file.layers(), record.admin)
        wanted = state.values_of(loaded.config, installed)
        values = record.values if record.values is not None else wanted
        switching = record.switching
        paused = switching["since"] if switching and switching["paused"] else record.paused_since
        return {
            "generation": record.generation,
            "values": {
                key: {"value": value, "origin": state.origin(loaded, key), "wanted": wanted.get(key)}
                for key, value in values.items()
            },
            "switching": switching is not None,
            "paused_seconds": None if paused is None else round(max(0.0, time.time() - paused), 3),
            "file": record.file,
            "guard": record.guard,
        }

    async def preview(self, edits: Mapping[str, Any]) -> Outcome:
        """Say what a change would do.

        Raises
        ------
        Refused
            If it would be refused.
        """
        record = self.journal.read()
        before, after, _ = await self.target(record, edits)
        changed = state.difference(before, after) | self._gone_off(edits, after)
        return Outcome(record.generation, changed, paused=state.touches_output(changed))

    # ------------------------------------------------------------------------------------------------ changing
    async def change(
        self, edits: Mapping[str, Any], *, who: str, source: str = "admin", if_generation: int | None = None,
        guarded: bool = True,
    ) -> Outcome:
        """Make a change; answers when every rank has applied it.

        Parameters
        ----------
        edits
            Dotted key to value; None drops the admin's value. Empty to bring the ranks to what the settings say.
        who, source
            For the audit.
        if_generation
            Refuse if the state has another generation by now.
        guarded
            False to pass the guard by.

        Raises
        ------
        Refused, Moved, TrialUnderWay, AlreadyPaused, SwitchFailed, Busy, TimedOut, NotReady
            If the change was not made. After `TimedOut` it may still be.
        """
        change = self._change(edits, who, source, if_generation, guarded)
        task = asyncio.create_task(change, name="sluice-change")
        # Never cancelled: whoever waits for it may go away, but the engine must not stay paused.
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        limit = self.settings.timeout_seconds
        done, _ = await asyncio.wait({task}, timeout=limit)
        if not done:
            logger.error("sluice: a change takes more than %g s; it is carried to its end", limit)
            task.add_done_callback(_log_failure)
            raise TimedOut(
                f"the ranks have not applied the change within {limit:g} s; it is carried to its end, see state and "
                "changes"
            )
        return task.result()

    async def _change(
        self, edits: Mapping[str, Any], who: str, source: str, if_generation: int | None, guarded: bool
    ) -> Outcome:
        async with self.journal.locked(self.settings.timeout_seconds):
            record = self.journal.read()
            if if_generation is not None and if_generation != record.generation:
                raise Moved(f"the state has generation {record.generation}, not {if_generation}; read it and try again")
            if record.guard is not None:
                raise TrialUnderWay(
                    f"the guard is trying the patch {record.guard['patch']}; wait for its verdict, or end the trial "
                    "with DELETE guard"
                )
            before, after, admin = await self.target(record, edits)
            changed = state.difference(before, after) | self._gone_off(edits, after)
            if guarded and source == "admin" and self.settings.guard.enabled and (patch := _switched(changed)):
                return self._try(record, patch, edits, changed, who)
            if not changed:
                self._keep(record, admin)
                return Outcome(record.generation, {})
            return await self.carry_out(record, before, after, admin, changed, who, source)

    async def carry_out(
        self, record: Record, before: Values, after: Values, admin: Values, changed: dict[str, dict[str, Any]],
        who: str, source: str,
    ) -> Outcome:
        """Bring all ranks from `before` to `after` and note it in journal, audit and log; for the lock's holder.

        Raises
        ------
        AlreadyPaused, SwitchFailed, StillPaused, NotReady
            If the change was not made.
        """
        pause = state.touches_output(changed)
        generation = record.generation + 1
        began, clock = time.time(), time.monotonic()
        ranks = self.reports().keys()
        pid = os.getpid()
        switching = {"pid": pid, "start_ticks": rundir.start_ticks(pid), "since": began, "paused": pause}
        self.journal.update(switching=switching)
        error: Exception | None = None
        try:
            new = state.payload(state.of_kinds(after, changed), generation)
            old = state.payload(state.of_kinds(before, changed), record.generation)
            await switch(self.engines, new, old, pause=pause, ranks=ranks)
        except Exception as caught:
            error = caught
        seconds = time.monotonic() - clock
        if error is None:
            self.journal.update(generation=generation, values=after, switching=None)
            self._keep(record, admin)
        else:
            stuck = isinstance(error, StillPaused)
            self.journal.update(switching={**switching, "abandoned": True} if stuck else None)
        rolled_back = isinstance(error, AlreadyPaused) or (isinstance(error, SwitchFailed) and error.rolled_back)
        result: Any = "applied" if error is None else "rolled back" if rolled_back else "failed"
        text = None if error is None else str(error)
        self.journal.add(Change(generation, began, who, source, changed, result, text, round(seconds, 4)))
        what = ", ".join(f"{key}: {value['from']} -> {value['to']}" for key, value in changed.items())
        if error is not None:
            logger.error("sluice: %s by %s (%s): %s: %s", result, who, source, what, error)
            raise error
        logger.info("sluice: generation %d by %s (%s) in %.0f ms: %s", generation, who, source, 1e3 * seconds, what)
        return Outcome(generation, changed, pause, round(seconds, 4), len(ranks))

    def _try(
        self, record: Record, patch: str, edits: Mapping[str, Any], changed: dict[str, dict[str, Any]], who: str
    ) -> Outcome:
        """Begin a trial; for the holder of the lock."""
        if self.engines.speculates:
            raise Refused("the guard cannot measure speculated tokens; pass it by with ?guard=false")
        now = time.time()
        settings = self.settings.guard
        trial = {
            "number": int(1000 * now), "patch": patch, "enabled": changed[f"patches.{patch}.enabled"]["to"],
            "edits": dict(edits), "share": settings.share, "since": now, "who": who, "measured": None, "reason": None,
        }  # fmt: skip
        self.journal.update(guard=trial)
        self.journal.add(Change(record.generation, now, who, "admin", changed, "tried", None, 0.0))
        logger.info("sluice: %s tries the patch %s on %.0f %% of the requests", who, patch, 100 * settings.share)
        return Outcome(record.generation, changed, tried=True)

    async def target(self, record: Record, edits: Mapping[str, Any]) -> tuple[Values, Values, Values]:
        """Return the values now, those that edits would give, and what the admin would then have set."""
        installed = await self.installed()
        layers = self.file.layers()
        before = record.values
        if before is None:
            before = state.values_of(self.started.config, installed)
        admin = {key: value for key, value in {**record.admin, **edits}.items() if value is not None}
        after = state.values_of(state.with_admin(layers, admin).config, installed)
        return before, after, admin

    def _gone_off(self, edits: Iterable[str], after: Values) -> dict[str, dict[str, Any]]:
        """Return the probes that somebody asks for and that went off by themselves on some rank, after errors."""
        asked = {probe: key for key in edits if (probe := state.probe_enabled_by(key)) and after.get(key)}
        failed = frozenset[str]().union(*(report.failed for report in self.reports().values())) if asked else ()
        return {key: {"from": False, "to": True} for probe, key in asked.items() if probe in failed}

    def _keep(self, record: Record, admin: Values) -> None:
        if admin == record.admin:
            return
        self.journal.update(admin=admin)
        if self.settings.state_file is not None:
            try:
                write_whole(Path(self.settings.state_file), json.dumps(admin, indent=2) + "\n")
            except OSError as error:
                logger.error("sluice: control.state_file %s cannot be written: %s", self.settings.state_file, error)

    async def _ask(self) -> list[Mapping[str, Any]]:
        self.reports()
        replies = list(await self.engines.call("state"))
        bad = [reply for reply in replies if "error" in reply]
        if bad or not replies:
            raise NotReady(f"the ranks do not say what they run: {bad[0]['error'] if bad else 'no reply'}")
        return replies

def _switched(changed: Mapping[str, Any]) -> str | None:
    """Return the patch that a change switches on or off, if it does nothing else."""
    keys = [key.split(".") for key in changed]
    if len(keys) == 1 and keys[0][0] == "patches" and keys[0][2] == "enabled":
        return keys[0][1]
    return None


def _log_failure(task: asyncio.Task[Outcome]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("sluice: the change that took too long failed: %s", task.exception())
