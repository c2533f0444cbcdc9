"""The switch protocol, the layers of settings, the journal and the file that is followed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control import MemoryEngines
from vllm_sluice import config
from vllm_sluice.config import ConfigError
from vllm_sluice.control import switch
from vllm_sluice.control.controller import Controller, Moved, NotReady, RankReport, TimedOut
from vllm_sluice.control.follower import Follower
from vllm_sluice.control.journal import Busy, Journal, Record
from vllm_sluice.control.limit import RateLimit
from vllm_sluice.control.measured import server_values
from vllm_sluice.control.state import Refused
from vllm_sluice.control.switch import AlreadyPaused, StillPaused, SwitchFailed
from vllm_sluice.control.tokens import read_tokens
from vllm_sluice.telemetry import rundir

OFF = {"patches.gate.enabled": False}
ON = {"patches.gate.enabled": True}


@pytest.fixture
def engines() -> MemoryEngines:
    return MemoryEngines()


@pytest.fixture
def make(
    engines: MemoryEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Controller]:
    """Build a controller of the server `server`; a second one is a second API server."""
    for variable in [name for name in os.environ if name.startswith("SLUICE_")]:
        monkeypatch.delenv(variable)

    def controller(text: str | None = None, server: str = "a", **control: Any) -> Controller:
        if text is not None:
            (tmp_path / "sluice.yaml").write_text(text)
            monkeypatch.setenv("SLUICE_CONFIG", str(tmp_path / "sluice.yaml"))
        for key, value in control.items():
            monkeypatch.setenv(f"SLUICE_CONTROL__{key.upper()}", str(value))
        return Controller(Journal(tmp_path / "run", server), engines, config.load(), engines.reports)

    return controller


def gate(engines: MemoryEngines) -> list[Any]:
    return [rank.values["gate"]["enabled"] for rank in engines.ranks]


# ------------------------------------------------------------------------------------------------ the protocol
def test_a_patch_is_switched_while_the_engine_is_paused(make, engines):
    controller = make()
    done = asyncio.run(controller.change(OFF, who="ann"))
    assert engines.log == ["pause", "apply 1", "label 1", "resume"]
    assert gate(engines) == [False, False]
    assert (done.generation, done.ranks, done.paused) == (1, 2, True)
    assert done.changed == {"patches.gate.enabled": {"from": True, "to": False}}


def test_a_probe_is_changed_without_a_pause(make, engines):
    done = asyncio.run(make().change({"probes.attention.interval_seconds": 2.0}, who="ann"))
    assert engines.log == ["apply 1"]
    assert not done.paused
    assert [rank.values["attention"]["interval_seconds"] for rank in engines.ranks] == [2.0, 2.0]


def test_layers_are_chosen_and_stay_so(make, engines):
    """Also after the journal, which is JSON, has kept them."""
    controller = make()
    asyncio.run(controller.change({"probes.attention.layers": [0, 5]}, who="ann"))
    assert [rank.values["attention"]["layers"] for rank in engines.ranks] == [[0, 5], [0, 5]]
    assert asyncio.run(make().change({}, who="start", source="file")).changed == {}
    asyncio.run(controller.change({"probes.attention.layers": None}, who="ann"))
    assert [rank.values["attention"]["layers"] for rank in engines.ranks] == ["all", "all"]
    for value in ("some", [-1], [0.5], 3):
        with pytest.raises(Refused, match=r"probes\.attention\.layers"):
            asyncio.run(controller.change({"probes.attention.layers": value}, who="ann"))


def test_what_is_already_so_changes_nothing(make, engines):
    done = asyncio.run(make().change(ON, who="ann"))
    assert engines.log == []
    assert (done.generation, done.changed) == (0, {})


def test_a_rank_that_refuses_rolls_all_back(make, engines):
    controller = make()
    engines.ranks[1].refuses = {1}
    with pytest.raises(SwitchFailed, match=r"pp0-tp1 of engine 0 refused: .*out of memory.*have the old state again"):
        asyncio.run(controller.change(OFF, who="ann"))
    assert gate(engines) == [True, True]
    assert set(engines.reports().values()) == {RankReport(0, 0)}
    assert engines.log == ["pause", "apply 1", "apply 0", "resume"]
    change = controller.journal.changes(5)[-1]
    assert (change["result"], change["who"], change["generation"]) == ("rolled back", "ann", 1)
    assert asyncio.run(controller.describe())["values"]["patches.gate.enabled"]["value"] is True


def test_a_failed_roll_back_is_told(make, engines):
    controller = make()
    engines.ranks[1].refuses = {0, 1}
    with pytest.raises(SwitchFailed, match="rolling back failed too"):
        asyncio.run(controller.change(OFF, who="ann"))
    assert controller.journal.changes(5)[-1]["result"] == "failed"
    assert not engines.paused


def test_ranks_that_cannot_be_reached_leave_the_engine_running(make, engines):
    controller = make()
    asyncio.run(controller.installed())
    engines.unreachable = True
    with pytest.raises(SwitchFailed, match="engine core died"):
        asyncio.run(controller.change(OFF, who="ann"))
    assert not engines.paused


def test_a_rank_that_does_not_answer_rolls_all_back(make, engines):
    controller = make()
    asyncio.run(controller.installed())
    engines.silent = {"pp0-tp1"}
    with pytest.raises(SwitchFailed, match=r"dp0-pp0-tp1 did not apply generation 1"):
        asyncio.run(controller.change(OFF, who="ann"))
    assert gate(engines) == [True, True]
    assert not engines.paused


def test_an_engine_that_cannot_be_paused_is_left_as_it_was(make, engines):
    controller = make()
    engines.refuses_pause = True
    with pytest.raises(SwitchFailed, match=r"could not be paused, and nothing was changed: .*KV connector"):
        asyncio.run(controller.change(OFF, who="ann"))
    assert gate(engines) == [True, True]
    assert controller.journal.changes(1)[0]["result"] == "rolled back"


def test_resuming_is_tried_until_it_succeeds(make, engines, monkeypatch):
    monkeypatch.setattr(switch, "_RESUME_AFTER", (0.0, 0.0, 0.0))
    engines.stuck = 2
    asyncio.run(make().change(OFF, who="ann"))
    assert not engines.paused


def test_an_engine_that_did_not_resume_is_resumed_later(make, engines, monkeypatch):
    monkeypatch.setattr(switch, "_RESUME_AFTER", (0.0, 0.0, 0.0))
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        engines.stuck = 3
        with pytest.raises(StillPaused):
            await controller.change(OFF, who="ann")
        assert engines.paused
        await until(lambda: not engines.paused)
        assert gate(engines) == [True, True]
        assert controller.journal.read().generation == 0
        assert controller.journal.read().switching is None

    following(controller, scenario)


def test_a_pause_of_somebody_else_is_left_alone(make, engines):
    controller = make()
    engines.paused = True
    with pytest.raises(AlreadyPaused, match="resume it or wait"):
        asyncio.run(controller.change(OFF, who="ann"))
    assert engines.paused
    assert "resume" not in engines.log
    assert asyncio.run(controller.change({"probes.residual.enabled": False}, who="ann")).generation == 1


def test_a_slow_change_times_out_for_the_caller_and_is_carried_to_its_end(make, engines):
    async def scenario() -> None:
        controller = make(timeout_seconds=1)
        await controller.installed()
        engines.answers.clear()
        with pytest.raises(TimedOut, match="carried to its end"):
            await controller.change(OFF, who="ann")
        with pytest.raises(Busy):
            async with controller.journal.locked(0.1):
                pass
        engines.answers.set()
        await until(lambda: controller.journal.read().generation == 1)
        assert gate(engines) == [False, False]
        assert not engines.paused

    asyncio.run(scenario())


def test_a_caller_that_goes_away_does_not_leave_the_engine_paused(make, engines):
    async def scenario() -> None:
        controller = make()
        await controller.installed()
        engines.answers.clear()
        caller = asyncio.create_task(controller.change(OFF, who="ann"))
        await until(lambda: engines.paused)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        engines.answers.set()
        await until(lambda: not engines.paused)
        assert gate(engines) == [False, False]

    asyncio.run(scenario())


def test_two_api_servers_take_turns(make, engines):
    async def scenario() -> None:
        first, second = make(), make()
        engines.slow = 0.02
        await asyncio.gather(*((first, second)[i % 2].change(OFF if i % 4 < 2 else ON, who=str(i)) for i in range(12)))
        assert first.journal.read() == second.journal.read()

    asyncio.run(scenario())
    depth = 0
    for entry in engines.log:
        depth += {"pause": 1, "resume": -1}.get(entry, 0)
        assert depth in (0, 1)
    assert len({entry for entry in engines.log if entry.startswith("apply")}) == engines.log.count("pause")


def test_a_change_made_for_another_generation_is_refused(make, engines):
    controller = make()
    asyncio.run(controller.change(OFF, who="ann", if_generation=0))
    with pytest.raises(Moved, match="generation 1, not 0"):
        asyncio.run(controller.change(ON, who="bob", if_generation=0))
    assert gate(engines) == [False, False]


def test_missing_ranks_are_never_called(make, engines, tmp_path):
    def missing() -> dict[str, int]:
        raise NotReady("1 of 2 ranks report")

    make()
    controller = Controller(Journal(tmp_path / "run", "a"), engines, config.load(), missing)
    with pytest.raises(NotReady):
        asyncio.run(controller.change(OFF, who="ann"))
    assert engines.log == []


# ------------------------------------------------------------------------------------------------ layers
def test_admin_over_file_over_environment_over_default(make, engines, monkeypatch):
    monkeypatch.setenv("SLUICE_PATCHES__GATE__FLOOR", "0.1")
    monkeypatch.setenv("SLUICE_PATCHES__GATE__TEMPERATURE", "2")
    controller = make("patches: {gate: {temperature: 3.0}}\n")
    asyncio.run(controller.change({"patches.gate.enabled": False}, who="ann"))
    values = asyncio.run(controller.describe())["values"]
    shown = {key.rpartition(".")[2]: (v["value"], v["origin"]) for key, v in values.items() if "gate" in key}
    assert shown == {"enabled": (False, "admin"), "temperature": (3.0, "file"), "floor": (0.1, "environment")}
    assert values["probes.residual.enabled"]["origin"] == "default"
    asyncio.run(controller.change({"patches.gate.enabled": None}, who="ann"))
    assert asyncio.run(controller.describe())["values"]["patches.gate.enabled"]["origin"] == "default"
    assert gate(engines) == [True, True]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"patches.gate.enabled": "yes"}, "patches.gate.enabled: Input should be a valid boolean; found 'yes'"),
        ({"patches.gate.temperature": 0}, "patches.gate.temperature: Input should be greater than 0; found 0"),
        ({"patches.gate.floor": 1.5}, "patches.gate.floor: Input should be less than 1; found 1.5"),
    ],
)
def test_values_that_do_not_fit_are_refused(make, engines, edits, message):
    with pytest.raises(Refused, match=message.replace(".", r"\.")):
        asyncio.run(make().change(edits, who="ann"))
    assert engines.log == []


# ------------------------------------------------------------------------------------------------ the file
async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen")


def following(controller: Controller, scenario: Callable[[], Any]) -> None:
    async def run() -> None:
        task = asyncio.create_task(Follower(controller).follow())
        try:
            await scenario()
        finally:
            task.cancel()

    asyncio.run(run())


def test_an_edited_file_is_applied_and_a_broken_one_keeps_the_last_good_state(make, engines, tmp_path):
    controller = make("patches: {gate: {enabled: true}}\n", watch_seconds=0.1)
    file = tmp_path / "sluice.yaml"

    async def scenario() -> None:
        await asyncio.sleep(0.3)
        file.write_text("patches: {gate: {enabled: false, temperature: 2.0}}\n")
        await until(lambda: gate(engines) == [False, False])
        assert engines.ranks[0].values["gate"]["temperature"] == 2.0
        change = controller.journal.changes(1)[0]
        assert (change["source"], change["who"]) == ("file", str(file))
        file.write_text("patches: {gate: {enabled: [\n")
        await until(lambda: controller.journal.read().file["good"] is False)
        assert "not valid YAML" in controller.journal.read().file["error"]
        assert gate(engines) == [False, False]
        assert ("sluice_config_file_good", (), 0.0) in list(server_values(controller.journal))
        file.write_text("patches: {gate: {enabled: true}}\n")
        await until(lambda: gate(engines) == [True, True])
        assert controller.journal.read().file["good"] is True

    following(controller, scenario)


def test_a_configmap_swap_is_seen(make, engines, tmp_path, monkeypatch):
    """Kubernetes swaps the link `..data` to a new folder; the file's own path stays."""
    for name, enabled in (("first", "true"), ("second", "false")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sluice.yaml").write_text(f"patches: {{gate: {{enabled: {enabled}}}}}\n")
    (tmp_path / "..data").symlink_to("first")
    (tmp_path / "mounted.yaml").symlink_to("..data/sluice.yaml")
    monkeypatch.setenv("SLUICE_CONFIG", str(tmp_path / "mounted.yaml"))
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        await asyncio.sleep(0.3)
        (tmp_path / "..new").symlink_to("second")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await until(lambda: gate(engines) == [False, False])

    following(controller, scenario)


def test_structural_changes_in_the_file_wait_for_a_restart(make, engines, tmp_path):
    controller = make("patches: {gate: {enabled: true}}\n", watch_seconds=0.1)

    async def scenario() -> None:
        (tmp_path / "sluice.yaml").write_text(
            "patches: {gate: {enabled: false, granularity: head}}\nprobes: {attention: {queries: 9}}\n"
        )
        await until(lambda: gate(engines) == [False, False])
        await until(lambda: bool((controller.journal.read().file or {}).get("restart_needed")))
        needed = controller.journal.read().file["restart_needed"]
        assert needed == ["patches.gate.granularity", "probes.attention.queries"]
        assert ("sluice_config_restart_needed", (), 2.0) in list(server_values(controller.journal))

    following(controller, scenario)


def test_what_was_set_over_http_survives_a_restart_with_a_state_file(make, engines, tmp_path):
    kept = tmp_path / "kept.json"
    asyncio.run(make(state_file=kept).change({"patches.gate.enabled": False}, who="ann"))
    assert json.loads(kept.read_text()) == OFF
    restarted = MemoryEngines()
    controller = Controller(Journal(tmp_path / "another-run", "b"), restarted, config.load(), restarted.reports)

    async def scenario() -> None:
        await until(lambda: gate(restarted) == [False, False])

    following(controller, scenario)
    change = controller.journal.changes(1)[0]
    assert (change["source"], change["generation"]) == ("start", 1)


def test_an_unusable_state_file_does_not_stop_anything(make, engines, tmp_path, caplog):
    kept = tmp_path / "kept.json"
    kept.write_text("{")
    controller = make(state_file=kept, watch_seconds=0.1)

    async def scenario() -> None:
        await asyncio.sleep(0.3)
        await controller.change(OFF, who="ann")
        assert gate(engines) == [False, False]

    following(controller, scenario)
    assert (tmp_path / "kept.json.unreadable").read_text() == "{"
    assert json.loads(kept.read_text()) == OFF


def test_a_state_file_is_kept_while_the_engine_is_paused_and_keys_that_do_not_fit_are_left_out(make, engines, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({**OFF, "patches.gate.floor": 7, "patches.gate.gone": 1}))
    controller = make(state_file=kept, watch_seconds=0.1)
    engines.paused = True

    async def scenario() -> None:
        await asyncio.sleep(0.4)
        assert gate(engines) == [True, True]
        engines.paused = False
        await controller.change({"probes.residual.enabled": False}, who="ann")  # brings what is pending, too
        assert gate(engines) == [False, False]
        assert json.loads(kept.read_text()) == {**OFF, "probes.residual.enabled": False}

    following(controller, scenario)


# ------------------------------------------------------------------------------------------------ what is left behind
@pytest.mark.parametrize(
    ("pid", "start_ticks"),
    [pytest.param(2**22 + 1, "", id="no such process"), pytest.param(os.getpid(), "1", id="another has its number")],
)
def test_a_switch_of_an_api_server_that_died_is_undone(make, engines, pid, start_ticks):
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        await controller.change(OFF, who="ann")
        died = {"pid": pid, "start_ticks": start_ticks, "since": 0.0, "paused": True}
        controller.journal.update(switching=died)
        engines.paused = True
        engines.ranks[0].values["gate"]["enabled"] = True
        await until(lambda: not engines.paused)
        assert gate(engines) == [False, False]
        assert controller.journal.read().switching is None

    following(controller, scenario)


def test_a_switch_of_an_api_server_that_lives_is_left_alone(make, engines):
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        me = {"pid": os.getpid(), "start_ticks": rundir.start_ticks(os.getpid()), "since": 0.0, "paused": True}
        controller.journal.update(switching=me)
        await asyncio.sleep(0.5)
        assert controller.journal.read().switching == me

    following(controller, scenario)
    assert engines.log == []


def test_a_new_server_in_the_folder_of_a_former_one_begins_afresh(make, engines, tmp_path):
    """Also if the former one was killed in a switch or a trial, and the new one has its process numbers."""
    text = "patches: {gate: {enabled: true}}\n"
    former = make(text, watch_seconds=0.1)
    asyncio.run(former.change({**OFF, "patches.gate.floor": 0.5}, who="ann"))
    me = {"pid": os.getpid(), "start_ticks": rundir.start_ticks(os.getpid()), "since": 0.0, "paused": True}
    former.journal.update(switching=me, paused_since=1.0, guard={"patch": "gate", "number": 7, "measured": None})

    engines.ranks = MemoryEngines().ranks
    engines.log.clear()
    controller = make(text, server="b")

    async def scenario() -> None:
        await asyncio.sleep(0.8)
        assert engines.log == []
        assert ("sluice_engine_paused", (), 0.0) in list(server_values(controller.journal))
        assert controller.journal.trial() is None
        state = await controller.describe()
        assert state["values"]["patches.gate.enabled"] == {"value": True, "origin": "file", "wanted": True}
        assert state["values"]["patches.gate.floor"]["value"] == 0.0
        assert (await controller.change(OFF, who="bob")).generation == 1
        assert gate(engines) == [False, False]

    following(controller, scenario)
    assert [(c["who"], c["generation"]) for c in controller.journal.changes(9)] == [("ann", 1), ("bob", 1)]
    assert Journal(tmp_path / "run", "b").read().admin == OFF  # an API server of this server that is replaced


def test_a_record_of_another_version_does_not_stop_a_new_server(tmp_path):
    (tmp_path / "control.json").write_text(json.dumps({"generation": 3, "server": "a", "no_such_field": 1}))
    assert Journal(tmp_path, "b").read() == Record()
    (tmp_path / "control.json").write_text(json.dumps({"generation": 3}))
    assert Journal(tmp_path, "b").read() == Record()


def test_ranks_that_started_again_get_the_state_again(make, engines):
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        await controller.change(OFF, who="ann")
        for rank in engines.ranks:
            rank.generation = 0
            rank.values["gate"]["enabled"] = True
        await until(lambda: gate(engines) == [False, False])
        assert not engines.paused

    following(controller, scenario)


def test_a_rank_that_a_roll_back_did_not_reach_is_brought_back(make, engines):
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        engines.ranks[1].desired = 1  # it refused generation 1 and was never told to stay at 0
        await until(lambda: set(engines.reports().values()) == {RankReport(0, 0)})

    following(controller, scenario)
    assert controller.journal.changes(1)[0]["source"] == "recovery"


def test_a_probe_that_went_off_by_itself_is_switched_on_again(make, engines):
    """After errors; the settings say all the while that it is on."""
    controller = make()
    engines.ranks[1].values["residual"]["enabled"] = False
    engines.ranks[1].failed = {"residual"}
    on = {"probes.residual.enabled": True}
    expected = {"probes.residual.enabled": {"from": False, "to": True}}
    assert asyncio.run(controller.preview({})).changed == {}
    assert asyncio.run(controller.preview(on)).changed == expected
    done = asyncio.run(controller.change(on, who="ann"))
    assert (done.generation, done.changed, done.paused) == (1, expected, False)
    assert [rank.values["residual"]["enabled"] for rank in engines.ranks] == [True, True]
    assert asyncio.run(controller.change(on, who="ann")).changed == {}


def test_late_ranks_do_not_resume_a_pause_of_somebody_else(make, engines):
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        await controller.change(OFF, who="ann")
        engines.paused = True
        engines.ranks[1].generation = 0
        await asyncio.sleep(0.6)
        assert engines.paused

    following(controller, scenario)


def test_a_rank_that_stays_behind_is_not_tried_all_the_time(make, engines):
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        await controller.change(OFF, who="ann")
        engines.ranks[1].generation = 0
        engines.ranks[1].refuses = {1}
        engines.log.clear()
        await until(lambda: controller.journal.changes(1)[0]["result"] == "failed")
        await asyncio.sleep(1.0)  # time for another try, were there one

    following(controller, scenario)
    assert engines.log.count("pause") == 1
    assert controller.journal.changes(1)[0]["result"] == "failed"


def test_ranks_that_do_not_report_are_told_once_and_the_file_is_followed(make, engines, tmp_path, caplog):
    def missing() -> dict[str, int]:
        raise NotReady("0 of 2 ranks report")

    make("patches: {gate: {enabled: true}}\n", watch_seconds=0.1)
    controller = Controller(Journal(tmp_path / "run", "a"), engines, config.load(), missing)

    async def scenario() -> None:
        await until(lambda: controller.journal.read().file is not None)
        await asyncio.sleep(0.5)

    with caplog.at_level("ERROR", "vllm.sluice.control"):
        following(controller, scenario)
    assert len([record for record in caplog.records if "0 of 2 ranks report" in record.message]) <= 2


def test_a_broken_file_does_not_bring_back_what_another_api_server_read_long_ago(make, engines, tmp_path):
    first = make("patches: {gate: {floor: 0.0}}\n", watch_seconds=0.1)
    second = make()
    file = tmp_path / "sluice.yaml"

    async def scenario() -> None:
        file.write_text("patches: {gate: {floor: 0.5}}\n")
        await until(lambda: engines.ranks[0].values["gate"]["floor"] == 0.5)
        file.write_text("patches: [")
        await until(lambda: first.journal.read().file["good"] is False)
        done = await second.change({"probes.residual.enabled": False}, who="ann")
        assert set(done.changed) == {"probes.residual.enabled"}
        assert engines.ranks[0].values["gate"]["floor"] == 0.5

    following(first, scenario)


def test_a_pause_of_somebody_else_shows_on_a_metric(make, engines):
    controller = make(watch_seconds=0.1)

    async def scenario() -> None:
        engines.paused = True
        await until(lambda: ("sluice_engine_paused", (), 1.0) in list(server_values(controller.journal)))
        assert (await controller.describe())["paused_seconds"] >= 0
        engines.paused = False
        await until(lambda: ("sluice_engine_paused", (), 0.0) in list(server_values(controller.journal)))

    following(controller, scenario)


# ------------------------------------------------------------------------------------------------ tokens and limits
def test_tokens_have_names(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# who may switch\nann: 0123456789abcdef0\n\nbob: fedcba98765432100\n")
    file.chmod(0o600)
    tokens = read_tokens(str(file), {"SLUICE_ADMIN_TOKEN": "a-token-of-some-length"})
    assert tokens.name("0123456789abcdef0") == "ann"
    assert tokens.name("a-token-of-some-length") == "admin"
    assert tokens.name("0123456789abcdef") is None
    assert tokens.name("") is None
    assert not read_tokens(None, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann 0123456789abcdef0", "line 1 of .* is not NAME: TOKEN"),
        ("ann: short", "an admin token of 5 characters can be guessed"),
        ("ann: 0123456789abcdef0\nann: 0123456789abcdef1", "line 2 of .*: a second token named 'ann'"),
    ],
)
def test_bad_token_files_are_refused(tmp_path, text, message):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_tokens(str(file), {})


def test_a_missing_token_file_and_a_short_variable_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"control\.token_file: cannot read"):
        read_tokens(str(tmp_path / "none"), {})
    with pytest.raises(ConfigError, match="openssl rand"):
        read_tokens(None, {"SLUICE_ADMIN_TOKEN": "secret"})


def test_the_rate_limit_fills_up_again():
    now = [0.0]
    limit = RateLimit(60, lambda: now[0])
    assert [limit.take() for _ in range(60)] == [0.0] * 60
    assert limit.take() == pytest.approx(1.0)
    now[0] = 1.0
    assert limit.take() == 0.0
    assert limit.take() > 0
