"""Prometheus beside the server: with graphs only (the demo), or with the shipped rules (the stack)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from vllm_sluice.stack.child import Child
from vllm_sluice.stack.loopback import HOST, free_port
from vllm_sluice.stack.service import Service, program

_PORT = 9090


def start(settings: dict[str, Any], scratch: Path) -> Service | None:
    """Start Prometheus with its data in `scratch`; return None if it is not installed."""
    path = program("prometheus")
    if path is None:
        return None
    port = free_port(_PORT, "Prometheus")
    file = scratch / "prometheus.yml"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    command = [
        path,
        f"--config.file={file}",
        f"--storage.tsdb.path={scratch / 'prometheus'}",
        f"--web.listen-address={HOST}:{port}",
        "--log.level=warn",
    ]
    child = Child("prometheus", command, scratch / "prometheus.log", os.environ)
    return Service(child, f"http://{HOST}:{port}", "/-/ready")


def scrape_only(target: str) -> dict[str, Any]:
    """Return settings that scrape one server every 2 s."""
    return {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "sluice", "static_configs": [{"targets": [target]}]}],
    }


def with_rules(deploy: Path, target: str, alertmanager: str | None) -> dict[str, Any]:
    """Return the shipped settings, their rules included, for this server.

    Parameters
    ----------
    deploy
        Folder with `prometheus.yml` and `rules/`.
    target, alertmanager
        `host:port` of the server and of Alertmanager, if there is one.
    """
    settings: dict[str, Any] = yaml.safe_load((deploy / "prometheus.yml").read_text(encoding="utf-8"))
    settings["rule_files"] = [str(deploy.resolve() / name) for name in settings["rule_files"]]
    for job in settings["scrape_configs"]:
        job["static_configs"] = [{"targets": [target]}]
    settings.pop("alerting", None)
    if alertmanager is not None:
        settings["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return settings
