"""The guard's groups and verdicts, and its trials with engines in memory; tests/serving has one on a real server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control import MemoryEngines
from tests.unit.test_control import OFF, following, gate, until
from vllm_sluice import config
from vllm_sluice.config import Guard
from vllm_sluice.control import trials
from vllm_sluice.control.controller import Controller, TrialUnderWay
from vllm_sluice.control.guard import Measured, combine, group_of, judge
from vllm_sluice.control.journal import Journal
from vllm_sluice.control.measured import server_values
from vllm_sluice.control.state import Refused

SETTINGS = Guard(enabled=True, window_seconds=10, least_tokens=100, patience_seconds=60, most_change=0.1)


def group(tokens: int, mean: float, spread: float = 1.0, nonfinite: int = 0) -> Measured:
    return Measured(tokens, tokens * mean, tokens * (mean**2 + spread**2), nonfinite)


def test_groups_have_their_share_and_are_the_same_everywhere():
    groups = [group_of(f"cmpl-{index}", 7, 0.2) for index in range(5000)]
    assert groups.count("canary") / 5000 == pytest.approx(0.2, abs=0.02)
    assert groups == [group_of(f"cmpl-{index}", 7, 0.2) for index in range(5000)]
    assert groups != [group_of(f"cmpl-{index}", 8, 0.2) for index in range(5000)]


def test_mean_and_error():
    values = [-1.0, -2.0, -4.0, -1.5]
    found = Measured(4, sum(values), sum(v * v for v in values))
    mean = sum(values) / 4
    assert found.mean == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 4))


@pytest.mark.parametrize(
    ("canary", "rest", "seconds", "action", "reason"),
    [
        (group(99, -2.0), group(900, -2.0), 20, "wait", "99 of 100 tokens"),
        (group(99, -2.0), group(900, -2.0), 61, "roll back", "99 of 100 tokens in the smaller group after 61 s"),
        (group(500, -2.05), group(900, -2.0), 5, "wait", "(-0.050, error"),
        (group(500, -2.05), group(900, -2.0), 10, "wait", "no verdict"),
        (group(500, -2.05), group(900, -2.0), 61, "roll back", "no verdict after 61 s"),
        (group(500, -2.05, 0.2), group(900, -2.0, 0.2), 10, "complete", "(-0.050, error"),
        (Measured(500, math.nan, math.nan), group(900, -2.0), 10, "roll back", "(+nan"),
        (group(500, -1.5), group(900, -2.0), 10, "roll back", "(+0.500, error"),
        (group(500, -2.3), group(900, -2.0), 10, "roll back", "a change of 0.1 is allowed"),
        (group(500, -2.15), group(900, -2.0), 5, "wait", "(-0.150, error"),
        (group(500, -4.0), group(900, -2.0), 1, "roll back", "(-2.000, error"),
        (group(0, 0.0, nonfinite=3), group(50, -2.0), 1, "roll back", "non-finite logits: 100.00% of the canary's"),
        (group(500, -2.0, 0.2, nonfinite=5), group(900, -2.0, 0.2, nonfinite=90), 10, "complete", "(+0.000, error"),
    ],
)
def test_verdicts(canary, rest, seconds, action, reason):
    verdict = judge({"canary": canary, "rest": rest}, seconds, SETTINGS)
    assert verdict.action == action
    assert reason in verdict.reason


def test_engines_add_up_and_ranks_of_one_engine_do_not():
    def reply(engine: str, tokens: int, number: int = 5) -> dict[str, Any]:
        return {"engine": engine, "number": number, "groups": {"canary": [tokens, -2.0 * tokens, 4.0 * tokens, 1],
                                                               "rest": [10, -1.0, 1.0, 0]}}  # fmt: skip

    found = combine([reply("0", 30), reply("0", 30), reply("0", 0), reply("1", 12), reply("1", 500, number=4)], 5)
    assert found["canary"].tokens == 42
    assert found["canary"].nonfinite == 2
    assert found["rest"].tokens == 20


class Guarded(MemoryEngines):
    """Engines whose groups generate tokens of a given quality."""

    canary = -2.0

    async def call(self, operation: str, state: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        if operation != "guard":
            return await super().call(operation, state)
        number = self.controller.journal.read().guard["number"]
        measured = {"canary": group(200, self.canary, 0.2), "rest": group(800, -2.0, 0.2)}
        groups = {name: [m.tokens, m.total, m.squares, m.nonfinite] for name, m in measured.items()}
        return [{"engine": "0", "number": number, "groups": groups}]

    controller: Controller


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guarded:
    engines = Guarded()
    file = tmp_path / "sluice.yaml"
    file.write_text(
        "control: {watch_seconds: 0.1, guard: {enabled: true, window_seconds: 3, least_tokens: 100, share: 0.2}}\n"
    )
    monkeypatch.setenv("SLUICE_CONFIG", str(file))
    engines.controller = Controller(Journal(tmp_path / "run", "a"), engines, config.load(), engines.reports)
    return engines


def audit(engines: Guarded) -> list[tuple[str, str]]:
    return [(change["source"], change["result"]) for change in engines.controller.journal.changes(10)]


def test_a_harmless_patch_is_tried_and_then_switched_for_all(engines):
    controller = engines.controller

    async def scenario() -> None:
        done = await controller.change(OFF, who="ann")
        assert done.tried
        assert gate(engines) == [True, True]
        trial = controller.journal.read().guard
        assert (trial["patch"], trial["enabled"], trial["share"]) == ("gate", False, 0.2)
        with pytest.raises(TrialUnderWay, match="DELETE guard"):
            await controller.change({"patches.gate.floor": 0.5}, who="bob")
        await until(lambda: gate(engines) == [False, False], 20)
        assert controller.journal.read().guard is None

    following(controller, scenario)
    assert audit(engines) == [("admin", "tried"), ("guard", "applied")]
    assert engines.controller.journal.read().admin == OFF


def test_a_harmful_patch_is_rolled_back_before_the_window_is_over(engines):
    engines.canary = -3.0
    controller = engines.controller

    async def scenario() -> None:
        await controller.change(OFF, who="ann")
        await until(lambda: controller.journal.read().guard is None)
        await asyncio.sleep(0.3)

    following(controller, scenario)
    assert gate(engines) == [True, True]
    assert audit(engines) == [("admin", "tried"), ("guard", "rolled back")]
    change = controller.journal.changes(1)[0]
    assert change["seconds"] < 3
    assert "-3.000 against -2.000 nats" in change["error"]
    assert ("sluice_switches_total", (("result", "rolled_back"),), 1.0) in list(server_values(controller.journal))
    assert "pause" not in engines.log


def test_a_trial_shows_what_it_measures_and_can_be_ended(engines):
    controller = engines.controller

    async def scenario() -> None:
        await controller.change(OFF, who="ann")
        await until(lambda: controller.journal.read().guard["measured"] is not None)
        values = {(name, *labels): value for name, labels, value in server_values(controller.journal)}
        assert values["sluice_guard_logprob", ("patch", "gate"), ("group", "canary")] == -2.0
        assert values["sluice_guard_tokens", ("patch", "gate"), ("group", "rest")] == 800
        assert values["sluice_guard_running", ("patch", "gate")] == 1
        await trials.end(controller, "bob")
        assert not any(name.startswith("sluice_guard_") for name, _, _ in server_values(controller.journal))
        with pytest.raises(LookupError, match="trying nothing"):
            await trials.end(controller, "bob")

    following(controller, scenario)
    assert gate(engines) == [True, True]
    assert controller.journal.changes(1)[0]["error"] == "ended by bob"


def test_a_trial_keeps_what_was_asked(engines):
    """Dropping the admin's value is not the same as setting the value that then counts."""
    controller = engines.controller
    asyncio.run(controller.change(OFF, who="ann", guarded=False))

    async def scenario() -> None:
        assert (await controller.change({"patches.gate.enabled": None}, who="ann")).tried
        await until(lambda: gate(engines) == [True, True], 20)
        await until(lambda: controller.journal.read().guard is None)

    following(controller, scenario)
    assert controller.journal.read().admin == {}


def test_a_verdict_waits_for_an_engine_that_somebody_paused(engines):
    controller = engines.controller

    async def scenario() -> None:
        await controller.change(OFF, who="ann")
        engines.paused = True
        await asyncio.sleep(3.5)
        assert controller.journal.read().guard is not None
        engines.paused = False
        await until(lambda: gate(engines) == [False, False], 20)

    following(controller, scenario)


def test_what_cannot_be_measured_is_not_tried(engines):
    engines.speculates = True
    with pytest.raises(Refused, match="speculated tokens"):
        asyncio.run(engines.controller.change(OFF, who="ann"))


def test_the_guard_can_be_passed_by_and_leaves_other_changes_alone(engines):
    done = asyncio.run(engines.controller.change({"patches.gate.floor": 0.5}, who="ann"))
    assert not done.tried
    done = asyncio.run(engines.controller.change(OFF, who="ann", guarded=False))
    assert not done.tried
    assert gate(engines) == [False, False]
