"""`sluice demo`: a server with traffic, live metrics and, where it is installed, Prometheus; Ctrl-C ends it all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sluice.commands.problem import Problem

if TYPE_CHECKING:
    from types import FrameType

    from vllm_sluice.demo.child import Child
    from vllm_sluice.demo.traffic import Totals, Traffic

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_MODEL = "models/twin-gated"
_HOST = "127.0.0.1"
_PROMETHEUS_PORT = 9090
_PERIOD = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PLAIN_PERIOD = 10.0
_GRAPHED = "sluice_attention_sink_mass"
_STAGES = (
    ("init engine", "starting the API"),
    ("Warming up done", "making the KV cache"),
    ("Warming up model for the compilation", "compiling the model"),
    ("Starting to load model", "loading the model"),
    ("Initializing a V1 LLM engine", "starting the engine"),
)


class _Stopped(Exception):
    """Someone asked the demo to stop."""


class _Stop:
    """Remembers SIGINT, SIGTERM and SIGHUP until it is asked.

    An exception out of the signal handler could come between the start of a child and the note to end it.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _Stop:
        self._previous = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Wait; raise `_Stopped` if a signal came."""
        time.sleep(seconds)
        if self._asked:
            raise _Stopped

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True


def add_command(subparsers: Subparsers) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="serve a model with traffic, live metrics and Prometheus until Ctrl-C",
        usage="sluice demo [MODEL] [options] [-- options of vllm serve]",
        description="Serve a model, send it passages of a book, and show where to look. Ctrl-C stops everything.",
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL",
                        help="folder or Hugging Face name (default: %(default)s)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="port of the server (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=2, metavar="N", help="concurrent clients (default: %(default)s)")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="stop after this much traffic")
    parser.add_argument("--no-prometheus", action="store_true", help="do not start Prometheus")
    parser.set_defaults(run=run, vllm=[])


def run(args: argparse.Namespace) -> int:
    """Run the demo until it is stopped; return 0 if it was stopped from outside or by `--duration`.

    Raises
    ------
    Problem
        If it cannot start, or a process of it ended by itself.
    """
    from vllm_sluice.commands import serve

    serve.check_model(args.model)
    serve.check_port(_HOST, args.port, "PORT=" if "MAKELEVEL" in os.environ else "--port ")
    _check_memory()
    scratch = Path(tempfile.mkdtemp(prefix="sluice-demo-"))
    with _Stop() as stop:
        with suppress(_Stopped):
            _demo(args, scratch, stop)
        # After a Problem the folder stays: it holds the log that says more.
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _demo(args: argparse.Namespace, scratch: Path, stop: _Stop) -> None:
    from vllm_sluice.demo.traffic import Traffic

    base = f"http://{_HOST}:{args.port}"
    with ExitStack() as cleanup:
        line = cleanup.enter_context(_StatusLine())
        began = time.monotonic()
        server = _start_server(args, scratch)
        cleanup.callback(_stop_child, server, line)
        _wait_until_healthy(server, base, line, stop)
        prometheus = None if args.no_prometheus else _start_prometheus(args.port, scratch)
        children = [server]
        if prometheus is not None:
            children.append(prometheus[0])
            cleanup.callback(_stop_child, prometheus[0], line)
            _wait_until_ready(*prometheus, stop)
        model, context = _served_model(base)
        line.clear()
        print(_welcome(base, model, time.monotonic() - began, prometheus, args.no_prometheus, server.log), flush=True)
        traffic = Traffic(f"{base}/v1", model, context, args.clients)
        cleanup.callback(traffic.stop)
        traffic.start()
        _watch(children, traffic, line, stop, args.duration)


# ------------------------------------------------------------------------------------------------ the processes
def _start_server(args: argparse.Namespace, scratch: Path) -> Child:
    from vllm_sluice.config import RUN_DIR_VARIABLE
    from vllm_sluice.demo.child import Child

    command = [sys.executable, "-m", "vllm_sluice.cli", "serve", args.model, "--host", _HOST, "--port", str(args.port)]
    if not any(option.startswith("--max-model-len") for option in args.vllm):
        command += ["--max-model-len", "auto"]  # a long context would not fit the demo's small KV cache
    if Path(args.model).is_dir() and not any(option.startswith("--served-model-name") for option in args.vllm):
        command += ["--served-model-name", Path(args.model).resolve().name]
    environ = dict(os.environ)
    environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read by the CPU build only
    environ.setdefault(RUN_DIR_VARIABLE, str(scratch / "run"))
    environ["PYTHONUNBUFFERED"] = "1"
    return Child("server", [*command, *args.vllm], scratch / "server.log", environ)


def _wait_until_healthy(server: Child, base: str, line: _StatusLine, stop: _Stop) -> None:
    began = time.monotonic()
    while True:
        _check_alive(server)
        if _get(f"{base}/health") is not None:
            return
        log = server.log.read_text(encoding="utf-8", errors="replace")
        stage = next((text for sign, text in _STAGES if sign in log), "loading vLLM")
        line.show(f"starting the server: {time.monotonic() - began:.0f} s, {stage}")
        stop.sleep(_PERIOD)


def _start_prometheus(server_port: int, scratch: Path) -> tuple[Child, str] | None:
    """Start Prometheus with a scratch data folder; return it with its URL, or None if it is not installed."""
    from vllm_sluice.demo.child import Child

    program = shutil.which("prometheus")
    if program is None:
        return None
    port = _free_port(_PROMETHEUS_PORT)
    settings = scratch / "prometheus.yml"
    settings.write_text(prometheus_settings(f"{_HOST}:{server_port}"), encoding="utf-8")
    command = [
        program,
        f"--config.file={settings}",
        f"--storage.tsdb.path={scratch / 'prometheus'}",
        f"--web.listen-address={_HOST}:{port}",
        "--log.level=warn",
    ]
    return Child("prometheus", command, scratch / "prometheus.log", os.environ), f"http://{_HOST}:{port}"


def _wait_until_ready(prometheus: Child, url: str, stop: _Stop) -> None:
    for _ in range(40):
        _check_alive(prometheus)
        if _get(f"{url}/-/ready") is not None:
            return
        stop.sleep(_PERIOD / 2)


def prometheus_settings(target: str) -> str:
    """Return a prometheus.yml that scrapes one server every 2 s."""
    # JSON is YAML, and no host or port can break out of it.
    settings = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "sluice", "static_configs": [{"targets": [target]}]}],
    }
    return json.dumps(settings, indent=2) + "\n"


def _watch(
    children: list[Child], traffic: Traffic, line: _StatusLine, stop: _Stop, duration: float | None
) -> None:
    """Show the traffic until a child ends or the time is up."""
    began = before = time.monotonic()
    counted, rate = 0, 0.0
    while duration is None or time.monotonic() - began < duration:
        for child in children:
            _check_alive(child)
        now, totals = time.monotonic(), traffic.totals
        if now - before >= 2.0:
            rate = (totals.tokens - counted) / (now - before)
            before, counted = now, totals.tokens
        line.show(_status(totals, rate, now - began))
        stop.sleep(_PERIOD)
    line.clear()
    totals = traffic.totals
    print(_status(totals, totals.tokens / max(time.monotonic() - began, 1e-9), time.monotonic() - began), flush=True)
    if totals.requests == 0 and totals.errors:
        raise Problem(f"no request was answered; the last error was: {totals.last_error}")


def _check_alive(child: Child) -> None:
    status = child.exit_status
    if status is None:
        return
    ended = f"by signal {-status}" if status < 0 else f"with status {status}"
    raise Problem(f"the {child.name} ended {ended}: {child.why()}\n(log: {child.log})")


def _stop_child(child: Child, line: _StatusLine) -> None:
    if child.exit_status is None:
        line.show(f"stopping the {child.name}")
    child.stop()


# ------------------------------------------------------------------------------------------------ looking and saying
class _StatusLine:
    """One line that is written over on a terminal, and repeated now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._last = -_PLAIN_PERIOD
        self._shown = False

    def __enter__(self) -> _StatusLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Show a text in place of the last one."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\x1b[K{text[:width]}")
            sys.stdout.flush()
            self._shown = True
        elif time.monotonic() - self._last >= _PLAIN_PERIOD:
            self._last = time.monotonic()
            print(text, flush=True)

    def clear(self) -> None:
        """Leave an empty line, so that other output starts at its beginning."""
        if self._shown:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
            self._shown = False


def _status(totals: Totals, rate: float, seconds: float) -> str:
    text = f"traffic: {seconds:.0f} s, {totals.requests} requests, {totals.tokens} tokens, {rate:.0f} tokens/s"
    return text + (f", {totals.errors} errors (last: {totals.last_error})" if totals.errors else "")


def _welcome(
    base: str, model: str, seconds: float, prometheus: tuple[Child, str] | None, declined: bool, log: Path
) -> str:
    page = f"{base}/plugins/sluice/"
    rows = [
        ("live page", page, "layers over time, attention sinks, gates, patch state"),
        ("metrics", f"{base}/metrics", "lines that begin with sluice_"),
        ("API", f"{base}/v1", f"OpenAI-compatible, model {model}"),
    ]
    if prometheus is not None:
        rows.append(_prometheus_row(prometheus[1]))
    lines = [f"{model} is being served (ready after {seconds:.0f} s):", ""]
    lines += [f"  {name:<11} {url}\n  {'':<11} {text}" for name, url, text in rows]
    if prometheus is None and not declined:
        lines += ["", "  Prometheus is not installed; for graphs: apt-get install prometheus, then start this again."]
    if _get(page) is None:
        lines += ["", f"  The live page does not answer; the server's log may say why: {log}"]
    lines += [
        "",
        "Look at each layer's largest activation beside its median, at the attention that goes to position 0, and, on",
        "a gated model, at the gates: a gated model needs no attention sink. Ctrl-C stops everything.",
        f"The server's log: {log}",
        "",
    ]
    return "\n".join(lines)


def _prometheus_row(url: str) -> tuple[str, str, str]:
    query = urllib.parse.urlencode({"g0.expr": _GRAPHED, "g0.tab": "0", "g0.range_input": "5m"})
    # Some builds, such as Debian's from version 2.53 on, come without the web interface.
    if _get(f"{url}/graph") is not None:
        return "Prometheus", f"{url}/graph?{query}", "attention to position 0 by layer, over time"
    query = urllib.parse.urlencode({"query": _GRAPHED})
    return "Prometheus", f"{url}/api/v1/query?{query}", "this build has no graphs; its API answers queries"


def _served_model(base: str) -> tuple[str, int]:
    """Return the served model's name and its context length."""
    answer = _get(f"{base}/v1/models")
    if answer is None:
        raise Problem(f"{base}/v1/models does not answer; does a --api-key or a proxy stand in between?")
    model: dict[str, Any] = json.loads(answer)["data"][0]
    return str(model["id"]), int(model.get("max_model_len") or 2048)


def _get(url: str) -> bytes | None:
    """Return the body of a page, or None if it cannot be had."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            body: bytes = answer.read()
            return body
    except (urllib.error.URLError, OSError):
        return None


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Problem("no free port found for Prometheus; try --no-prometheus")


def _check_memory(free: Callable[[], float | None] | None = None) -> None:
    from vllm_sluice.commands import distribution, doctor

    vllm = distribution.installed()
    if vllm is None:
        raise Problem("vLLM is not installed in this Python; on a CPU: make install, on a GPU: pip install vllm")
    found = (free or doctor.free_memory_gib)()
    if vllm.is_cpu and found is not None and found < doctor.CPU_MEMORY_GIB:
        raise Problem(
            f"serving on the CPU needs about {doctor.CPU_MEMORY_GIB:g} GiB of free memory; {found:.1f} GiB are free. "
            "Stop something that uses memory"
        )
