"""Grafana beside Prometheus, with the shipped boards provisioned from files.

Written from Grafana's documentation; the tests start a stand-in and look at what it was given.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm_sluice.stack.child import Child
from vllm_sluice.stack.loopback import HOST, free_port
from vllm_sluice.stack.service import Service, program

_PORT = 3000
_HOME = Path("/usr/share/grafana")
"""Where the packages put Grafana's own files; an archive has them beside the program."""


def installed() -> str | None:
    """Return the path of Grafana's program, or None."""
    return program("grafana-server", "grafana")


def start(dashboards: Path, prometheus: str, scrape_interval: str, scratch: Path) -> Service | None:
    """Start Grafana with the boards of a folder; return None if it is not installed.

    Parameters
    ----------
    dashboards
        Folder with one JSON file a board.
    prometheus
        URL of the data source.
    scrape_interval
        What Prometheus uses; `$__rate_interval` follows from it.
    scratch
        Folder for data, logs and provisioning.
    """
    path = installed()
    if path is None:
        return None
    port = free_port(_PORT, "Grafana")
    folder = scratch / "grafana"
    for name, settings in provisioning(dashboards, prometheus, scrape_interval).items():
        file = folder / "provisioning" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    home = _HOME if _HOME.is_dir() else Path(path).resolve().parent.parent
    command = [path, *(["server"] if Path(path).name == "grafana" else []), f"--homepath={home}"]
    child = Child("grafana", command, scratch / "grafana.log", os.environ | environment(folder, port))
    return Service(child, f"http://{HOST}:{port}", "/api/health")


def provisioning(dashboards: Path, prometheus: str, scrape_interval: str) -> dict[str, dict[str, Any]]:
    """Return the provisioning files by their path below the provisioning folder."""
    source = {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus,
        "isDefault": True,
        "jsonData": {"timeInterval": scrape_interval},
    }
    provider = {"name": "sluice", "folder": "Sluice", "type": "file", "options": {"path": str(dashboards.resolve())}}
    return {
        "datasources/prometheus.yaml": {"apiVersion": 1, "datasources": [source]},
        "dashboards/sluice.yaml": {"apiVersion": 1, "providers": [provider]},
    }


def environment(folder: Path, port: int) -> dict[str, str]:
    """Return Grafana's settings: everything in one folder, on the loopback interface, to be read without a login."""
    return {
        "GF_PATHS_DATA": str(folder / "data"),
        "GF_PATHS_LOGS": str(folder / "logs"),
        "GF_PATHS_PLUGINS": str(folder / "plugins"),
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
    }
