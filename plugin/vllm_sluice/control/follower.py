"""Follows what changes by itself: the configuration file, late ranks, a trial, the pause. One in a whole server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vllm_sluice.control import state, trials
from vllm_sluice.control.controller import Controller, NotReady, TimedOut
from vllm_sluice.control.journal import Busy, Change
from vllm_sluice.control.state import Refused, Values
from vllm_sluice.control.switch import AlreadyPaused, StillPaused, SwitchFailed, switch
from vllm_sluice.telemetry import rundir

logger = logging.getLogger("vllm.sluice.control")

_AFTER_FAILURE = 30.0
"""Seconds before something that failed is tried again."""
_LOOK_FOR_PAUSE = 2.0


class Follower:
    """Brings the ranks to what file and state file say, and notes what others do; `follow` in the first API server."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._journal = controller.journal
        self._lagging = 0
        self._source = "file"
        self._not_before = {"converge": 0.0, "recover": 0.0, "pause": 0.0}
        self._told: dict[str, str] = {}

    async def follow(self) -> None:
        """Bring the ranks to what file and state file say, again and again; for one API server of a server."""
        await self._guarded("the state file", self._restore)
        while True:
            await asyncio.sleep(self._controller.settings.watch_seconds)
            for what, step in (
                ("the configuration file", self._note_file),
                ("late ranks", self._recover),
                ("the guard", lambda: trials.look(self._controller)),
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
        if self._journal.read().guard is not None or time.monotonic() < self._not_before["converge"]:
            return
        if (await self._controller.preview({})).changed:
            self._not_before["converge"] = time.monotonic() + _AFTER_FAILURE
            file = self._controller.file.state
            await self._controller.change({}, who=file.path if file else "start", source=self._source)
            self._not_before["converge"] = 0.0
            self._source = "file"

    async def _restore(self) -> None:
        """Take back what was set over HTTP before the last restart; `_converge` brings it to the ranks.

        Keys that do not fit any more are left out, and a file that cannot be read is moved aside: nothing is lost.
        """
        file = self._controller.settings.state_file and Path(self._controller.settings.state_file)
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
                state.with_admin(self._controller.file.layers(), {key: value})
                admin[key] = value
            except Refused as error:
                logger.error("sluice: control.state_file %s: %s; this key is left out", file, error)
        self._source = "start"
        async with self._journal.locked(self._controller.settings.timeout_seconds):
            self._journal.update(admin={**admin, **self._journal.read().admin})

    async def _note_file(self) -> None:
        layers = self._controller.file.layers()
        seen = self._controller.file.state
        if seen is None:
            return
        file = {**vars(seen), "restart_needed": list(seen.restart_needed)}
        record = self._journal.read()
        kept = {"config": layers.config.model_dump(mode="json"), "origins": dict(layers.origins)}
        if record.file != file or record.layers != kept:
            async with self._journal.locked(self._controller.settings.timeout_seconds):
                self._journal.update(file=file, layers=kept)

    async def _recover(self) -> None:
        """Finish what an API server left behind that died in the middle of a switch, and bring back late ranks.

        A rank is late if the generation that it has, or was asked for last, is not the journal's although no change is
        under way, as after a restart of its engine alone. What is cached then may belong to another state, so the
        engine is paused in any case.
        """
        if time.monotonic() < self._not_before["recover"] or not self._left_behind():
            return
        async with self._journal.locked(self._controller.settings.timeout_seconds):
            if not (why := self._left_behind()):
                return
            record = self._journal.read()
            installed = await self._controller.installed()
            values = record.values or state.values_of(self._controller.started.config, installed)
            owned = record.switching is not None and bool(record.switching["paused"])
            logger.error("sluice: %s; applying generation %d again", why, record.generation)
            payload = state.payload(values, record.generation)
            self._not_before["recover"] = time.monotonic() + _AFTER_FAILURE
            pause, ranks = bool(installed.patches) or owned, self._controller.reports().keys()
            began, error = time.time(), None
            try:
                await switch(self._controller.engines, payload, payload, pause=pause, ranks=ranks, owned=owned)
                self._journal.update(switching=None)
                self._not_before["recover"] = 0.0
            except Exception as caught:
                error = caught
                raise
            finally:
                self._lagging = 0
                result: Any = "applied" if error is None else "failed"
                text = why if error is None else f"{why}: {error}"
                seconds = round(time.time() - began, 4)
                self._journal.add(Change(record.generation, began, "sluice", "recovery", {}, result, text, seconds))

    def _left_behind(self) -> str | None:
        record = self._journal.read()
        if record.switching is not None:
            if record.switching.get("abandoned"):
                return "the engine did not resume after a switch"
            dead = not rundir.alive(record.switching["pid"], record.switching["start_ticks"])
            return "an API server died in the middle of a switch" if dead else None
        ranks = self._controller.reports()
        late = [rank for rank, report in ranks.items() if {report.desired, report.applied} != {record.generation}]
        self._lagging = self._lagging + 1 if late else 0
        return f"rank {late[0]} has, or was asked for, another generation" if self._lagging > 3 else None

    async def _note_pause(self) -> None:
        """Note since when somebody keeps the engine paused; our own switches hold the lock."""
        if time.monotonic() < self._not_before["pause"]:
            return
        self._not_before["pause"] = time.monotonic() + _LOOK_FOR_PAUSE
        async with self._journal.locked(self._controller.settings.timeout_seconds):
            paused = await self._controller.engines.is_paused()
            since = self._journal.read().paused_since
            if paused and since is None:
                self._journal.update(paused_since=time.time())
            elif not paused and since is not None:
                self._journal.update(paused_since=None)
            elif paused and since is not None and time.time() - since > 30:
                logger.warning("sluice: the engine has been paused for %.0f s", time.time() - since)
