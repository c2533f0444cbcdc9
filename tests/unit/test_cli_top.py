"""`sluice top`: one frame as text, what fits, and the terminal as it was before."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.live.synthetic import Model, info, record, series, write
from tests.live.synthetic import served as live_server
from vllm_sluice import cli
from vllm_sluice.commands import top
from vllm_sluice.commands.client import Client
from vllm_sluice.commands.terminal import bar, paint
from vllm_sluice.config import Live
from vllm_sluice.live.history import History
from vllm_sluice.telemetry.collector import SnapshotCollector

ENTER, LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"


@pytest.fixture
def recorded(tmp_path):
    """Record points of models; return the data that `live.json` answers with."""

    def run(*models: Model, steps: int = 20) -> dict:
        now = [0.0]
        history = History(SnapshotCollector(tmp_path), Live(), clock=lambda: now[0])
        record(history, tmp_path, list(models), steps, now)
        return json.loads(history.as_json(since=-30.0, metrics=()))

    return run


@pytest.fixture
def once(url, capsys, monkeypatch):
    """Print one frame; return exit status, lines and standard error."""

    def run(*arguments: str, columns: int = 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        status = cli.main(["top", "--once", "--url", url, *arguments])
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out
        return status, printed.out.splitlines(), printed.err

    return run


def frame(url: str, width: int, height: int | None, encoding: str = "utf-8") -> list[str]:
    view = top.look(Client(url), None)
    return [paint(pieces, False) for pieces in top.frame(view, width, height, encoding)]


# ---------------------------------------------------------------------------------------------- one frame
def test_a_frame_has_a_header_and_a_line_for_each_layer(once, api, recorded):
    api.live = recorded(Model(layers=32, gate=False))
    status, lines, err = once()
    assert (status, err) == (0, "")
    assert lines[0].startswith("sluice/twin-32  engine 0, generation 3  live  ")
    # The state is newer than the last point of the page, which knows no gate here.
    assert lines[1].startswith("patches: gate on  tokens seen: 2,287 prefill (60/s), 687 decode (18/s)")
    assert lines[3].split() == [
        "layer", "max", "|h|", "max/median", "kurtosis", "massive", "sink", "mass", "sink", "heads"
    ]  # fmt: skip
    assert len(lines) == 4 + 32
    latest = api.live["engines"][0]["latest"]
    cells = lines[4 + 16].split()
    assert cells[0] == "16"
    assert float(cells[1].replace(",", "")) == pytest.approx(latest["activation_abs_max"][16], rel=1e-3)
    assert float(cells[2].replace(",", "")) == pytest.approx(latest["activation_max_to_median_ratio"][16], rel=1e-3)
    assert cells[3][0] == "█"
    assert float(cells[4].replace(",", "")) == pytest.approx(latest["activation_kurtosis"][16], rel=1e-3)
    assert cells[5] == "19"
    assert float(cells[6]) == pytest.approx(latest["attention_sink_mass"][16], abs=1e-3)
    assert cells[8] == f"{latest['attention_sink_heads'][16]}/16"


def test_a_gated_model_has_one_column_more(once, api, recorded):
    api.live = recorded(Model(layers=4))
    lines = once()[1]
    assert lines[3].endswith("  gate mean")
    assert float(lines[4].split()[-1]) == pytest.approx(api.live["engines"][0]["latest"]["gate_mean"][0], abs=1e-3)


def test_bad_numbers_are_named(once, api, recorded):
    api.live = recorded(Model(layers=4, nonfinite_layer=2))
    api.live["engines"][0]["latest"]["activation_abs_max"][2] = 1e999
    api.live["engines"][0]["series"]["probe_errors_total"]["attention"][-1] = 3
    lines = once()[1]
    assert lines[2] == "! NaN or infinite values in layer 2"
    assert lines[3] == "! failed, see the server's log: probe attention"
    assert lines[-2].split()[:2] == ["2", "inf"]


def test_an_idle_model_is_no_model_without_outliers(once, api, recorded):
    api.live = recorded(Model(layers=2, gate=False, quiet=range(40)))
    lines = once()[1]
    assert "  idle: no traffic in the window  " in lines[0]
    assert lines[4].split() == ["0", "-", "-", "-", "19", "-", "-"]


def test_a_worker_that_is_silent_is_stale(once, api, recorded):
    api.live = recorded(Model(layers=2))
    api.live["time"] += 60
    assert "  stale: last snapshot 60 s ago  " in once()[1][0]
    api.live = {**api.live, "times": []}
    engine = api.live["engines"][0]
    engine["series"] = {metric: {label: [] for label in labels} for metric, labels in engine["series"].items()}
    assert "  no data: no worker reports  " in once()[1][0]


def test_before_a_worker_reports_there_is_nothing_to_show(once, api, recorded):
    api.live = recorded()
    assert once()[1] == ["Sluice", "no worker reports; while a model loads this is normal"]


def test_one_of_several_engines(once, api, recorded):
    api.live = recorded(Model(layers=2), Model(layers=3, engine="1", name="other"))
    assert once()[1][0].startswith("sluice/twin-32  engine 0 of 0, 1, ")
    assert once("--engine", "1")[1][0].startswith("other  engine 1 of 0, 1, ")
    status, lines, err = once("--engine", "2")
    assert (status, lines) == (1, [])
    assert err.endswith("has no engine 2; it has: 0, 1\n")


def test_a_live_page_that_is_switched_off(once, api):
    api.live = "The live page is switched off: the setting live.enabled is false. Set it to true.\n"
    status, _, err = once()
    assert status == 1
    assert err.endswith("refuses (404): The live page is switched off: the setting live.enabled is false. "
                        "Set it to true.\n")  # fmt: skip


def test_live_data_in_another_form(once, api):
    api.live = {"times": "never"}
    status, _, err = once()
    assert status == 1
    assert "in a form that this version cannot read" in err


def test_the_real_routes_answer_what_is_asked(tmp_path, capsys):
    now = [0.0]
    collector = SnapshotCollector(tmp_path)
    history = History(collector, Live(), clock=lambda: now[0])
    record(history, tmp_path, [Model(layers=3)], 5, now)
    with live_server(collector, Live(), history) as address:
        assert cli.main(["top", "--once", "--url", address]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert (lines[0].split()[0], len(lines)) == ("sluice/twin-32", 4 + 3)
    with live_server(collector, Live(enabled=False), history) as address:
        assert cli.main(["top", "--once", "--url", address]) == 1
        assert "The live page is switched off" in capsys.readouterr().err


def test_a_hostile_name_does_not_reach_the_terminal(once, api, tmp_path, recorded):
    write(tmp_path, info(model="evil\x1b[2J"), {series("activation_abs_max", layer="000"): 1.0})
    api.live = recorded()
    api.live = recorded(steps=1)
    assert once()[1][0].startswith("evil?[2J  engine 0")


# ---------------------------------------------------------------------------------------------- what fits
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_no_line_of_the_table_is_wider_than_the_terminal(url, api, recorded, width):
    api.live = recorded(Model(layers=3, name="/models/with/a/very/long/path/that/says/little/twin-32"))
    lines = frame(url, width, None)
    if width >= 80:
        assert max(map(len, lines)) <= width
        assert lines[0].startswith("..." if width < 100 else "/models")
        assert "twin-32  engine 0" in lines[0]
    assert max(map(len, lines[3:])) <= width
    assert lines[3].split()[0] == "layer"
    assert ("█" in lines[5]) == (width >= 100)


@pytest.mark.parametrize("height", [6, 10, 24])
def test_layers_that_do_not_fit_are_counted(url, api, recorded, height):
    api.live = recorded(Model(layers=32))
    lines = frame(url, 120, height)
    assert len(lines) == height
    assert lines[-1] == f"{32 - (height - 5)} more layers"
    assert lines[-2].split()[0] == str(height - 6) if height > 5 else True
    assert len(frame(url, 120, 4 + 32)) == 4 + 32
    assert len(frame(url, 120, 1)) == 5


def test_bars():
    assert bar(0.5, 4, "utf-8") == "██  "
    assert bar(0.53, 4, "utf-8") == "██▏ "
    assert bar(7.0, 4, "utf-8") == "████"
    assert bar(-1.0, 4, "utf-8") == "    "
    for encoding in ("ascii", "latin-1", None, "none"):
        assert bar(0.5, 4, encoding) == "##  "


# ---------------------------------------------------------------------------------------------- the full screen
def test_the_live_view_needs_a_terminal(url, capsys):
    assert cli.main(["top", "--url", url]) == 1
    assert "sluice: the live view needs a terminal, and the output is none; use --once" in capsys.readouterr().err


class Screen:
    """The command in a terminal of its own."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.terminal, inner = pty.openpty()
        command = [sys.executable, "-m", "vllm_sluice.cli", "top", "--url", url, "--interval", "0.1", *arguments]
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "12"}
        environ.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=inner, stdout=inner, stderr=inner, env=environ, start_new_session=True
        )
        os.close(inner)
        self.seen = b""

    def until(self, wanted: bytes, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            assert time.monotonic() < end, f"{wanted!r} did not come; {self.seen[-2000:]!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.terminal, 65536)
                except OSError:  # the other end is closed
                    assert wanted in self.seen, self.seen[-2000:]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.fixture
def screen(url, api, recorded):
    api.live = recorded(Model(layers=32))
    started = Screen(url)
    yield started
    started.close()


def test_the_screen_is_refreshed_and_given_back_at_q(screen, api):
    screen.until(ENTER)
    screen.until(b"\x1b[32mgate on\x1b[0m")
    screen.until(b"25 more layers")
    api.admin["patches.gate.enabled"] = False
    screen.until(b"\x1b[33mgate off\x1b[0m")
    os.write(screen.terminal, b"xq")
    screen.until(LEAVE)
    assert screen.process.wait(timeout=20) == 0
    assert screen.seen.endswith(LEAVE)
    assert b"xq" not in screen.seen


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_screen_is_given_back_at_a_signal(screen, number, status):
    screen.until(b"more layers")
    screen.process.send_signal(number)
    screen.until(LEAVE)
    assert screen.process.wait(timeout=20) == status


def test_a_server_that_is_gone_leaves_its_last_frame(screen, api):
    screen.until(b"more layers")
    screen.seen = b""
    api.raw["live.json"] = (503, "text/plain", b"down")
    screen.until(b"the numbers are those of ")
    screen.seen = b""
    del api.raw["live.json"]
    screen.until(b"\x1b[H\x1b[1msluice/twin-32")
    os.write(screen.terminal, b"q")
    assert screen.process.wait(timeout=20) == 0
