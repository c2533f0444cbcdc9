"""Alertmanager beside Prometheus, with the shipped routes."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_sluice.commands.problem import Problem
from vllm_sluice.stack.child import Child
from vllm_sluice.stack.loopback import HOST, free_port
from vllm_sluice.stack.service import Service, program

_PORT = 9093
_NAMES = ("prometheus-alertmanager", "alertmanager")  # Debian's name, and its own


def check(deploy: Path) -> None:
    """Raise `Problem` if Alertmanager is installed, and the folder has no settings for it."""
    path = program(*_NAMES)
    if path is not None and not (deploy / "alertmanager.yml").is_file():
        raise Problem(
            f"{deploy} has no alertmanager.yml, and Alertmanager is installed ({path}); --deploy takes a folder like "
            "deploy/prometheus of Sluice's repository"
        )


def start(deploy: Path, scratch: Path) -> Service | None:
    """Start Alertmanager with `alertmanager.yml` of the folder; return None if it is not installed."""
    path = program(*_NAMES)
    if path is None:
        return None
    port = free_port(_PORT, "Alertmanager")
    command = [
        path,
        f"--config.file={deploy / 'alertmanager.yml'}",
        f"--storage.path={scratch / 'alertmanager'}",
        f"--web.listen-address={HOST}:{port}",
        "--cluster.listen-address=",  # one alone has nobody to gossip with
        "--log.level=warn",
    ]
    child = Child("alertmanager", command, scratch / "alertmanager.log", os.environ)
    return Service(child, f"http://{HOST}:{port}", "/-/ready")
