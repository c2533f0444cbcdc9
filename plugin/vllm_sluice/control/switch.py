"""The switch protocol: pause, apply on every rank of every engine, label, resume.

`pause(keep, clear cache)` freezes requests in flight and drops all cached keys and values, so that a request goes on
under the new state as if it had always been in force (its prompt and tokens so far are computed again); no token mixes
two states. Rank replies are data, never exceptions, and calls have no timeout inside vLLM: a reply that nobody waits
for would be taken for the next call's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

logger = logging.getLogger("vllm.sluice.control")

Reply = Mapping[str, Any]
_RESUME_AFTER = (0.2, 1.0, 3.0)
"""Seconds between attempts to resume."""


class Engines(Protocol):
    """All engines that an API server talks to."""

    async def is_paused(self) -> bool:
        """Tell whether generation is paused."""

    async def pause(self) -> None:
        """Freeze requests in flight and clear all caches of keys and values."""

    async def resume(self) -> None:
        """Go on."""

    async def call(self, operation: str, state: Mapping[str, Any] | None = None) -> Sequence[Reply]:
        """Run an operation of `rank.worker_method` on all ranks of all engines; return one reply a rank."""

    async def label(self, generation: int) -> None:
        """Note the generation in the engines' weight version, which some responses carry."""

    @property
    def speculates(self) -> bool:
        """Tell whether tokens are speculated, which the guard cannot measure."""


class AlreadyPaused(RuntimeError):
    """Somebody else keeps the engine paused."""


class SwitchFailed(RuntimeError):
    """Not every rank took the new state. `rolled_back` tells whether all have the old one."""

    def __init__(self, message: str, rolled_back: bool) -> None:
        super().__init__(message)
        self.rolled_back = rolled_back


class StillPaused(RuntimeError):
    """The engine did not resume; whoever finds that in the journal has to try again."""


async def switch(
    engines: Engines, new: Reply, old: Reply, *, pause: bool, ranks: Collection[str], owned: bool = False
) -> None:
    """Bring all ranks from one state to another.

    Parameters
    ----------
    engines
        The engines.
    new, old
        What `Rank.apply` takes, generation included.
    pause
        Whether the change alters what the model computes.
    ranks
        Names of all ranks, such as `dp0-pp0-tp1`; each has to answer.
    owned
        The engine may be paused already, by a switch that did not come to its end.

    Raises
    ------
    AlreadyPaused
        If the engine is paused; nothing was changed, and it stays paused.
    SwitchFailed
        If the engine could not be paused, or a rank refused the new state or could not be reached.
    StillPaused
        If the engine could not be resumed.
    """
    if not pause:
        await _apply(engines, new, old, ranks)
        return
    if not owned and await engines.is_paused():
        raise AlreadyPaused("the engine is paused by someone else; resume it or wait, then try again")
    try:
        try:
            await engines.pause()
        except Exception as error:
            text = f"the engine could not be paused, and nothing was changed: {type(error).__name__}: {error}"
            raise SwitchFailed(text, rolled_back=True) from error
        await _apply(engines, new, old, ranks)
        try:
            await engines.label(int(new["generation"]))
        except Exception:
            logger.exception("sluice: the generation is not in the weight version")
    finally:
        await _resume(engines)


async def _resume(engines: Engines) -> None:
    for wait in _RESUME_AFTER:
        try:
            await engines.resume()
            return
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            logger.error("sluice: the engine does not resume; trying again: %s", problem)
            await asyncio.sleep(wait)
    raise StillPaused(f"the engine does not resume: {problem}")


async def _apply(engines: Engines, new: Reply, old: Reply, ranks: Collection[str]) -> None:
    problem = await _try(engines, new, ranks)
    if problem is None:
        return
    back = await _try(engines, old, ranks)
    outcome = "all ranks have the old state again" if back is None else f"and rolling back failed too: {back}"
    raise SwitchFailed(f"{problem}; {outcome}", rolled_back=back is None)


async def _try(engines: Engines, state: Reply, ranks: Collection[str]) -> str | None:
    try:
        replies = await engines.call("apply", state)
    except Exception as error:
        return f"the ranks could not be reached: {type(error).__name__}: {error}"
    for reply in replies:
        if "error" in reply:
            return f"rank {reply.get('rank', '?')} of engine {reply.get('engine', '?')} refused: {reply['error']}"
    applied = {f"dp{r['engine']}-{r['rank']}" for r in replies if r.get("generation") == state["generation"]}
    if missing := sorted(set(ranks) - applied):
        return f"{', '.join(missing)} did not apply generation {state['generation']}"
    return None
