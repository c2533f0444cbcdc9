"""The guard's trials: a switched patch on a share of the requests, until it is completed or rolled back."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from vllm_sluice.control import guard, state
from vllm_sluice.control.controller import Controller, NotReady, Outcome
from vllm_sluice.control.journal import Change
from vllm_sluice.control.switch import AlreadyPaused, SwitchFailed

logger = logging.getLogger("vllm.sluice.control")


async def end(controller: Controller, who: str) -> Outcome:
    """End a trial without switching anything.

    Raises
    ------
    LookupError
        If there is none.
    """
    return await _conclude(controller, "roll back", f"ended by {who}", who)


async def look(controller: Controller) -> None:
    """Look at a trial under way: measure, compare, and complete or roll back when it is time."""
    trial = controller.journal.read().guard
    if trial is None or await controller.engines.is_paused():
        return
    replies = await controller.engines.call("guard")
    measured = guard.combine(replies, trial["number"])
    verdict = guard.judge(measured, time.time() - trial["since"], controller.settings.guard)
    if broken := next((reply["broken"] for reply in replies if reply.get("broken")), None):
        verdict = guard.Verdict("roll back", f"it could not be measured: {broken}")
    async with controller.journal.locked(controller.settings.timeout_seconds):
        current = controller.journal.read().guard
        if current is None or current["number"] != trial["number"]:
            return
        shown = {name: _shown(group) for name, group in measured.items()}
        controller.journal.update(guard={**trial, "measured": shown, "reason": verdict.reason})
    if verdict.action != "wait":
        await _conclude(controller, verdict.action, verdict.reason, trial["who"])


async def _conclude(controller: Controller, action: str, reason: str, who: str) -> Outcome:
    async with controller.journal.locked(controller.settings.timeout_seconds):
        record = controller.journal.read()
        if record.guard is None:
            raise LookupError("the guard is trying nothing")
        trial = record.guard
        key = f"patches.{trial['patch']}.enabled"
        if action == "complete":
            before, after, admin = await controller.target(record, trial["edits"])
            changed = state.difference(before, after)
            try:
                done = await controller.carry_out(record, before, after, admin, changed, who, "guard")
            except (AlreadyPaused, NotReady) as error:
                logger.error("sluice: the guard would complete %s; trying again: %s", key, error)
                return Outcome(record.generation, {})
            except SwitchFailed:
                controller.journal.update(guard=None)  # the audit has it
                raise
            logger.info("sluice: the guard completed %s: %s", key, reason)
            controller.journal.update(guard=None)
            return done
        controller.journal.update(guard=None)
        changed = {key: {"from": not trial["enabled"], "to": trial["enabled"]}}
        seconds = round(time.time() - trial["since"], 3)
        controller.journal.add(
            Change(record.generation, trial["since"], who, "guard", changed, "rolled back", reason, seconds)
        )
        logger.error("sluice: the guard rolled %s back: %s", key, reason)
        return Outcome(record.generation, {})


def _shown(group: guard.Measured) -> dict[str, Any]:
    return {
        "requests": int(group.requests), "tokens": int(group.tokens), "nonfinite": int(group.nonfinite),
        "mean": _number(group.mean), "error": _number(group.error),
    }  # fmt: skip


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
