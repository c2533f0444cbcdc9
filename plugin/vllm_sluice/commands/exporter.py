"""`sluice exporter`: serves the metrics of the ranks on this machine, from the snapshots in a run folder.

For ranks that an API server cannot see, because they run on another machine or because its front end is not Python:
it needs neither vLLM nor the plugin, only the folder.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vllm_sluice.commands.problem import Problem

if TYPE_CHECKING:
    from vllm_sluice.telemetry.collector import Presence, SnapshotCollector

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_PORT = 9460
_DESCRIPTION = """\
Serve /metrics with the series of the ranks that write into a run folder, and /health, until it is stopped.

Run one beside the ranks that the API server cannot see: those on another machine (several pods, Ray). The API server
reports the ranks of its own machine itself. Give the ranks and the exporter the same folder with SLUICE_RUN_DIR and
the same user; the folder may appear later.
"""


@dataclass(frozen=True)
class Answer:
    """What a path answers."""

    status: int
    content_type: str
    body: bytes


class Server(ThreadingTCPServer):
    """Answers each connection in a thread; `http.server.HTTPServer` would ask the name service at the start."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


Route = Callable[[str], Answer]
"""Makes the answer for the value of the `Accept` header."""


def add_command(subparsers: Subparsers) -> None:
    """Add `exporter` to the command line."""
    parser = subparsers.add_parser(
        "exporter",
        help="serve the metrics of ranks that the API server cannot see",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run-dir", metavar="DIR",
        help="folder with the snapshots (default: SLUICE_RUN_DIR, else the only one of a running server here)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="TCP port (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="interface, 0.0.0.0 or :: for all (default: %(default)s)")
    parser.add_argument(
        "--gone-after", type=_seconds, metavar="SECONDS",
        help="take a rank as gone when it has not written for so long, instead of looking for its process; for a "
        "container that does not share the process namespace of the ranks",
    )  # fmt: skip
    parser.add_argument("--sluice-config", metavar="FILE", help="the server's settings, for telemetry.detail")
    parser.set_defaults(run=_run)


def find_folder(named: str | None) -> Path:
    """Return the run folder to serve.

    Parameters
    ----------
    named
        Folder that the caller asks for; it need not exist yet. Default: the one of `SLUICE_RUN_DIR`, else the only
        one of a running server on this machine.

    Raises
    ------
    Problem
        If no folder is named and there is none, or more than one.
    """
    from vllm_sluice.config import RUN_DIR_VARIABLE
    from vllm_sluice.telemetry import rundir

    chosen = named or os.environ.get(RUN_DIR_VARIABLE)
    if chosen:
        return Path(chosen)
    found = rundir.of_running_servers()
    if len(found) == 1:
        return found[0]
    listing = ", ".join(map(str, found)) or "none"
    raise Problem(
        f"{len(found)} run folders of running servers found here ({listing}); name one with --run-dir, or set "
        f"{RUN_DIR_VARIABLE} for the server and the exporter alike"
    )


def written_within(seconds: float) -> Presence:
    """Return a test that a rank passes if it has written its snapshot lately."""
    return lambda snapshot: time.time() - snapshot.time <= seconds


def routes(folder: Path, collector: SnapshotCollector) -> dict[str, Route]:
    """Return what each path answers."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry()
    registry.register(collector)

    def metrics(accept: str) -> Answer:
        encode, content_type = choose_encoder(accept)
        return Answer(200, content_type, encode(registry))

    def health(_: str) -> Answer:
        # No rank is no failure: a model takes minutes to load, and a restart of the exporter would not help.
        problem = unreadable(folder)
        found: dict[str, Any] = {"folder": str(folder), "ranks": [s.info.rank for s in collector.snapshots()]}
        if problem is not None:
            found["problem"] = problem
        return Answer(503 if problem else 200, "application/json", json.dumps(found).encode() + b"\n")

    return {"/metrics": metrics, "/health": health}


def unreadable(folder: Path) -> str | None:
    """Say why a folder that is there cannot be read, or None."""
    if not folder.exists() or os.access(folder, os.R_OK | os.X_OK):
        return None
    return f"{folder} belongs to user {folder.stat().st_uid}; run the exporter as that user, not as {os.getuid()}"


def server(host: str, port: int, answers: dict[str, Route]) -> Server:
    """Bind a server that answers these paths.

    Raises
    ------
    OSError
        If it cannot listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version = "sluice-exporter"
        sys_version = ""
        timeout = 30  # an idle connection must not hold a thread for ever

        def do_GET(self) -> None:
            route = answers.get(urlsplit(self.path).path)
            answer = route(self.headers.get("accept", "")) if route else _unknown(answers)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Write nothing: a scrape every few seconds is no news."""

    return Server((host, port), Handler)


def _run(args: argparse.Namespace) -> int:
    from vllm_sluice import config
    from vllm_sluice.telemetry.collector import SnapshotCollector, process_lives

    try:
        settings = config.load(args.sluice_config).config.telemetry
    except config.ConfigError as error:
        print(f"sluice: the configuration cannot be used:\n{error}", file=sys.stderr)
        return 2
    folder = find_folder(args.run_dir)
    present = process_lives if args.gone_after is None else written_within(args.gone_after)
    collector = SnapshotCollector(folder, settings.detail, present=present)
    # Process 1 of a container ignores SIGTERM unless it asks for it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with _bound(args.host, args.port, routes(folder, collector)) as listening:
        host, port = listening.server_address[:2]
        where = f"[{host!s}]" if listening.address_family == socket.AF_INET6 else host
        print(f"sluice: metrics of {folder} at http://{where!s}:{port}/metrics", file=sys.stderr, flush=True)
        if problem := unreadable(folder):
            print(f"sluice: {problem}", file=sys.stderr, flush=True)
        listening.serve_forever()
    return 0


def _bound(host: str, port: int, answers: dict[str, Route]) -> Server:
    try:
        return server(host, port, answers)
    except OverflowError:
        raise Problem(f"port {port} does not exist; the highest is 65535") from None
    except OSError as error:
        remedy = "name another with --port" if error.errno == errno.EADDRINUSE else "check --host and --port"
        raise Problem(f"cannot listen on {host}, port {port}: {error.strerror}; {remedy}") from None


def _unknown(answers: dict[str, Route]) -> Answer:
    return Answer(404, "text/plain; charset=utf-8", f"here are {' and '.join(answers)}\n".encode())


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time above 0")
    return value
