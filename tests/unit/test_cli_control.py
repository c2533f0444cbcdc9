"""The commands that talk to a running server: what they send, what they print, and their exit statuses."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading

import pytest
import uvicorn
from fastapi import FastAPI

from tests.conftest import ROOT
from tests.unit.adminapi import TOKENS, AdminApi, Failure, served
from tests.unit.control import MemoryEngines
from vllm_sluice import cli, config
from vllm_sluice.commands import answers, client, control, terminal, watch
from vllm_sluice.commands.client import Client, read_token
from vllm_sluice.commands.problem import Problem
from vllm_sluice.control import routes as control_routes
from vllm_sluice.control.controller import Controller
from vllm_sluice.control.journal import KEPT_CHANGES, Journal
from vllm_sluice.control.tokens import Tokens
from vllm_sluice.live import routes as live_routes
from vllm_sluice.live.history import History
from vllm_sluice.telemetry.collector import SnapshotCollector


@pytest.fixture
def sluice(url, capsys, monkeypatch):
    """Run a command against the server as alice; return exit status, standard output and standard error."""
    monkeypatch.setenv("SLUICE_ADMIN_TOKEN", TOKENS["alice"])

    def run(command: str, *arguments: str):
        if "--url" not in arguments:
            arguments = ("--url", url, *arguments)
        try:
            status = cli.main([command, *arguments])
        except SystemExit as stopped:
            status = stopped.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def sent(api: AdminApi, method: str) -> list[tuple[str, object]]:
    return [(path, body) for asked, path, body, _ in api.requests if asked == method]


# ---------------------------------------------------------------------------------------------- state
def test_state_shows_ranks_patches_and_values_with_their_origin(sluice, url):
    status, out, err = sluice("state")
    assert (status, err) == (0, "")
    assert out.startswith(f"{url}: generation 3, running\n\n")
    assert "engine 0: sluice/twin-32 (Sluice 0.1.0, vLLM 0.32.0)\n" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["pp0-tp1", "3", "400", "ms", "ago", "3f9ac01be5d27714"] in lines
    gate = next(line for line in lines if line[:1] == ["gate"])
    assert gate[:3] == ["gate", "yes", "on"]
    assert gate[-3:] == ["65", "s", "ago"]
    assert ["patches.gate.enabled", "true", "default"] in lines
    assert ["probes.attention.interval_seconds", "0.5", "file"] in lines
    assert "!" not in out


def test_state_says_what_is_not_as_it_should_be(sluice, api):
    api.ranks["pp0-tp1"] = 2
    api.paused_seconds = 95.0
    api.tokens = {}
    api.file_state = {"path": "/etc/sluice.yaml", "good": False, "error": "patches.gate.enabld:\nunknown key",
                      "restart_needed": ["patches.gate.source"]}  # fmt: skip
    status, out, _ = sluice("state")
    assert status == 0
    assert "generation 3, paused for 95 s, read-only (it has no admin token)\n" in out
    assert "! engine 0, rank pp0-tp1: applies generation 2, asked for is 3; " in out
    assert "rank pp0-tp0" not in out
    assert "! the engine has been paused for 95 s, and not by a change of Sluice: " in out
    assert "! /etc/sluice.yaml cannot be used, so what was read before stays in force: patches.gate.enabld:; " in out
    assert "! /etc/sluice.yaml changes patches.gate.source, which takes a restart of the server\n" in out


def test_state_of_a_server_whose_values_cannot_be_changed(sluice, api, url):
    api.control = False
    status, out, _ = sluice("state")
    assert status == 0
    assert out.startswith(f"{url}: run-time values cannot be changed (its setting control.enabled is false)\n")
    assert "run-time value " not in out


def test_a_pause_by_a_change_under_way_is_no_pause_by_others(sluice, api, url, monkeypatch):
    api.switching, api.paused_seconds = True, 0.02
    out = sluice("state")[1]
    assert "generation 3, a change is under way\n" in out
    assert "!" not in out
    assert "paused" not in text([watch.Watch(Client(url)).begin()])[0]
    api.paused_seconds = 20.0
    assert "! a change has kept the engine paused for 20 s; see the server's log\n" in sluice("state")[1]


def test_ranks_that_cannot_be_asked_yet(sluice, api, url, monkeypatch):
    state = {**api.state(), "control": {"error": "1 of 2 ranks report", "writable": False}}
    monkeypatch.setattr(api, "state", lambda: state)
    status, out, _ = sluice("state")
    assert status == 0
    assert out.startswith(f"{url}: the run-time state is not known\n")
    assert "! no change can be made: 1 of 2 ranks report\n" in out
    begin = text([watch.Watch(Client(url)).begin()])[0]
    assert begin.endswith("generation not known, 2 ranks; changing: not possible: 1 of 2 ranks report")


def test_a_value_that_is_not_what_the_settings_say_is_told(sluice, api, monkeypatch):
    state = api.state()
    state["control"]["values"]["patches.gate.temperature"]["wanted"] = 2.0
    monkeypatch.setattr(api, "state", lambda: state)
    assert "! patches.gate.temperature is 1.0, but the settings say 2.0; " in sluice("state")[1]


def test_state_while_no_worker_reports(url, capsys, api, monkeypatch):
    monkeypatch.setattr(api, "state", lambda: {"time": 1.0, "engines": [], "control": None})
    assert cli.main(["state", "--url", url]) == 0
    assert "! no worker reports; while a model loads this is normal" in capsys.readouterr().out


def test_state_as_json_is_the_answer_itself(sluice, api):
    out = sluice("state", "--json")[1]
    assert json.loads(out)["control"] == api.state()["control"]


# ---------------------------------------------------------------------------------------------- enable, disable, set
def test_disable_and_enable_switch_a_patch(sluice, api):
    status, out, err = sluice("disable", "gate")
    assert (status, err) == (0, "")
    assert out == (
        "patches.gate.enabled  true  ->  false\n"
        "generation 4 in force on 2 ranks after 43 ms, requests paused meanwhile\n"
    )
    assert api.values()["patches.gate.enabled"] is False
    assert "gate   yes        off" in sluice("state")[1]
    assert sluice("enable", "gate")[0] == 0
    assert api.values()["patches.gate.enabled"] is True
    assert sent(api, "PUT") == [("patches/gate", {"enabled": False}), ("patches/gate", {"enabled": True})]


def test_what_is_so_already_is_no_change(sluice, api):
    assert sluice("enable", "gate") == (0, "nothing to change; generation 3 stays\n", "")
    assert api.generation == 3


def test_set_sends_typed_values_in_one_request_a_section(sluice, api):
    status, out, _ = sluice("set", "patches.gate.temperature=1.5", "patches.gate.enabled=off")
    assert status == 0
    assert sent(api, "PUT") == [("patches/gate", {"temperature": 1.5, "enabled": False})]
    assert sent(api, "POST") == []
    assert "patches.gate.temperature  1.0   ->  1.5\n" in out


def test_set_of_a_probe_pauses_nobody(sluice):
    out = sluice("set", "probes.attention.interval_seconds=2.0")[1]
    assert out.endswith("generation 4 in force on 2 ranks after 43 ms\n")


def test_set_without_a_value_drops_the_admins(sluice, api):
    sluice("set", "probes.attention.interval_seconds=2.0")
    status, out, _ = sluice("set", "probes.attention.interval_seconds=")
    assert status == 0
    assert sent(api, "PUT")[-1] == ("probes/attention", {"interval_seconds": None})
    assert "probes.attention.interval_seconds  2.0  ->  0.5\n" in out
    assert api.origin("probes.attention.interval_seconds") == "file"


def test_several_sections_are_checked_first_and_then_changed_one_by_one(sluice, api):
    arguments = ("patches.gate.temperature=2.0", "probes.attention.enabled=false")
    status, out, _ = sluice("set", *arguments, "--if-generation", "3")
    assert status == 0
    assert out.startswith("2 requests, one for each of patches.gate, probes.attention\n")
    assert [path for path, _ in sent(api, "PUT")] == ["patches/gate", "probes/attention"]
    assert api.generation == 5
    conditions = [headers.get("if-match") for method, *_, headers in api.requests if method == "PUT"]
    assert conditions == ['"3"', '"4"']


def test_of_several_sections_none_is_changed_if_a_value_is_wrong(sluice, api):
    status, _, err = sluice("set", "patches.gate.temperature=2.0", "probes.attention.enabled=5")
    assert status == 1
    assert "refuses (400): probes.attention.enabled: Input should be a valid bool; found 5" in err
    assert sent(api, "PUT") == []
    assert api.generation == 3


def test_what_was_changed_before_a_failure_is_said(sluice, api):
    api.fail["attention"] = Failure(502, "rank pp0-tp1 failed: out of memory; all ranks have the old values again")
    status, out, err = sluice("set", "patches.gate.temperature=2.0", "probes.attention.enabled=false")
    assert status == 1
    assert "generation 4 in force" in out
    first, second = err.splitlines()
    assert first == "sluice: only patches.gate was changed; probes.attention was not, because:"
    assert "refuses (502): rank pp0-tp1 failed: out of memory" in second


def test_a_dry_run_says_what_would_change_and_changes_nothing(sluice, api):
    status, out, _ = sluice("set", "patches.gate.temperature=2.0", "probes.attention.enabled=false", "--dry-run")
    assert status == 0
    assert out == (
        "patches.gate.temperature  1.0   ->  2.0\n"
        "probes.attention.enabled  true  ->  false\n"
        "would make generation 4; requests would pause for it\n"
    )
    assert sent(api, "POST") == [
        ("dry-run", {"patches": {"gate": {"temperature": 2.0}}, "probes": {"attention": {"enabled": False}}})
    ]
    assert (api.generation, sent(api, "PUT")) == (3, [])
    assert sluice("enable", "gate", "--dry-run")[1] == "nothing would change; generation 3 is in force\n"


# ---------------------------------------------------------------------------------------------- refusals
def test_a_moved_generation_is_exit_status_3(sluice, api, url):
    status, out, err = sluice("disable", "gate", "--if-generation", "2")
    assert (status, out) == (3, "")
    assert err == f'sluice: {url} refuses (412): the generation is 3, not "2"; look at the state again\n'
    assert api.values()["patches.gate.enabled"] is True
    for dry in (["--dry-run"], ["probes.attention.enabled=false"]):
        status, _, err = sluice("set", "patches.gate.enabled=false", *dry, "--if-generation", "2")
        assert status == 3
        assert f"generation 2 was asked for, but {url} is at 3; " in err
    assert api.generation == 3


def test_an_engine_that_somebody_else_paused_is_exit_status_3(sluice, api):
    api.fail["gate"] = Failure(409, "somebody else keeps the engine paused; resume it first")
    status, _, err = sluice("disable", "gate")
    assert status == 3
    assert "refuses (409): somebody else keeps the engine paused; resume it first" in err


@pytest.mark.parametrize("code", [413, 429, 502, 504])
def test_other_refusals_are_exit_status_1_with_the_servers_words(sluice, api, code):
    api.fail["gate"] = Failure(code, "what is wrong; what to do")
    status, out, err = sluice("disable", "gate")
    assert (status, out) == (1, "")
    assert f"refuses ({code}): what is wrong; what to do\n" in err


def test_an_unknown_patch(sluice):
    status, _, err = sluice("enable", "gat")
    assert status == 1
    assert "refuses (404): there is no patches 'gat'; there are: gate" in err


def test_control_characters_of_the_server_do_not_reach_the_terminal(sluice, api):
    api.fail["gate"] = Failure(502, "bad\x1b[2J\nnews")
    assert "refuses (502): bad?[2J; news\n" in sluice("disable", "gate")[2]
    api.record({}, who="eve\x1b]0;x\x07")
    assert "eve?]0;x?" in sluice("changes")[1]


def test_a_server_without_tokens_only_reads(sluice, api):
    api.tokens = {}
    status, _, err = sluice("disable", "gate")
    assert status == 1
    assert "refuses (403): this server takes no changes" in err


def test_a_server_without_the_admin_routes(sluice, api):
    api.control = False
    for command in (["disable", "gate"], ["changes"]):
        status, _, err = sluice(*command)
        assert status == 1
        assert "does not know " in err
        assert "(404: Not Found); either Sluice is not loaded there (start it with `sluice serve`) or " in err


# ---------------------------------------------------------------------------------------------- tokens
def test_the_token_is_that_of_the_variable_or_of_a_file(sluice, api, tmp_path, monkeypatch):
    path = tmp_path / "tokens"
    path.write_text("# who may\n\n" + "".join(f"{name}: {token}\n" for name, token in TOKENS.items()))
    assert sluice("disable", "gate", "--token-file", str(path), "--as", "bob")[0] == 0
    assert api.changes[-1]["who"] == "bob"
    assert sluice("enable", "gate")[0] == 0
    assert api.changes[-1]["who"] == "alice"
    monkeypatch.delenv("SLUICE_ADMIN_TOKEN")
    status, _, err = sluice("disable", "gate")
    assert status == 1
    assert "refuses (401): the admin token is wrong or missing (no token was sent; name one with --token-file" in err
    monkeypatch.setenv("SLUICE_ADMIN_TOKEN", "wrong")
    assert sluice("disable", "gate")[2].endswith("refuses (401): the admin token is wrong or missing\n")


@pytest.mark.parametrize(
    ("content", "name", "token"),
    [
        ("secret\n", None, "secret"),
        ("one: secret\n", None, "secret"),
        ("one: secret", "one", "secret"),
        ("# all\none: first\ntwo:second\n", "two", "second"),
    ],
)
def test_token_files(tmp_path, content, name, token):
    path = tmp_path / "tokens"
    path.write_text(content)
    assert read_token(path, name, {"SLUICE_ADMIN_TOKEN": "other"}) == token


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("", None, "it is empty"),
        ("secret", "one", "holds a token without a name; leave out --as one"),
        ("one: first\ntwo: second", None, "has several tokens, one, two; pick one with --as NAME"),
        ("one: first\ntwo: second", "three", "has no token named three; it has: one, two"),
        ("one: first\nsecond", "one", "its token line 2 is something else"),
        ("two words", None, "a token with blanks"),
        ("sécret", None, "characters that no HTTP header can carry"),
    ],
)
def test_unusable_token_files_are_explained_without_a_token(tmp_path, content, name, says):
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(Problem, match=says) as raised:
        read_token(path, name, {})
    for token in ("first", "second", "secret", "words"):
        assert token not in str(raised.value)


def test_a_token_file_that_cannot_be_read(sluice, tmp_path):
    status, _, err = sluice("state", "--token-file", str(tmp_path / "none"))
    assert status == 1
    assert err == f"sluice: cannot read the token file {tmp_path / 'none'}: No such file or directory\n"


def test_a_redirection_does_not_carry_the_token_away(sluice, api):
    other = AdminApi()
    with served(other) as elsewhere:
        for path in ("state", "patches/gate"):
            api.raw[path] = (307, "text/plain", f"{elsewhere}/plugins/sluice/{path}".encode())
        for command in (["state"], ["disable", "gate"]):
            status, _, err = sluice(*command)
            assert status == 1
            assert f"to {elsewhere}/plugins/sluice/" in err
            assert "redirections are not followed, name that with --url" in err
    assert other.requests == []


def test_no_proxy_sees_what_goes_to_this_machine(sluice, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert sluice("state")[0] == 0


# ---------------------------------------------------------------------------------------------- no or another server
def test_no_server_is_exit_status_1_with_the_address(sluice):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for command in (["state"], ["disable", "gate"], ["changes"], ["watch"], ["top", "--once"]):
        status, out, err = sluice(*command, "--url", address)
        assert (status, out) == (1, "")
        says = f"no answer from {address}: Connection refused; is the server running, and is --url its address?"
        assert err == f"sluice: {says}\n"


def test_an_unknown_host(sluice):
    status, _, err = sluice("state", "--url", "http://no-such-host.invalid:8000")
    assert status == 1
    assert err.startswith("sluice: no answer from http://no-such-host.invalid:8000: ")


def test_a_server_that_hangs_up(sluice):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: listening.accept()[0].close())
        thread.start()
        status, _, err = sluice("state", "--url", f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()
    assert status == 1
    assert "sluice: no answer from " in err


def test_a_server_that_takes_too_long_may_still_change(sluice, api):
    api.delay = 0.5
    status, _, err = sluice("disable", "gate", "--timeout", "0.1")
    assert status == 1
    assert "within 0.1 s; the change may still be made, `sluice changes` says how it ended" in err


def test_a_question_that_takes_too_long(api, url):
    api.delay = 0.5
    with pytest.raises(client.Unreachable, match=r"within 0.1 s; is the server overloaded"):
        Client(url, timeout=0.1).get("state")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>\nhello", "answers with something that is no JSON, beginning '<html>; hello'"),
        (b"", "answers with something that is no JSON, nothing at all"),
        (b"\xff\xfe", "answers with something that is no JSON"),
        (b"[]", "in a form that this version cannot read (the answer: "),
        (b'{"time": 1, "engines": [{"engine": "0"}]}', "(engines.0.model_name: Field required)"),
        (b'{"time": 1, "engines": 3}', "(engines: "),
    ],
)
def test_an_answer_that_is_not_sluices(sluice, api, content, says):
    api.raw["state"] = (200, "application/json", content)
    status, out, err = sluice("state")
    assert (status, out) == (1, "")
    assert err.startswith("sluice: http://127.0.0.1:")
    assert says in err


@pytest.mark.parametrize(
    ("status", "content", "says"),
    [
        (500, b"Internal Server Error", "answers GET /plugins/sluice/state with 500: Internal Server Error; see "),
        (503, b'{"error": {"message": "engine is dead", "code": 503}}', "with 503: engine is dead; see the server's"),
        (500, b"", "with 500: nothing; see the server's log"),
        (404, b'["no"]', "does not know GET /plugins/sluice/state (404: ['no']); either "),
    ],
)
def test_errors_in_another_form(sluice, api, status, content, says):
    api.raw["state"] = (status, "text/plain", content)
    code, _, err = sluice("state")
    assert code == 1
    assert says in err


def test_members_that_a_newer_server_adds_are_left_out(sluice, api, monkeypatch):
    state = api.state()
    state["engines"][0]["new"] = state["control"]["new"] = 1
    monkeypatch.setattr(api, "state", lambda: state)
    assert sluice("state")[0] == 0


# ---------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["set", "patches.gate.temperature"], "is not KEY=VALUE"),
        (["set", "gate.temperature=1"], "'gate.temperature' is no run-time key"),
        (["set", "telemetry.interval_seconds=1"], "is no run-time key"),
        (["set", "patches.gate.temperature=[1"], "is no plain YAML value"),
        (["set", "patches.gate.temperature=.nan"], "is no plain YAML value"),
        (["set", "patches.gate.temperature=2026-01-01"], "is no plain YAML value"),
        (["set", "patches.gate.floor=1", "patches.gate.floor=2"], "patches.gate.floor is set twice"),
        (["set"], "KEY=VALUE"),
        (["enable"], "PATCH"),
        (["enable", "../state"], "'../state' is no name of a patch"),
        (["disable", "gate", "--if-generation", "-1"], "--if-generation"),
        (["disable", "gate", "--if-generation", "x"], "'x' is no generation"),
        (["disable", "gate", "--timeout", "0"], "is no time of 0.1 to 3600 seconds"),
        (["changes", "--limit", "0"], "'0' is no number from 1 to 500"),
        (["watch", "--interval", "nan"], "is no time of 0.1 to 3600 seconds"),
        (["state", "--as", "bob"], "--as picks a token of a file; name that with --token-file"),
        (["state", "--url", "localhost:8000"], "'localhost:8000' is no address of a server; write it like http://"),
        (["state", "--url", "http://localhost:99999"], "is no address: Port out of range"),
        (["state", "--url", "http://localhost:port"], "is no address: "),
        (["state", "--url", "ftp://localhost"], "is no address of a server"),
        (["state", "--url", "http://me:secret@localhost"], "has more than scheme, host, port and path"),
        (["state", "--url", "http://localhost/?a=b"], "has more than scheme, host, port and path"),
        (["state", "--url", "http://local host"], "has more than scheme, host, port and path"),
    ],
)  # fmt: skip
def test_unusable_arguments_are_exit_status_2(sluice, api, arguments, says):
    status, out, err = sluice(*arguments)
    assert (status, out) == (2, "")
    assert says in " ".join(err.split())
    assert api.requests == []


def test_the_address_of_the_live_page_is_one_too(sluice, url):
    for address in (f"{url}/", f"{url}/plugins/sluice", f"{url}/plugins/sluice/"):
        assert sluice("state", "--url", address)[0] == 0


@pytest.mark.parametrize("command", ["state", "enable", "disable", "set", "changes", "watch", "top"])
def test_help_says_the_exit_statuses(sluice, command):
    status, out, _ = sluice(command, "--help")
    assert status == 0
    assert "exit status: 0 done, 1 refused by the server or no server there, 2 the arguments cannot be used" in out
    assert ("3 a conflict" in out) == (command in ("enable", "disable", "set"))


# ---------------------------------------------------------------------------------------------- changes
def test_changes_are_a_table(sluice, api):
    assert sluice("changes") == (0, "no change yet\n", "")
    sluice("disable", "gate")
    api.record({}, who="/etc/sluice.yaml", result="failed", error="rank pp0-tp1 is gone")
    status, out, _ = sluice("changes")
    assert status == 0
    head, first, second, why = out.splitlines()
    assert head.split() == ["time", "generation", "who", "result", "took", "changed"]
    assert first.split()[2:] == [
        "4", "alice", "(admin)", "applied", "43", "ms", "patches.gate.enabled:", "true", "->", "false"
    ]  # fmt: skip
    assert "/etc/sluice.yaml (admin)  failed" in second
    assert why == "  ! rank pp0-tp1 is gone"


def test_changes_takes_a_limit_and_prints_json(sluice, api):
    for word in ("disable", "enable", "disable"):
        sluice(word, "gate")
    out = sluice("changes", "--limit", "2", "--json")[1]
    assert [change["generation"] for change in json.loads(out)["changes"]] == [5, 6]


# ---------------------------------------------------------------------------------------------- colours
class Terminal:
    def isatty(self):
        return True


def test_colours_are_for_terminals_without_no_color(sluice):
    assert "\x1b" not in sluice("state")[1]
    assert terminal.colours(Terminal(), {})
    assert not terminal.colours(Terminal(), {"NO_COLOR": "1"})
    assert not terminal.colours(Terminal(), {"TERM": "dumb"})
    assert terminal.colours(Terminal(), {"NO_COLOR": ""})


def test_a_coloured_line_says_the_same():
    pieces = [terminal.Piece("ab ", "red"), terminal.Piece("  "), terminal.Piece("cd  ", "green")]
    assert terminal.paint(pieces, False) == "ab   cd"
    assert terminal.paint(pieces, True) == "\x1b[31mab \x1b[0m  \x1b[32mcd\x1b[0m"
    assert terminal.paint(pieces, True, 4) == "\x1b[31mab \x1b[0m "


# ---------------------------------------------------------------------------------------------- watch
def text(lines) -> list[str]:
    """Return lines without their time."""
    return [terminal.paint(line, False).split("  ", 1)[1] for line in lines]


def test_watch_tells_each_change_once(api, url):
    api.record({})
    seen = watch.Watch(Client(url))
    assert text([seen.begin()]) == [f"watching {url}: generation 3, 2 ranks"]
    assert seen.look() == []
    api.generation = 4
    api.ranks = dict.fromkeys(api.ranks, 4)
    api.record({"patches.gate.enabled": {"from": True, "to": False}})
    api.record({}, result="rolled back", error="rank pp0-tp1 failed")
    assert text(seen.look()) == [
        "generation 4 by alice (admin) applied after 43 ms, patches.gate.enabled: true -> false",
        "generation 4 by alice (admin) rolled back after 43 ms, nothing: rank pp0-tp1 failed",
    ]
    assert seen.look() == []


def test_watch_tells_when_ranks_pause_and_file_change(api, url):
    seen = watch.Watch(Client(url))
    api.paused_seconds = 2.0
    assert text([seen.begin()])[0].endswith("2 ranks; requests: paused, and not by a change of Sluice")
    api.paused_seconds = None
    api.ranks["pp0-tp1"] = 2
    api.file_state["good"], api.file_state["error"] = False, "unknown key"
    assert text(seen.look()) == [
        "rank pp0-tp1 of engine 0: applies generation 2, asked for is 3",
        "requests: running",
        "file /etc/sluice.yaml: cannot be used: unknown key",
    ]
    del api.ranks["pp0-tp1"]
    api.file_state["good"] = True
    assert text(seen.look()) == ["file /etc/sluice.yaml: good", "rank pp0-tp1 of engine 0: gone"]
    api.ranks["pp0-tp1"] = 3
    assert text(seen.look()) == ["rank pp0-tp1 of engine 0: up to date"]
    assert seen.look() == []


def test_watch_outlives_a_server(api, url):
    seen = watch.Watch(Client(url))
    seen.begin()
    api.raw["state"] = (503, "text/plain", b"starting")
    assert "with 503: starting" in text(seen.look())[0]
    assert seen.look() == []
    del api.raw["state"]
    assert text(seen.look()) == [f"{url} answers again"]


def test_watch_of_a_server_whose_values_cannot_be_changed(api, url):
    api.control = False
    seen = watch.Watch(Client(url))
    assert text([seen.begin()]) == [f"watching {url}: generation not known, 2 ranks; changing: switched off"]
    assert seen.look() == []


def test_watch_prints_at_once_and_ends_with_ctrl_c(api, url):
    command = [sys.executable, "-m", "vllm_sluice.cli", "watch", "--url", url, "--interval", "0.1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert "watching" in running.stdout.readline()
            api.record({"patches.gate.enabled": {"from": True, "to": False}})
            assert "patches.gate.enabled: true -> false" in running.stdout.readline()
            running.send_signal(signal.SIGINT)
            assert running.wait(timeout=20) == 130
            assert running.stderr.read() == ""
        finally:
            running.kill()


# ---------------------------------------------------------------------------------------------- the real routes
@pytest.fixture
def real(tmp_path, request):
    """Serve the plugin's own routes over engines in memory; yields address and engines. The parameter: control keys."""
    engines = MemoryEngines()
    chosen = config.Config.model_validate({"control": getattr(request, "param", {})})
    controller = Controller(Journal(tmp_path, "a"), engines, config.Loaded(chosen, {}), engines.reports)
    collector = SnapshotCollector(tmp_path)
    app = FastAPI()
    settings = config.Live()
    app.include_router(live_routes.build_router(collector, settings, History(collector, settings), controller.describe))
    tokens = Tokens(TOKENS)
    app.include_router(control_routes.build_router(live_routes.PREFIX, config.Control(), tokens, lambda: controller))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engines
        server.should_exit = True
        thread.join(timeout=20)


def test_the_real_routes_understand_every_command(sluice, real, monkeypatch):
    address, engines = real
    at = ("--url", address)
    assert sluice("disable", "gate", "--dry-run", *at)[1] == (
        "patches.gate.enabled  true  ->  false\nwould make generation 1; requests would pause for it\n"
    )
    status, out, err = sluice("disable", "gate", "--if-generation", "0", *at)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].startswith("generation 1 in force on 2 ranks after ")
    assert [rank.values["gate"]["enabled"] for rank in engines.ranks] == [False, False]
    assert sluice("enable", "gate", "--if-generation", "0", *at)[0] == 3
    status, out, _ = sluice("set", "patches.gate.enabled=", "probes.attention.interval_seconds=1", *at)
    assert status == 0
    assert "generation 3 in force" in out
    status, _, err = sluice("set", "patches.gate.temperature=-1", *at)
    assert status == 1
    assert "refuses (400): patches.gate.temperature: Input should be greater than 0" in err
    assert "refuses (404): there is no patch 'gat'" in sluice("enable", "gat", *at)[2]
    status, out, _ = sluice("state", *at)
    assert status == 0
    assert "generation 3, running" in out
    assert ["probes.attention.interval_seconds", "1.0", "admin"] in [line.split() for line in out.splitlines()]
    assert len(sluice("changes", *at)[1].splitlines()) == 4
    engines.ranks[1].refuses.add(4)
    status, _, err = sluice("disable", "gate", *at)
    assert status == 1
    assert "refuses (502): " in err
    assert "\n  ! " in sluice("changes", *at)[1]
    engines.paused = True
    assert sluice("disable", "gate", *at)[0] == 3
    monkeypatch.delenv("SLUICE_ADMIN_TOKEN")
    assert "Bearer TOKEN (no token was sent; name one with --token-file" in sluice("disable", "gate", *at)[2]
    assert control._MOST_CHANGES == KEPT_CHANGES


# ---------------------------------------------------------------------------------------------- the rest
@pytest.mark.parametrize("real", [{"guard": {"enabled": True, "share": 0.25}}], indirect=True)
def test_a_guarded_switch_is_tried_and_shown(sluice, real):
    address, engines = real
    at = ("--url", address)
    status, out, _ = sluice("disable", "gate", *at)
    assert status == 0
    assert "the guard tries it on a share of the requests first" in out
    assert [rank.values["gate"]["enabled"] for rank in engines.ranks] == [True, True]
    out = sluice("state", *at)[1]
    assert "guard: tries patches.gate.enabled: false on 25% of the requests, for " in out
    status, _, err = sluice("set", "patches.gate.floor=0.5", *at)
    assert status == 3
    assert "the guard is trying the patch gate" in err
    assert "tried" in sluice("changes", *at)[1]


@pytest.mark.parametrize("real", [{"guard": {"enabled": True}}], indirect=True)
def test_a_switch_may_pass_the_guard_by(sluice, real):
    address, engines = real
    assert "generation 1 in force on 2 ranks" in sluice("disable", "gate", "--no-guard", "--url", address)[1]
    assert [rank.values["gate"]["enabled"] for rank in engines.ranks] == [False, False]


def test_the_arguments_are_read_without_what_only_a_request_needs():
    program = (
        "import sys; from vllm_sluice import cli\n"
        "cli._parser(['state']).parse_args(['state'])\n"
        "sys.exit(any(m in sys.modules for m in ('pydantic', 'yaml', 'vllm_sluice.commands.client')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)


def test_times_and_durations():
    assert terminal.moment(0, "%Y") in ("1969", "1970")
    assert terminal.moment(1e300) == "1e+300 s"
    spans = (0.043, 0.9996, 9.94, 95, 600, 7200)
    assert [terminal.duration(span) for span in spans] == ["43 ms", "1.0 s", "9.9 s", "95 s", "10 min", "2 h"]
    assert answers.one_line("a\tb\n\n c\x00") == "a b; c?"
