"""`sluice demo`: a server with traffic, live metrics and, where it is installed, Prometheus; Ctrl-C ends it all."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import urllib.parse
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sluice.commands.problem import Problem
from vllm_sluice.stack import DEFAULT_MODEL

if TYPE_CHECKING:
    from vllm_sluice.demo.traffic import Totals, Traffic
    from vllm_sluice.stack.child import Child
    from vllm_sluice.stack.console import StatusLine, Stop
    from vllm_sluice.stack.service import Service

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_PERIOD = 0.5
_GRAPHED = "sluice_attention_sink_mass"


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
    from vllm_sluice.stack import server
    from vllm_sluice.stack.console import Stop, Stopped

    server.check(args.model, args.port)
    scratch = Path(tempfile.mkdtemp(prefix="sluice-demo-"))
    with Stop() as stop:
        with suppress(Stopped):
            _demo(args, scratch, stop)
        # After a Problem the folder stays: it holds the log that says more.
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _demo(args: argparse.Namespace, scratch: Path, stop: Stop) -> None:
    from vllm_sluice.demo.traffic import Traffic
    from vllm_sluice.stack import prometheus, server
    from vllm_sluice.stack.console import StatusLine
    from vllm_sluice.stack.loopback import HOST
    from vllm_sluice.stack.service import stop_child

    base = f"http://{HOST}:{args.port}"
    with ExitStack() as cleanup:
        line = cleanup.enter_context(StatusLine())
        began = time.monotonic()
        model = server.start(args.model, args.port, args.vllm, scratch)
        cleanup.callback(stop_child, model, line)
        server.wait_until_healthy(model, base, line, stop)
        settings = prometheus.scrape_only(f"{HOST}:{args.port}")
        monitor = None if args.no_prometheus else prometheus.start(settings, scratch)
        children = [model]
        if monitor is not None:
            children.append(monitor.child)
            cleanup.callback(stop_child, monitor.child, line)
            monitor.wait(line, stop)
        name, context = server.served_model(base)
        line.clear()
        print(_welcome(base, name, time.monotonic() - began, monitor, args.no_prometheus, model.log), flush=True)
        traffic = Traffic(f"{base}/v1", name, context, args.clients)
        cleanup.callback(traffic.stop)
        traffic.start()
        _watch(children, traffic, line, stop, args.duration)


def _watch(
    children: list[Child], traffic: Traffic, line: StatusLine, stop: Stop, duration: float | None
) -> None:
    """Show the traffic until a child ends or the time is up."""
    from vllm_sluice.stack.service import check_all_alive

    began = before = time.monotonic()
    counted, rate = 0, 0.0
    while duration is None or time.monotonic() - began < duration:
        check_all_alive(children)
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


def _status(totals: Totals, rate: float, seconds: float) -> str:
    text = f"traffic: {seconds:.0f} s, {totals.requests} requests, {totals.tokens} tokens, {rate:.0f} tokens/s"
    return text + (f", {totals.errors} errors (last: {totals.last_error})" if totals.errors else "")


def _welcome(
    base: str, model: str, seconds: float, prometheus: Service | None, declined: bool, log: Path
) -> str:
    from vllm_sluice.stack.loopback import get

    page = f"{base}/plugins/sluice/"
    rows = [
        ("live page", page, "layers over time, attention sinks, gates, patch state"),
        ("metrics", f"{base}/metrics", "lines that begin with sluice_"),
        ("API", f"{base}/v1", f"OpenAI-compatible, model {model}"),
    ]
    if prometheus is not None:
        rows.append(_prometheus_row(prometheus.url))
    lines = [f"{model} is being served (ready after {seconds:.0f} s):", ""]
    lines += [f"  {name:<11} {url}\n  {'':<11} {text}" for name, url, text in rows]
    if prometheus is None and not declined:
        lines += ["", "  Prometheus is not installed; for graphs: apt-get install prometheus, then start this again."]
    if get(page) is None:
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
    from vllm_sluice.stack.loopback import get

    query = urllib.parse.urlencode({"g0.expr": _GRAPHED, "g0.tab": "0", "g0.range_input": "5m"})
    # Some builds, such as Debian's from version 2.53 on, come without the web interface.
    if get(f"{url}/graph") is not None:
        return "Prometheus", f"{url}/graph?{query}", "attention to position 0 by layer, over time"
    query = urllib.parse.urlencode({"query": _GRAPHED})
    return "Prometheus", f"{url}/api/v1/query?{query}", "this build has no graphs; its API answers queries"
