"""Calibration files: what is accepted and refused, what a rank exports of one, and the commands around it."""

from __future__ import annotations

import copy
import http.server
import json
import logging
import lzma
import math
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from vllm_sluice import cli
from vllm_sluice.commands import record
from vllm_sluice.commands.problem import Problem
from vllm_sluice.telemetry import baseline
from vllm_sluice.telemetry.baseline import Baseline, BaselineError, BaselineInForce, Recorder

LAYER = {
    "activation_abs_max": 12.5, "activation_max_to_median_ratio": 40.0, "attention_sink_mass": 0.25,
    "sites": {"hidden": 12.5, "mlp_input": 3.0},
}  # fmt: skip
SECTION = {
    "recorded": "2026-01-02T03:04:05+00:00", "source": "book.txt", "tokens": 1000, "sluice_version": "0.1.0",
    "vllm_version": "0.32.0", "layers": {"000": LAYER, "001": {"activation_abs_max": 20.0}},
}  # fmt: skip
TREE: dict[str, Any] = {
    "format": "sluice-baseline/1", "model": "owner/twin",
    "sections": {"gate=1": SECTION, "gate=0": {**SECTION, "tokens": 2000}},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_tree(tree: Any, name: str = "baseline.json"):
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return path

    return write_tree


# ---------------------------------------------------------------------------------------------- the file
def test_what_is_written_is_read_back(write):
    found = baseline.read(write(TREE))
    assert found.sections["gate=1"].layers["000"].sites == {"hidden": 12.5, "mlp_input": 3.0}
    again = baseline.read(write(found.model_dump_json(indent=2, exclude_none=True)))
    assert again == found
    assert again.sections["gate=1"].digest == found.sections["gate=1"].digest
    assert found.sections["gate=1"].digest != found.sections["gate=0"].digest


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", "sluice-baseline/2", "format: Input should be 'sluice-baseline/1'; found 'sluice-baseline/2'"),
        ("sections", {}, "sections: Dictionary should have at least 1 item"),
        ("sections.on", SECTION, "a section is named by its patch state, such as gate=1; found 'on'"),
        ("sections.gate=1,kv_bias=0", SECTION, "'gate=1' and 'gate=1,kv_bias=0' are the same patch state"),
        ("sections.gate=1.tokens", 0, "sections.gate=1.tokens: Input should be greater than or equal to 1; found 0"),
        ("sections.gate=1.layers.7", LAYER, "a layer is named by three digits, such as 007; found '7'"),
        ("sections.gate=1.layers.000.activation_abs_max", -1.0, "activation_abs_max: Input should be greater than 0"),
        ("sections.gate=1.layers.000.activation_abs_max", "12", "activation_abs_max: Input should be a valid number"),
        ("sections.gate=1.layers.000.attention_sink_mass", 1.5, "Input should be less than or equal to 1; found 1.5"),
        ("sections.gate=1.layers.000.sites.nowhere", 1.0, "'hidden', 'attention_input' or 'mlp_input'"),
        ("sections.gate=1.layers.000.sites.hidden", math.inf, "sites.hidden: Input should be a finite number"),
        ("sections.gate=1.layers.000.abs_max", 1.0, "abs_max: Extra inputs are not permitted"),
    ],
)
def test_a_fault_is_refused_with_its_key(write, path, value, said):
    tree: Any = copy.deepcopy(TREE)
    at = tree
    keys = path.split(".")
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    file = write(tree)
    with pytest.raises(BaselineError) as caught:
        baseline.read(file)
    assert str(caught.value).startswith(f"the baseline {file} cannot be used:\n")
    assert said in str(caught.value)


def test_what_is_no_baseline_is_refused(write, tmp_path):
    for content, said in (("{", "Invalid JSON"), ("[]", "should be an object"), ("{}", "sections: Field required")):
        with pytest.raises(BaselineError, match=said):
            baseline.read(write(content))
    with pytest.raises(BaselineError, match=r"cannot read the baseline .*none\.json: No such file"):
        baseline.read(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BaselineError, match="is no text"):
        baseline.read(tmp_path / "binary")


def test_a_section_is_found_by_the_patches_that_act():
    found = Baseline.model_validate_json(json.dumps(TREE))
    assert found.find({"gate": True}) == "gate=1"
    assert found.find({"gate": True, "kv_bias": False}) == "gate=1"  # a patch kind that came later
    assert found.find({}) == found.find({"gate": False}) == "gate=0"  # not installed is not acting
    assert found.find({"gate": True, "kv_bias": True}) is None
    assert baseline.state_text({"kv_bias": False, "gate": True}) == "gate=1,kv_bias=0"


def test_a_new_section_takes_the_place_of_the_same_patch_state():
    found = Baseline.model_validate_json(json.dumps(TREE))
    newer = found.sections["gate=1"].model_copy(update={"tokens": 5})
    merged = found.with_section("gate=1,kv_bias=0", newer)
    assert {state: section.tokens for state, section in merged.sections.items()} == {
        "gate=0": 2000, "gate=1,kv_bias=0": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "count", "said"),
    [
        ("/somewhere/twin", 2, None),
        ("twin/", 0, None),
        ("owner/twin", 3, None),
        ("owner/other", 2, "was recorded from the model owner/twin, and owner/other is served"),
        ("owner/twin", 1, "section gate=1 has a layer 1, and the model has 1 layers"),
    ],
)
def test_a_baseline_of_another_model_is_refused(model, count, said):
    found = Baseline.model_validate_json(json.dumps(TREE))
    if said is None:
        baseline.check_model(found, model, count)
    else:
        with pytest.raises(BaselineError, match=said):
            baseline.check_model(found, model, count)


def test_layers_that_were_not_recorded_are_named_and_the_others_compared(write, caplog):
    with caplog.at_level(logging.WARNING, logger="vllm.sluice"):
        current = BaselineInForce(str(write(TREE)), "twin", [0, 1, 2, 5], 6)
    current.follow({"gate": True}, {})
    assert exported(current)["good",] == 1
    assert ("activation_abs_max", "001") in exported(current)
    assert "the section gate=1 of the baseline lacks the layers 2, 5" in caplog.text


@pytest.mark.parametrize("dtype_max", [65504.0, 3.3895313892515355e38])
def test_a_recorded_peak_is_the_peak(dtype_max):
    """To the bit, so that the same traffic again does not seem to clip; peaks are float32."""
    for peak in np.abs(np.random.default_rng().standard_normal(2000)).astype(np.float32) * 40:
        recorder = Recorder()
        labels = {"layer": "000", "site": "hidden", "format": "serving", "scale": "none"}
        headroom = ("sluice_quantization_headroom_ratio", labels, dtype_max / float(peak))
        recorder.add([("sluice_serving_dtype_max", {}, dtype_max), headroom])
        section = recorder.section(recorded="now", source="s", tokens=1, sluice_version="1", vllm_version="1")
        assert section.layers["000"].sites["hidden"] == float(peak)


def test_no_attention_to_position_0_is_a_value_too():
    recorder = Recorder()
    for mass in (0.0, 0.5):
        recorder.add([("sluice_attention_sink_mass", {"layer": "000"}, mass)])
        recorder.add([("sluice_activation_abs_max", {"layer": "000"}, 2.0)])
    section = recorder.section(recorded="now", source="s", tokens=1, sluice_version="1", vllm_version="1")
    assert section.layers["000"].attention_sink_mass == 0.25


# ---------------------------------------------------------------------------------------------- in a rank
def exported(current: BaselineInForce) -> dict[tuple[str, ...], float]:
    values = current.values()
    series = current.series()
    assert len(values) == len(series)
    return {
        (s.metric.removeprefix("sluice_baseline_"), *dict(s.labels).values()): value
        for s, value in zip(series, values.tolist(), strict=True)
        if not math.isnan(value)
    }


def test_a_rank_exports_the_section_of_the_patch_state_in_force(write, caplog):
    path = write(TREE)
    current = BaselineInForce(str(path), "twin", [0, 1], 2)
    sections = baseline.read(path).sections
    assert exported(current) == {("good",): 1.0}
    current.follow({"gate": True}, {})
    wanted = {
        ("good",): 1.0,
        ("info", sections["gate=1"].digest, "gate=1"): 1.0,
        ("activation_abs_max", "000"): 12.5,
        ("activation_max_to_median_ratio", "000"): 40.0,
        ("attention_sink_mass", "000"): 0.25,
        ("activation_abs_max", "001"): 20.0,
    }
    assert exported(current) == wanted
    current.follow({"gate": False}, {})
    assert ("info", sections["gate=0"].digest, "gate=0") in exported(current)
    with caplog.at_level(logging.WARNING, logger="vllm.sluice"):
        for _ in range(2):
            current.follow({"gate": True, "kv_bias": True}, {})
    assert exported(current) == {("good",): 1.0}
    assert current.section is None
    assert caplog.text.count("the baseline has no section for gate=1,kv_bias=1; it has: gate=1, gate=0") == 1


def test_a_section_recorded_with_other_parameters_is_not_in_force(write, caplog):
    section = {**TREE["sections"]["gate=1"], "parameters": {"gate.floor": 0.0, "gate.temperature": 1.5}}
    current = BaselineInForce(str(write({**TREE, "sections": {**TREE["sections"], "gate=1": section}})), "twin", [0], 2)
    with caplog.at_level(logging.WARNING, logger="vllm.sluice"):
        current.follow({"gate": True}, {"gate.temperature": 1.5, "gate.floor": 0.0})
        assert current.state == "gate=1"
        assert caplog.text == ""
        for _ in range(2):
            current.follow({"gate": True}, {"gate.temperature": 1.0, "gate.floor": 0.0})
            assert exported(current) == {("good",): 1.0}
            assert current.section is None
    said = "no section for the parameters in force; gate=1 was recorded with gate.temperature 1.5 (now 1)"
    assert caplog.text.count(said) == 1
    current.follow({"gate": False}, {"gate.temperature": 1.0, "gate.floor": 0.0})
    assert current.state == "gate=0"
    current.follow({"gate": True}, {})
    assert current.state is None
    assert "gate.floor 0 (not known here), gate.temperature 1.5 (not known here)" in caplog.text
    current.follow({"gate": True}, {"gate.temperature": 1.5, "gate.floor": 0.0})
    assert current.state == "gate=1"


@pytest.mark.parametrize("content", ["{", {**TREE, "model": "other"}])
def test_a_bad_baseline_is_logged_and_not_good(write, caplog, content):
    with caplog.at_level(logging.ERROR, logger="vllm.sluice"):
        current = BaselineInForce(str(write(content)), "twin", [0, 1], 2)
    current.follow({"gate": True}, {})
    assert exported(current) == {("good",): 0.0}
    assert "sluice: no baseline, the server goes on: " in caplog.text


def test_without_a_baseline_nothing_is_exported():
    current = BaselineInForce(None, "twin", [0, 1], 2)
    current.follow({"gate": True}, {})
    assert exported(current) == {}
    assert np.isnan(current.values()).all()


# ---------------------------------------------------------------------------------------------- recording
def samples(peak: float, sink: float, headroom: float) -> list[tuple[str, dict[str, str], float]]:
    at = {"layer": "000", "site": "mlp_input", "scale": "none"}
    return [
        ("sluice_activation_abs_max", {"layer": "000"}, peak),
        ("sluice_activation_max_to_median_ratio", {"layer": "000"}, peak * 2),
        ("sluice_attention_sink_mass", {"layer": "000"}, sink),
        ("sluice_quantization_headroom_ratio", {**at, "format": "serving"}, headroom),
        ("sluice_quantization_headroom_ratio", {**at, "format": "fp8_e4m3"}, 1.0),
        ("sluice_serving_dtype_max", {}, 1000.0),
        ("sluice_gate_mean", {"layer": "009"}, 0.5),
    ]


def test_a_recorder_keeps_maxima_and_the_mean_sink():
    recorder = Recorder()
    assert recorder.empty
    for scrape in (samples(3.0, 0.2, 200.0), samples(7.0, 0.4, 100.0), samples(5.0, 0.6, 400.0)):
        recorder.add(scrape)
    section = recorder.section(**{k: v for k, v in SECTION.items() if k != "layers"})
    assert section.model_dump()["layers"] == {
        "000": {
            "activation_abs_max": 7.0, "activation_max_to_median_ratio": 14.0,
            "attention_sink_mass": pytest.approx(0.4), "sites": {"mlp_input": 10.0},
        }
    }  # fmt: skip


class Exposition:
    """What a small server answers at /metrics; each scrape calls `change` first."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.change: Any = lambda: None
        self.body: bytes | None = None

    def text(self) -> bytes:
        self.change()
        if self.body is not None:
            return self.body
        lines = []
        for (name, labels), value in self.values.items():
            common = 'model_name="owner/twin",engine="0"'
            lines.append(f"{name}{{{common}{',' if labels else ''}{labels}}} {value!r}")
        return ("\n".join(lines) + "\n").encode()


@pytest.fixture
def server():
    """Serve metrics as a server with traffic has them."""
    shown = Exposition()
    shown.values = {
        ("sluice_info", 'version="0.1.0",vllm_version="0.32.0",fingerprint="f"'): 1.0,
        ("sluice_patch_installed", 'patch="gate"'): 1.0,
        ("sluice_patch_enabled", 'patch="gate"'): 1.0,
        ("sluice_generation", 'rank="pp0-tp0",kind="applied"'): 0.0,
        ("sluice_start_timestamp_seconds", ""): 1.75e9,
        ("sluice_tokens_observed_total", 'phase="prefill"'): 0.0,
        ("sluice_telemetry_interval_seconds", ""): 0.02,
        ("sluice_telemetry_window_seconds", ""): 60.0,
        ("sluice_serving_dtype_max", ""): 1000.0,
        ("sluice_activation_abs_max", 'layer="000"'): 3.0,
        ("sluice_quantization_headroom_ratio", 'layer="000",site="hidden",format="serving",scale="none"'): 250.0,
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = shown.text() if self.path == "/metrics" else b""
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    shown.url = f"http://127.0.0.1:{httpd.server_port}"
    yield shown
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def sluice(capsys):
    def run(*arguments: str):
        try:
            status = cli.main(["baseline", *map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def traffic(shown: Exposition) -> None:
    """Every scrape shows a hundred tokens more, and a peak that falls after the third."""
    scrapes = iter(range(1000))

    def change() -> None:
        scrape = next(scrapes)
        shown.values["sluice_tokens_observed_total", 'phase="prefill"'] = 100.0 * scrape
        shown.values["sluice_activation_abs_max", 'layer="000"'] = 9.0 if scrape == 2 else 4.0

    shown.change = change


def test_recording_from_a_server_sees_every_window(sluice, server, tmp_path):
    traffic(server)
    path = tmp_path / "baseline.json"
    status, out, err = sluice("record", "--url", server.url, "--seconds", "3", "--output", path)
    assert status == 0, err
    found = baseline.read(path)
    assert found.model == "owner/twin"
    section = found.sections["gate=1"]
    assert section.layers["000"].activation_abs_max == 9.0
    assert section.layers["000"].sites == {"hidden": 4.0}
    assert section.tokens >= 300
    assert section.source == server.url
    assert out == f"{path}: gate=1, 1 layers from {section.tokens} tokens\n"

    status, _, err = sluice("record", "--url", server.url, "--seconds", "1", "--output", path)
    assert (status, "is there already; add to it with --append" in err) == (1, True)

    server.values["sluice_patch_enabled", 'patch="gate"'] = 0.0
    status, out, _ = sluice("record", "--url", server.url, "--seconds", "1", "--output", path, "--append", "--json")
    assert status == 0
    assert list(json.loads(out)["sections"]) == ["gate=0"]
    assert sorted(baseline.read(path).sections) == ["gate=0", "gate=1"]
    assert path.stat().st_mode & 0o044  # the server may run as another user


def test_the_parameters_of_patches_that_act_are_written_down(sluice, server, tmp_path):
    traffic(server)
    path = tmp_path / "baseline.json"
    server.values["sluice_patch_parameter", 'patch="gate",parameter="temperature"'] = 1.5
    server.values["sluice_patch_parameter", 'patch="gate",parameter="floor"'] = 0.0
    assert sluice("record", "--url", server.url, "--seconds", "1", "--output", path)[0] == 0
    assert baseline.read(path).sections["gate=1"].parameters == {"gate.floor": 0.0, "gate.temperature": 1.5}
    assert sluice("show", path)[1].splitlines()[2].endswith(", gate.floor 0, gate.temperature 1.5")

    server.values["sluice_patch_enabled", 'patch="gate"'] = 0.0
    assert sluice("record", "--url", server.url, "--seconds", "1", "--output", path, "--append")[0] == 0
    assert baseline.read(path).sections["gate=0"].parameters == {}


def test_engines_with_different_parameters_are_refused(sluice, server, tmp_path):
    traffic(server)
    server.change()
    server.values["sluice_patch_parameter", 'patch="gate",parameter="floor"'] = 0.0
    server.values["sluice_patch_parameter", 'patch="gate",parameter="temperature"'] = 1.0
    one = server.text().decode()
    server.body = (one + one.replace('engine="0"', 'engine="1"').replace("} 1.0", "} 1.25")).encode()
    status, _, err = sluice("record", "--url", server.url, "--seconds", "30", "--output", tmp_path / "baseline.json")
    assert (status, "the parameter gate.temperature is 1 in one engine and 1.25 in another" in err) == (1, True), err


def test_a_patch_that_is_not_installed_does_not_act(sluice, server, tmp_path):
    traffic(server)
    del server.values["sluice_patch_enabled", 'patch="gate"']
    server.values["sluice_patch_installed", 'patch="gate"'] = 0.0
    path = tmp_path / "baseline.json"
    assert sluice("record", "--url", server.url, "--seconds", "1", "--output", path)[0] == 0
    assert list(baseline.read(path).sections) == ["gate=0"]


def meanwhile(shown: Exposition, happens: Any) -> None:
    """Let something happen at every scrape from the fourth on; it gets the number of scrapes since then."""
    traffic(shown)
    change, scrapes = shown.change, iter(range(-3, 1000))

    def and_more() -> None:
        change()
        if (since := next(scrapes)) >= 0:
            happens(since)

    shown.change = and_more


def switched_meanwhile(shown: Exposition) -> None:
    meanwhile(shown, lambda _: shown.values.update({("sluice_patch_enabled", 'patch="gate"'): 0.0}))


WINDOW = ("sluice_telemetry_window_seconds", "")
GATE = 'patch="gate"'
CHANGED = ("sluice_patch_last_change_timestamp_seconds", GATE)
GENERATION = ("sluice_generation", 'rank="pp0-tp0",kind="applied"')


def switched_there_and_back(shown: Exposition) -> None:
    """Between two scrapes, for the first time ever."""
    meanwhile(shown, lambda _: shown.values.update({CHANGED: 1.75e9, GENERATION: 2.0}))


def parameter_changed(shown: Exposition) -> None:
    """Another one than long before the recording."""
    shown.values |= {CHANGED: 1.75e9, GENERATION: 6.0}
    meanwhile(shown, lambda _: shown.values.update({CHANGED: 1.76e9, GENERATION: 7.0}))


def trial_meanwhile(shown: Exposition) -> None:
    """One that has ended at the next scrape: rolled back, it leaves the generation as it was."""
    key = ("sluice_guard_running", GATE)

    def tried(since: int) -> None:
        if since == 0:
            shown.values[key] = 0.0
        else:
            shown.values.pop(key, None)

    meanwhile(shown, tried)


def trial_between_scrapes(shown: Exposition) -> None:
    counted = {("sluice_switches_total", f'result="{result}"'): 1.0 for result in ("tried", "rolled_back")}
    shown.values |= dict.fromkeys(counted, 0.0)
    meanwhile(shown, lambda _: shown.values.update(counted))


def trial_begun_before(shown: Exposition) -> None:
    """Nothing had been measured of it at the first scrape."""
    key = ("sluice_switches_total", 'result="rolled_back"')
    shown.values[key] = 3.0
    meanwhile(shown, lambda _: shown.values.update({key: 4.0}))


def probe_changed(shown: Exposition) -> None:
    """No patch moves with it."""
    shown.values |= {CHANGED: 1.75e9, GENERATION: 6.0}
    meanwhile(shown, lambda _: shown.values.update({GENERATION: 7.0}))


def restarted(shown: Exposition) -> None:
    def restart(since: int) -> None:
        shown.values["sluice_start_timestamp_seconds", ""] = 1.75e9 + 100
        shown.values["sluice_tokens_observed_total", 'phase="prefill"'] = float(since)

    meanwhile(shown, restart)


def engine_lost(shown: Exposition) -> None:
    key = ("sluice_generation", 'rank="pp0-tp1",kind="applied"')
    shown.values |= {key: 0.0, WINDOW: 3.0}
    meanwhile(shown, lambda _: shown.values.pop(key, None))


def every_engine_lost(shown: Exposition) -> None:
    shown.values[WINDOW] = 3.0
    meanwhile(shown, lambda _: stock(shown))


def trial(shown: Exposition) -> None:
    shown.values["sluice_guard_running", 'patch="gate"'] = 5.0


def stock(shown: Exposition) -> None:
    shown.body = b"vllm:num_requests_running 0.0\n"


def garbage(shown: Exposition) -> None:
    shown.body = b"<html>hello</html>\n"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (switched_meanwhile, "the patch gate was switched during the recording, and nothing was written; "),
        (switched_there_and_back, "the patch gate was changed (a parameter, or a switch there and back) during"),
        (parameter_changed, "Record again once the window of 60 s holds only what came after"),
        (trial_meanwhile, "the guard tried a switch on a part of the requests during"),
        (trial_between_scrapes, "the guard tried a switch on a part of the requests during"),
        (trial_begun_before, "a change or a trial of the guard ended as rolled back during"),
        (probe_changed, "a setting of a probe was changed, so that not all was looked at alike, during"),
        (restarted, "restarted during the recording: it began at "),
        (engine_lost, "the ranks that report have changed, from dp0-pp0-tp0, dp0-pp0-tp1 to dp0-pp0-tp0; see the"),
        (every_engine_lost, "the server, or a rank, was lost while recording, and nothing was written: http"),
        (trial, "the guard tries a switch of gate; record when it has ended"),
        (stock, "has no metric of Sluice; start the server with `sluice serve`"),
        (garbage, "/metrics cannot be read: "),
    ],
)
def test_recording_from_a_server_says_why_it_cannot(sluice, server, tmp_path, fault, said):
    """It ends when something is wrong, long before the time that was asked for."""
    fault(server)
    path = tmp_path / "baseline.json"
    status, out, err = sluice("record", "--url", server.url, "--seconds", "30", "--output", path)
    assert (status, out) == (1, "")
    assert said in err
    assert not path.exists()


def test_a_recording_without_traffic_is_refused(sluice, server, tmp_path):
    status, _, err = sluice("record", "--url", server.url, "--seconds", "0.3", "--output", tmp_path / "b.json")
    assert (status, "no token was seen in 0.3 s; record while there is traffic" in err) == (1, True), err
    assert not (tmp_path / "b.json").exists()


def test_a_recording_after_a_switch_is_refused_until_the_window_has_forgotten_it(sluice, server, tmp_path):
    server.values[CHANGED] = time.time() - 20
    status, _, err = sluice("record", "--url", server.url, "--output", tmp_path / "b.json")
    assert (status, "the window still holds what came before; wait " in err) == (1, True), err
    left = server.values[CHANGED] + 60 - time.time()
    assert left - 0.5 <= int(re.search(r"wait (\d+) s", err)[1]) <= 40
    assert not (tmp_path / "b.json").exists()


def test_what_happened_before_the_recording_is_no_reason_to_refuse(sluice, server, tmp_path):
    """Nor is a window that goes empty when there is no traffic for a while, or a rank that lags behind a wish."""
    results = {("sluice_switches_total", f'result="{result}"'): 2.0 for result in ("applied", "tried", "rolled_back")}
    server.values |= {CHANGED: time.time() - 3600, GENERATION: 6.0, **results}
    desired = ("sluice_generation", 'rank="pp0-tp0",kind="desired"')
    server.values[desired] = 6.0

    def idle(since: int) -> None:
        server.values.pop(("sluice_activation_abs_max", 'layer="000"'), None)
        server.values[desired] = 7.0

    meanwhile(server, idle)
    status, _, err = sluice("record", "--url", server.url, "--seconds", "3", "--output", tmp_path / "b.json")
    assert status == 0, err
    assert server.values[desired] == 7.0


def test_a_scrape_that_fails_or_lacks_a_rank_costs_nothing(sluice, server, tmp_path):
    """As long as the window holds what was seen meanwhile."""
    key = ("sluice_generation", 'rank="pp0-tp1",kind="applied"')
    server.values[key] = 0.0

    def fail(since: int) -> None:
        server.values.pop(key, None)
        server.body = b"<html>502</html>" if since == 2 else None
        if since not in (0, 1):
            server.values[key] = 0.0

    meanwhile(server, fail)
    status, _, err = sluice("record", "--url", server.url, "--seconds", "3", "--output", tmp_path / "b.json")
    assert status == 0, err
    assert re.search(r"trying again for \d+ s", err)


def test_an_answer_that_comes_when_the_window_has_moved_on_is_refused(sluice, server, tmp_path):
    server.values |= {WINDOW: 1.2, ("sluice_telemetry_interval_seconds", ""): 0.1}
    meanwhile(server, lambda since: time.sleep(1.2 if since == 0 else 0))
    status, _, err = sluice("record", "--url", server.url, "--seconds", "3", "--output", tmp_path / "b.json")
    assert status == 1
    assert "the answer came so late that the window no longer holds all that was seen" in err
    assert not (tmp_path / "b.json").exists()


def test_a_server_that_is_away_while_it_restarts_was_restarted(sluice, server, tmp_path):
    restarted(server)
    change, scrapes = server.change, iter(range(1000))

    def away() -> None:
        change()
        server.body = b"" if 3 <= next(scrapes) < 8 else None

    server.change = away
    status, _, err = sluice("record", "--url", server.url, "--seconds", "30", "--output", tmp_path / "b.json")
    assert (status, "restarted during the recording" in err) == (1, True), err


def test_nobody_there(sluice, tmp_path):
    status, _, err = sluice("record", "--url", "http://127.0.0.1:9", "--output", tmp_path / "b.json")
    assert status == 1
    assert "no answer from http://127.0.0.1:9" in err


def test_appending_to_another_model_or_to_a_broken_file_is_refused(sluice, server, write):
    traffic(server)
    broken = write("{")
    at = ("record", "--url", server.url, "--seconds", "1", "--append", "--output")
    status, _, err = sluice(*at, broken)
    assert (status, "cannot be used" in err) == (1, True)
    other = write({**TREE, "model": "somebody/else"})
    before = other.read_text()
    status, _, err = sluice(*at, other)
    assert (status, "is of the model somebody/else, this is owner/twin" in err) == (1, True)
    assert other.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://h:1", "--model", "m"], "not allowed with argument"),
        (["--url", "http://h:1", "--text", "a"], "--text goes with --model, not with --url"),
        (["--url", "http://h:1", "--all-states"], "--all-states goes with --model"),
        (["--url", "http://h:1", "--", "--dtype", "float32"], "what follows -- goes with --model"),
        (["--url", "here"], "is no address of a server"),
        (["--model", "m"], "--model needs --text FILE"),
        (["--model", "m", "--text", "a", "--seconds", "5"], "--seconds goes with --url"),
        (["--model", "m", "--text", "a", "--tokens", "0"], "'0' is no number above 0"),
        ([], "one of the arguments --url --model is required"),
    ],
)
def test_arguments_that_do_not_go_together_are_usage_errors(sluice, tmp_path, arguments, said):
    status, _, err = sluice("record", "--output", tmp_path / "b.json", *arguments)
    assert status == 2
    assert said in err


def test_a_folder_that_is_not_there_is_found_out_before_anything_is_recorded(sluice, tmp_path):
    status, _, err = sluice("record", "--url", "http://127.0.0.1:9", "--output", tmp_path / "no" / "b.json")
    assert (status, f"there is no folder {tmp_path / 'no'}" in err) == (1, True)


def test_text_is_read_plain_or_packed(tmp_path):
    plain, packed, bad, empty = (tmp_path / name for name in ("a.txt", "a.xz", "b.txt", "c.txt"))
    plain.write_text("naïve", encoding="utf-8")
    packed.write_bytes(lzma.compress("naïve".encode()))
    bad.write_bytes(b"\xff\xff")
    empty.write_text(" \n")
    assert record._read_text(plain) == record._read_text(packed) == "naïve"
    for path, said in ((bad, "is no UTF-8 text"), (empty, "holds no text"), (tmp_path / "none", "No such file")):
        with pytest.raises(Problem, match=said):
            record._read_text(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", "1"], "--context 1 leaves no room for text: a prompt needs 2 tokens or more"),
        (["--", "--max-model-len", "2"], "the model takes 2 tokens at most (--max-model-len), which leaves no room"),
        (["--", "--dtype", "float32", "--max_model_len=1"], "the model takes 1 token at most (--max-model-len)"),
    ],
)
def test_prompts_that_are_too_short_are_refused_before_a_model_is_loaded(
    sluice, tmp_path, monkeypatch, arguments, said
):
    def load(*_: Any) -> None:
        pytest.fail("a model is loaded")

    monkeypatch.setattr(record, "_Engine", load)
    text, path = tmp_path / "a.txt", tmp_path / "b.json"
    text.write_text("It was a dark and stormy night")
    status, out, err = sluice("record", "--model", "m", "--text", text, "--output", path, *arguments)
    assert (status, out) == (1, "")
    assert said in err
    assert not path.exists()


class Tokenizer:
    """One token a character, 1 before a text."""

    bos_token_id: int | None = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.bos_token_id] * (add_special_tokens and self.bos_token_id is not None) + list(map(ord, text))


def loaded(max_model_len: int, bos: int | None) -> record._Engine:
    """Return an engine as it is once the model is loaded."""
    tokenizer = Tokenizer()
    tokenizer.bos_token_id = bos
    settings = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len)))
    engine = record._Engine.__new__(record._Engine)
    engine._llm = SimpleNamespace(get_tokenizer=lambda: tokenizer, llm_engine=settings)
    return engine


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("longest", [1, 2])
def test_a_model_that_turns_out_to_take_too_few_tokens_is_refused(bos, longest):
    with pytest.raises(Problem, match=f"the model takes {longest} tokens? at most"):
        loaded(longest, bos).prompts("abcd", 100, 512)


def test_the_shortest_prompts_hold_all_of_the_text():
    assert loaded(3, 1).prompts("abc", 100, 512) == [[1, 97], [1, 98], [1, 99]]
    assert loaded(4096, None).prompts("abc", 100, 2) == [[97, 98], [99]]


# ---------------------------------------------------------------------------------------------- show
def test_show_prints_what_a_file_holds(sluice, write):
    path = write(TREE)
    status, out, _ = sluice("show", path)
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["000", "12.5", "40", "0.25", "12.5", "-", "3"] in lines
    assert ["001", "20", "-", "-", "-", "-", "-"] in lines
    digest = baseline.read(path).sections["gate=1"].digest
    assert out.startswith(f"{path}: owner/twin\n\ngate=1  ({digest}): 1000 tokens")
    status, out, _ = sluice("show", path, "--json")
    assert json.loads(out)["sections"]["gate=0"]["layers"]["000"] == LAYER
    status, _, err = sluice("show", path.with_name("none.json"))
    assert (status, "No such file" in err) == (1, True)


def test_show_needs_neither_torch_nor_vllm(write):
    program = (
        "import sys; from vllm_sluice import cli\n"
        f"cli.main(['baseline', 'show', {str(write(TREE))!r}])\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'vllm')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=dict(os.environ), timeout=60, check=True)
