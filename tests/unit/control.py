"""Engines for the tests of control: ranks that keep values in memory, may refuse, hang and be paused by others.

What vLLM does with a real switch is tested in tests/serving; these are for the paths that a healthy vLLM never takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from vllm_sluice.config import Config, runtime_values
from vllm_sluice.control.controller import RankReport


class MemoryRank:
    """Keeps values as a real rank does, all or nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.generation = self.desired = 0
        started = Config()
        self.values: dict[str, dict[str, Any]] = {
            "gate": runtime_values(started.patches.gate),
            "residual": runtime_values(started.probes.residual),
            "attention": runtime_values(started.probes.attention),
        }
        self.refuses: set[int] = set()
        self.failed: set[str] = set()

    def answer(self, operation: str, state: Mapping[str, Any] | None) -> dict[str, Any]:
        if operation == "apply":
            assert state is not None
            self.desired = state["generation"]
            if state["generation"] in self.refuses:
                return {"error": "RuntimeError: out of memory, say", "rank": self.name, "engine": "0"}
            for kinds in (state["patches"], state["probes"]):
                for kind, values in kinds.items():
                    self.values[kind] |= values
                    self.failed.discard(kind)
            self.generation = state["generation"]
        return {
            "rank": self.name, "engine": "0", "generation": self.generation,
            "patches": {"gate": {"values": self.values["gate"]}},
            "probes": {kind: {"values": self.values[kind]} for kind in ("residual", "attention")},
        }  # fmt: skip


class MemoryEngines:
    """Two ranks; `log` holds what was called, in order. They answer a call once `answers` is set, as it is at first."""

    def __init__(self) -> None:
        self.ranks = [MemoryRank("pp0-tp0"), MemoryRank("pp0-tp1")]
        self.paused = False
        self.stuck = 0
        self.refuses_pause = False
        self.silent: set[str] = set()
        self.speculates = False
        self.slow = 0.0
        self.answers = asyncio.Event()
        self.answers.set()
        self.unreachable = False
        self.log: list[str] = []

    async def is_paused(self) -> bool:
        return self.paused

    async def pause(self) -> None:
        if self.refuses_pause:
            raise RuntimeError("a KV connector refuses, say")
        self.log.append("pause")
        self.paused = True

    async def resume(self) -> None:
        if self.stuck:
            self.stuck -= 1
            raise RuntimeError("no answer, say")
        self.log.append("resume")
        self.paused = False

    async def call(self, operation: str, state: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        if operation != "state":
            self.log.append(f"{operation} {state['generation'] if state else ''}".strip())
        await asyncio.sleep(self.slow)
        await self.answers.wait()
        if self.unreachable:
            raise RuntimeError("engine core died, say")
        return [rank.answer(operation, state) for rank in self.ranks if rank.name not in self.silent]

    async def label(self, generation: int) -> None:
        self.log.append(f"label {generation}")

    def reports(self) -> dict[str, RankReport]:
        return {
            f"dp0-{rank.name}": RankReport(rank.desired, rank.generation, frozenset(rank.failed)) for rank in self.ranks
        }
