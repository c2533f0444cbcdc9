"""Makes changes: reads the layers of settings, switches all ranks, and keeps the journal. One in every API server."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sluice import config
from vllm_sluice.config import Loaded
from vllm_sluice.control import guard, state
from vllm_sluice.control.journal import Busy, Change, Journal, Record, stamp, write_whole
from vllm_sluice.control.state import Installed, Refused, Values
from vllm_sluice.control.switch import AlreadyPaused, Engines, StillPaused, SwitchFailed, switch
from vllm_sluice.telemetry import rundir

logger = logging.getLogger("vllm.sluice.control")

_AFTER_FAILURE = 30.0
"""Seconds before something that failed is tried again."""
_LOOK_FOR_PAUSE = 2.0


class Moved(RuntimeError):
    """The generation is not the one that the change was made for."""


class TimedOut(RuntimeError):
    """The change takes longer than `control.timeout_seconds`; it is carried to its end."""


class NotReady(RuntimeError):
    """The ranks do not report, so nothing can be changed."""


class TrialUnderWay(RuntimeError):
    """The guard is trying a change, and nothing else is changed meanwhile."""


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


@dataclass(frozen=True)
class FileState:
    """The configuration file as last seen."""

    path: str
    good: bool = True
    error: str | None = None
    restart_needed: tuple[str, ...] = ()


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
    applied
        Returns the generation that each rank has applied, by name; raises `NotReady` if ranks are missing.
    """

    def __init__(
        self, journal: Journal, engines: Engines, started: Loaded, applied: Callable[[], Mapping[str, int]]
    ) -> None:
        self.journal = journal
        self._engines = engines
        self._started = started
        self._applied = applied
        self._settings: config.Control = started.config.control
        self._file = os.environ.get(config.CONFIG_VARIABLE) or None
        self._seen: tuple[int, ...] | None = None
        self._layers = started
        self._file_state = FileState(self._file) if self._file else None
        self._installed: Installed | None = None
        self._running: set[asyncio.Task[Outcome]] = set()
        self._lagging = 0
        self._source = "file"
        self._not_before = {"converge": 0.0, "recover": 0.0, "pause": 0.0}
        self._told: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------ reading
    async def installed(self) -> Installed:
        """Return what every rank has built in; asks the ranks once."""
        if self._installed is None:
            replies = await self._ask()
            patches, probes = ([frozenset(reply[section]) for reply in replies] for section in state.SECTIONS)
            self._installed = Installed(frozenset.intersection(*patches), frozenset.union(*probes))
        return self._installed

    def layers(self) -> Loaded:
        """Return file, environment and defaults; a file that cannot be used leaves the last good ones."""
        if self._file is None or (now := stamp(Path(self._file))) == self._seen:
            return self._layers
        self._seen = now
        try:
            loaded = config.load(self._file)
        except config.ConfigError as error:
            self._file_state = FileState(self._file, good=False, error=str(error))
            logger.error("sluice: %s cannot be used, so the last good state stays: %s", self._file, error)
            kept = self.journal.read().layers  # another API server may have read the file more lately
            if kept is not None:
                settings = config.Config.model_validate_json(json.dumps(kept["config"]))
                self._layers = Loaded(settings, kept["origins"])
            return self._layers
        needed = state.restart_needed(self._started.config, loaded.config)
        if needed:
            logger.warning("sluice: %s changes %s, which takes a restart of the server", self._file, ", ".join(needed))
        self._layers = loaded
        self._file_state = FileState(self._file, restart_needed=tuple(needed))
        return loaded

    async def describe(self) -> dict[str, Any]:
        """Return the state with the origin of every value, as plain JSON data."""
        record = self.journal.read()
        installed = await self.installed()
        loaded = state.with_admin(self.layers(), record.admin)
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
        before, after, _ = await self._target(record, edits)
        changed = state.difference(before, after)
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
        limit = self._settings.timeout_seconds
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
        async with self.journal.locked(self._settings.timeout_seconds):
            record = self.journal.read()
            if if_generation is not None and if_generation != record.generation:
                raise Moved(f"the state has generation {record.generation}, not {if_generation}; read it and try again")
            if record.guard is not None:
                raise TrialUnderWay(
                    f"the guard is trying the patch {record.guard['patch']}; wait for its verdict, or end the trial "
                    "with DELETE guard"
                )
            before, after, admin = await self._target(record, edits)
            changed = state.difference(before, after)
            if guarded and source == "admin" and self._settings.guard.enabled and (patch := _switched(changed)):
                return self._try(record, patch, edits, changed, who)
            if not changed:
                self._keep(record, admin)
                return Outcome(record.generation, {})
            return await self._switch(record, before, after, admin, changed, who, source)

    async def _switch(
        self, record: Record, before: Values, after: Values, admin: Values, changed: dict[str, dict[str, Any]],
        who: str, source: str,
    ) -> Outcome:
        pause = state.touches_output(changed)
        generation = record.generation + 1
        began, clock = time.time(), time.monotonic()
        ranks = self._applied().keys()
        switching = {"pid": os.getpid(), "since": began, "paused": pause}
        self.journal.update(switching=switching)
        error: Exception | None = None
        try:
            new = state.payload(state.of_kinds(after, changed), generation)
            old = state.payload(state.of_kinds(before, changed), record.generation)
            await switch(self._engines, new, old, pause=pause, ranks=ranks)
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

    # ------------------------------------------------------------------------------------------------ the guard
    def _try(
        self, record: Record, patch: str, edits: Mapping[str, Any], changed: dict[str, dict[str, Any]], who: str
    ) -> Outcome:
        """Begin a trial; for the holder of the lock."""
        if self._engines.speculates:
            raise Refused("the guard cannot measure speculated tokens; pass it by with ?guard=false")
        now = time.time()
        settings = self._settings.guard
        trial = {
            "number": int(1000 * now), "patch": patch, "enabled": changed[f"patches.{patch}.enabled"]["to"],
            "edits": dict(edits), "share": settings.share, "since": now, "who": who, "measured": None, "reason": None,
        }  # fmt: skip
        self.journal.update(guard=trial)
        self.journal.add(Change(record.generation, now, who, "admin", changed, "tried", None, 0.0))
        logger.info("sluice: %s tries the patch %s on %.0f %% of the requests", who, patch, 100 * settings.share)
        return Outcome(record.generation, changed, tried=True)

    async def end_trial(self, who: str) -> Outcome:
        """End a trial without switching anything.

        Raises
        ------
        LookupError
            If there is none.
        """
        return await self._conclude("roll back", f"ended by {who}", who)

    async def _guard(self) -> None:
        """Look at a trial under way: measure, compare, and complete or roll back when it is time."""
        trial = self.journal.read().guard
        if trial is None or await self._engines.is_paused():
            return
        replies = await self._engines.call("guard")
        measured = guard.combine(replies, trial["number"])
        verdict = guard.judge(measured, time.time() - trial["since"], self._settings.guard)
        if broken := next((reply["broken"] for reply in replies if reply.get("broken")), None):
            verdict = guard.Verdict("roll back", f"it could not be measured: {broken}")
        async with self.journal.locked(self._settings.timeout_seconds):
            current = self.journal.read().guard
            if current is None or current["number"] != trial["number"]:
                return
            shown = {name: {**vars(group), "mean": _number(group.mean)} for name, group in measured.items()}
            self.journal.update(guard={**trial, "measured": shown, "reason": verdict.reason})
        if verdict.action != "wait":
            await self._conclude(verdict.action, verdict.reason, trial["who"])

    async def _conclude(self, action: str, reason: str, who: str) -> Outcome:
        async with self.journal.locked(self._settings.timeout_seconds):
            record = self.journal.read()
            if record.guard is None:
                raise LookupError("the guard is trying nothing")
            trial = record.guard
            key = f"patches.{trial['patch']}.enabled"
            if action == "complete":
                before, after, admin = await self._target(record, trial["edits"])
                changed = state.difference(before, after)
                try:
                    done = await self._switch(record, before, after, admin, changed, who, "guard")
                except (AlreadyPaused, NotReady) as error:
                    logger.error("sluice: the guard would complete %s; trying again: %s", key, error)
                    return Outcome(record.generation, {})
                except SwitchFailed:
                    self.journal.update(guard=None)  # the audit has it
                    raise
                logger.info("sluice: the guard completed %s: %s", key, reason)
                self.journal.update(guard=None)
                return done
            self.journal.update(guard=None)
            changed = {key: {"from": not trial["enabled"], "to": trial["enabled"]}}
            seconds = round(time.time() - trial["since"], 3)
            self.journal.add(
                Change(record.generation, trial["since"], who, "guard", changed, "rolled back", reason, seconds)
            )
            logger.error("sluice: the guard rolled %s back: %s", key, reason)
            return Outcome(record.generation, {})

    async def _target(self, record: Record, edits: Mapping[str, Any]) -> tuple[Values, Values, Values]:
        installed = await self.installed()
        layers = self.layers()
        before = record.values
        if before is None:
            before = state.values_of(self._started.config, installed)
        admin = {key: value for key, value in {**record.admin, **edits}.items() if value is not None}
        after = state.values_of(state.with_admin(layers, admin).config, installed)
        return before, after, admin

    def _keep(self, record: Record, admin: Values) -> None:
        if admin == record.admin:
            return
        self.journal.update(admin=admin)
        if self._settings.state_file is not None:
            try:
                write_whole(Path(self._settings.state_file), json.dumps(admin, indent=2) + "\n")
            except OSError as error:
                logger.error("sluice: control.state_file %s cannot be written: %s", self._settings.state_file, error)

    async def _ask(self) -> list[Mapping[str, Any]]:
        self._applied()
        replies = list(await self._engines.call("state"))
        bad = [reply for reply in replies if "error" in reply]
        if bad or not replies:
            raise NotReady(f"the ranks do not say what they run: {bad[0]['error'] if bad else 'no reply'}")
        return replies

    # ------------------------------------------------------------------------------------------------ watching
    async def follow(self) -> None:
        """Bring the ranks to what file and state file say, again and again; for one API server of a server."""
        await self._guarded("the state file", self._restore)
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            for what, step in (
                ("the configuration file", self._note_file),
                ("late ranks", self._recover),
                ("the guard", self._guard),
                ("the settings", self._converge),
                ("the pause", self._note_pause),
            ):
                await self._guarded(what, step)

    async def _guarded(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Take one step; a problem is logged when it is a new one, and no other step suffers from it."""
        try:
            await step()
            self._told.pop(what, None)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if self._told.get(what) != text:
                self._told[what] = text
                known = isinstance(error, (Refused, AlreadyPaused, SwitchFailed, StillPaused, TimedOut, NotReady, Busy))
                logger.error("sluice: %s: %s; it will be tried again", what, text, exc_info=None if known else error)

    async def _converge(self) -> None:
        """Bring the ranks to what the settings say, unless a trial is under way or it failed a moment ago."""
        if self.journal.read().guard is not None or time.monotonic() < self._not_before["converge"]:
            return
        if (await self.preview({})).changed:
            self._not_before["converge"] = time.monotonic() + _AFTER_FAILURE
            await self.change({}, who=self._file or "start", source=self._source)
            self._not_before["converge"] = 0.0
            self._source = "file"

    async def _restore(self) -> None:
        """Take back what was set over HTTP before the last restart; `_converge` brings it to the ranks.

        Keys that do not fit any more are left out, and a file that cannot be read is moved aside: nothing is lost.
        """
        file = self._settings.state_file and Path(self._settings.state_file)
        if not file or not file.exists():
            return
        try:
            kept = json.loads(file.read_text())
            if not isinstance(kept, dict):
                raise ValueError(f"it holds {type(kept).__name__}, not an object")
        except (OSError, ValueError) as error:
            aside = file.with_name(file.name + ".unreadable")
            logger.error("sluice: control.state_file %s cannot be used and is moved to %s: %s", file, aside, error)
            file.replace(aside)
            return
        admin: Values = {}
        for key, value in kept.items():
            try:
                state.with_admin(self.layers(), {key: value})
                admin[key] = value
            except Refused as error:
                logger.error("sluice: control.state_file %s: %s; this key is left out", file, error)
        self._source = "start"
        async with self.journal.locked(self._settings.timeout_seconds):
            self.journal.update(admin={**admin, **self.journal.read().admin})

    async def _note_file(self) -> None:
        layers = self.layers()
        seen = self._file_state
        if seen is None:
            return
        file = {**vars(seen), "restart_needed": list(seen.restart_needed)}
        record = self.journal.read()
        kept = {"config": layers.config.model_dump(mode="json"), "origins": dict(layers.origins)}
        if record.file != file or record.layers != kept:
            async with self.journal.locked(self._settings.timeout_seconds):
                self.journal.update(file=file, layers=kept)

    async def _recover(self) -> None:
        """Finish what an API server left behind that died in the middle of a switch, and bring back late ranks.

        A rank is late if its generation is not the journal's although no change is under way, as after a restart of
        its engine alone. What is cached then may belong to another state, so the engine is paused in any case.
        """
        if time.monotonic() < self._not_before["recover"] or not self._left_behind():
            return
        async with self.journal.locked(self._settings.timeout_seconds):
            if not (why := self._left_behind()):
                return
            record = self.journal.read()
            installed = await self.installed()
            values = record.values or state.values_of(self._started.config, installed)
            owned = record.switching is not None and bool(record.switching["paused"])
            logger.error("sluice: %s; applying generation %d again", why, record.generation)
            payload = state.payload(values, record.generation)
            self._not_before["recover"] = time.monotonic() + _AFTER_FAILURE
            pause, ranks = bool(installed.patches) or owned, self._applied().keys()
            began, error = time.time(), None
            try:
                await switch(self._engines, payload, payload, pause=pause, ranks=ranks, owned=owned)
                self.journal.update(switching=None)
                self._not_before["recover"] = 0.0
            except Exception as caught:
                error = caught
                raise
            finally:
                self._lagging = 0
                result: Any = "applied" if error is None else "failed"
                text = why if error is None else f"{why}: {error}"
                seconds = round(time.time() - began, 4)
                self.journal.add(Change(record.generation, began, "sluice", "recovery", {}, result, text, seconds))

    def _left_behind(self) -> str | None:
        record = self.journal.read()
        if record.switching is not None:
            if record.switching.get("abandoned"):
                return "the engine did not resume after a switch"
            dead = not rundir.alive(record.switching["pid"])
            return "an API server died in the middle of a switch" if dead else None
        late = [rank for rank, generation in self._applied().items() if generation != record.generation]
        self._lagging = self._lagging + 1 if late else 0
        return f"rank {late[0]} has another generation" if self._lagging > 3 else None

    async def _note_pause(self) -> None:
        """Note since when somebody keeps the engine paused; our own switches hold the lock."""
        if time.monotonic() < self._not_before["pause"]:
            return
        self._not_before["pause"] = time.monotonic() + _LOOK_FOR_PAUSE
        async with self.journal.locked(self._settings.timeout_seconds):
            paused = await self._engines.is_paused()
            since = self.journal.read().paused_since
            if paused and since is None:
                self.journal.update(paused_since=time.time())
            elif not paused and since is not None:
                self.journal.update(paused_since=None)
            elif paused and since is not None and time.time() - since > 30:
                logger.warning("sluice: the engine has been paused for %.0f s", time.time() - since)


def _switched(changed: Mapping[str, Any]) -> str | None:
    """Return the patch that a change switches on or off, if it does nothing else."""
    keys = [key.split(".") for key in changed]
    if len(keys) == 1 and keys[0][0] == "patches" and keys[0][2] == "enabled":
        return keys[0][1]
    return None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _log_failure(task: asyncio.Task[Outcome]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("sluice: the change that took too long failed: %s", task.exception())
