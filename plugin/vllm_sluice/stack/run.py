"""`sluice stack`: a server with Prometheus, its rules, Alertmanager and Grafana, without Docker; Ctrl-C ends it all."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sluice.commands.problem import Problem
from vllm_sluice.stack import DEFAULT_MODEL

if TYPE_CHECKING:
    from vllm_sluice.stack.console import Stop
    from vllm_sluice.stack.service import Service

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_CHECKOUT = Path(__file__).resolve().parents[3]
_DEPLOY = Path("deploy", "prometheus")
_DASHBOARDS = Path("grafana", "dashboards")
_PERIOD = 0.5
_ALERTS_PERIOD = 5.0


def add_command(subparsers: Subparsers) -> None:
    """Add `stack` to the command line."""
    parser = subparsers.add_parser(
        "stack",
        help="serve a model beside Prometheus with alerts, Alertmanager and Grafana until Ctrl-C",
        usage="sluice stack [MODEL] [options] [-- options of vllm serve]",
        description="Serve a model beside Prometheus with the shipped rules, Alertmanager and Grafana; the last two "
        "where they are installed. Everything listens on the loopback interface, and Ctrl-C stops everything. What "
        "Prometheus collected is gone afterwards.",
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL",
                        help="folder or Hugging Face name (default: %(default)s)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="port of the server (default: %(default)s)")
    parser.add_argument("--deploy", type=Path, metavar="FOLDER",
                        help="folder with prometheus.yml, alertmanager.yml and rules/ "
                        f"(default: {_DEPLOY} of the checkout)")  # fmt: skip
    parser.add_argument("--dashboards", type=Path, metavar="FOLDER",
                        help=f"folder with Grafana's boards (default: {_DASHBOARDS} of the checkout)")  # fmt: skip
    parser.set_defaults(run=run, vllm=[])


def run(args: argparse.Namespace) -> int:
    """Run the stack until it is stopped; return 0.

    Raises
    ------
    Problem
        If it cannot start, or a process of it ended by itself.
    """
    from vllm_sluice.stack import alertmanager, grafana, prometheus, server
    from vllm_sluice.stack.console import Stop, Stopped
    from vllm_sluice.stack.service import program

    deploy = folder(args.deploy, _DEPLOY, "rules/*.yml", "--deploy")
    settings = prometheus.read(deploy)
    alertmanager.check(deploy)
    wanted = args.dashboards or grafana.installed()
    dashboards = folder(args.dashboards, _DASHBOARDS, "*.json", "--dashboards") if wanted else None
    if program("prometheus") is None:
        raise Problem("Prometheus is not installed; on Debian: apt-get install prometheus prometheus-alertmanager")
    server.check(args.model, args.port)
    scratch = Path(tempfile.mkdtemp(prefix="sluice-stack-"))
    with Stop() as stop:
        with suppress(Stopped):
            _stack(args, deploy, settings, dashboards, scratch, stop)
        # After a Problem the folder stays: it holds the log that says more.
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def folder(named: Path | None, default: Path, pattern: str, option: str) -> Path:
    """Return a folder of shipped files: the named one, or the checkout's.

    Raises
    ------
    Problem
        If it has no such files: an installed package does not carry them.
    """
    found = named or _CHECKOUT / default
    if any(found.glob(pattern)):
        return found
    if named is None:
        raise Problem(f"this is no checkout of Sluice, so {default} must be named: {option} FOLDER")
    raise Problem(f"{found} has no {pattern}; {option} takes a folder like {default} of Sluice's repository")


def _stack(
    args: argparse.Namespace, deploy: Path, settings: dict[str, Any], dashboards: Path | None, scratch: Path, stop: Stop
) -> None:
    from vllm_sluice.stack import alertmanager, grafana, prometheus, server
    from vllm_sluice.stack.console import StatusLine
    from vllm_sluice.stack.loopback import HOST
    from vllm_sluice.stack.service import check_all_alive, stop_child

    base = f"http://{HOST}:{args.port}"
    with ExitStack() as cleanup:
        line = cleanup.enter_context(StatusLine())
        children = []
        services: dict[str, Service] = {}

        def add(name: str, service: Service | None) -> Service | None:
            if service is not None:
                services[name] = service
                children.append(service.child)
                cleanup.callback(stop_child, service.child, line)
                service.wait(line, stop)
            return service

        model = server.start(args.model, args.port, args.vllm, scratch)
        children.append(model)
        cleanup.callback(stop_child, model, line)
        manager = add("Alertmanager", alertmanager.start(deploy, scratch))
        address = manager.url.removeprefix("http://") if manager else None
        aimed = prometheus.aimed(settings, f"{HOST}:{args.port}", address)
        monitor = add("Prometheus", prometheus.start(aimed, scratch))
        if monitor is None:
            raise Problem("Prometheus is gone; it was installed a moment ago")
        if dashboards is not None:
            interval = prometheus.scrape_interval(settings)
            add("Grafana", grafana.start(dashboards, monitor.url, interval, scratch))
        server.wait_until_healthy(model, base, line, stop)
        line.clear()
        print(_welcome(base, server.served_model(base)[0], services, scratch), flush=True)
        began = time.monotonic()
        shown, looked = "", -_ALERTS_PERIOD
        while True:
            check_all_alive(children)
            if time.monotonic() - looked >= _ALERTS_PERIOD:
                shown, looked = alerts(monitor), time.monotonic()
            line.show(f"running for {time.monotonic() - began:.0f} s, alerts: {shown}")
            stop.sleep(_PERIOD)


def alerts(prometheus: Service) -> str:
    """Return the alerts that fire, in words."""
    from vllm_sluice.stack.loopback import get

    answer = get(f"{prometheus.url}/api/v1/alerts")
    if answer is None:
        return "unknown, Prometheus does not answer"
    found = json.loads(answer)["data"]["alerts"]
    return ", ".join(sorted({a["labels"]["alertname"] for a in found if a["state"] == "firing"})) or "none"


def _welcome(base: str, model: str, services: dict[str, Service], scratch: Path) -> str:
    monitor = services["Prometheus"].url
    rows = [
        ("API", f"{base}/v1", f"OpenAI-compatible, model {model}"),
        ("live page", f"{base}/plugins/sluice/", "layers over time, attention sinks, gates, patch state"),
        ("Prometheus", f"{monitor}/alerts", f"rules and alerts; builds without pages: {monitor}/api/v1/rules"),
    ]
    if "Alertmanager" in services:
        rows.append(("Alertmanager", services["Alertmanager"].url, "who would be told, and what is silenced"))
    if "Grafana" in services:
        rows.append(("Grafana", f"{services['Grafana'].url}/d/sluice-overview", "the boards, in the folder Sluice"))
    lines = [f"{model} is being served and watched:", ""]
    lines += [f"  {name:<13} {url}\n  {'':<13} {text}" for name, url, text in rows]
    if "Alertmanager" not in services:
        lines += ["", "  Alertmanager is not installed, so nobody is told; apt-get install prometheus-alertmanager."]
    if "Grafana" not in services:
        lines += ["", "  Grafana is not installed (no grafana-server on PATH); the boards are in grafana/dashboards."]
    lines += ["", f"Ctrl-C stops everything. Logs: {scratch}", ""]
    return "\n".join(lines)
