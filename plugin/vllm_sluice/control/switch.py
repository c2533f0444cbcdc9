"""The switch protocol: pause, apply on every rank of every engine, label, resume.

`pause(keep, clear cache)` freezes requests in flight and drops all cached keys and values, so that a request goes on
under the new state as if it had always been in force (its prompt and tokens so far are computed again); no token mixes
two states. Rank replies are data, never exceptions, and calls have no timeout inside vLLM: a reply that nobody waits
for would be taken for the next call's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

logger = logging.getLogger("vllm.sluice.control")

Reply = Mapping[str, Any]


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


class AlreadyPaused(RuntimeError):
    """Somebody else keeps the engine paused."""


class SwitchFailed(RuntimeError):
    """Not every rank took the new state. `rolled_back` tells whether all have the old one."""

    def __init__(self, message: str, rolled_back: bool) -> None:
        super().__init__(message)
        self.rolled_back = rolled_back


async def switch(engines: Engines, new: Reply, old: Reply, *, pause: bool) -> int:
    """Bring all ranks from one state to another.

    Parameters
    ----------
    engines
        The engines.
    new, old
        What `Rank.apply` takes, generation included.
    pause
        Whether the change alters what the model computes.

    Returns
    -------
    int
        Number of ranks.

    Raises
    ------
    AlreadyPaused
        If the engine is paused; nothing was changed, and it stays paused.
    SwitchFailed
        If a rank refused the new state, or could not be reached.
    """
    if not pause:
        return await _apply(engines, new, old)
    if await engines.is_paused():
        raise AlreadyPaused("the engine is paused by someone else; resume it or wait, then try again")
    try:
        await engines.pause()
        ranks = await _apply(engines, new, old)
        try:
            await engines.label(int(new["generation"]))
        except Exception:
            logger.exception("sluice: the generation is not in the weight version")
        return ranks
    finally:
        await engines.resume()


async def _apply(engines: Engines, new: Reply, old: Reply) -> int:
    problem, ranks = await _try(engines, new)
    if problem is None:
        return ranks
    back, _ = await _try(engines, old)
    outcome = "all ranks have the old state again" if back is None else f"and rolling back failed too: {back}"
    raise SwitchFailed(f"{problem}; {outcome}", rolled_back=back is None)


async def _try(engines: Engines, state: Reply) -> tuple[str | None, int]:
    try:
        replies = await engines.call("apply", state)
    except Exception as error:
        return f"the ranks could not be reached: {type(error).__name__}: {error}", 0
    for reply in replies:
        if "error" in reply:
            return f"rank {reply.get('rank', '?')} of engine {reply.get('engine', '?')} refused: {reply['error']}", 0
    late = [r for r in replies if r.get("generation") != state["generation"]]
    if late or not replies:
        return f"{len(late) or 'all'} ranks did not apply generation {state['generation']}", 0
    return None, len(replies)
