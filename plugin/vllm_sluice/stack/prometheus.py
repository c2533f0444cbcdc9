"""Prometheus beside the server: with graphs only (the demo), or with the shipped rules (the stack)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from vllm_sluice.commands.problem import Problem
from vllm_sluice.stack.child import Child
from vllm_sluice.stack.loopback import HOST, free_port
from vllm_sluice.stack.service import Service, program

_PORT = 9090
_LIKE = "--deploy takes a folder like deploy/prometheus of Sluice's repository"
_LISTS = {"rule_files": (str, "- rules/*.yml"), "scrape_configs": (dict, "- job_name: vllm")}
"""Keys that the stack changes: what they list, and an entry to suggest."""
_SCRAPE_INTERVAL = "1m"
"""Prometheus's default."""


def start(settings: dict[str, Any], scratch: Path) -> Service | None:
    """Start Prometheus with its data in `scratch`; return None if it is not installed."""
    path = program("prometheus")
    if path is None:
        return None
    port = free_port(_PORT, "Prometheus")
    file = scratch / "prometheus.yml"
    file.write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")  # JSON is YAML but for dates
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


def read(deploy: Path) -> dict[str, Any]:
    """Return the settings in `prometheus.yml` of a folder, with rule files that can be named from anywhere.

    Raises
    ------
    Problem
        If it cannot be read, lacks what the stack changes, or names no rule file that exists.
    """
    file = deploy / "prometheus.yml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{deploy} has no prometheus.yml; {_LIKE}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Problem(f"{file} cannot be read: {error}; mend it, or name another folder with --deploy") from None
    if not isinstance(settings, dict):
        raise Problem(f"{file} has no settings of Prometheus; {_LIKE}")
    for key, (kind, entry) in _LISTS.items():
        found = settings.get(key)
        if not (isinstance(found, list) and found and all(isinstance(one, kind) for one in found)):
            raise Problem(f"{file} has {found!r} as {key}; it takes a list, such as\n{key}:\n  {entry}")
    if not isinstance(settings.setdefault("global", {}), dict):
        raise Problem(f"{file} has {settings['global']!r} as global; it takes keys, or leave it out")
    rules = [deploy.resolve() / name for name in settings["rule_files"]]
    if not any(any(path.parent.glob(path.name)) for path in rules):  # Prometheus takes patterns in the name only
        raise Problem(f"rule_files of {file} names no file that exists: {', '.join(map(str, rules))}; mend it")
    return settings | {"rule_files": [str(path) for path in rules]}


def scrape_interval(settings: dict[str, Any]) -> str:
    """Return how often these settings scrape."""
    return str(settings["global"].get("scrape_interval") or _SCRAPE_INTERVAL)


def aimed(settings: dict[str, Any], target: str, alertmanager: str | None) -> dict[str, Any]:
    """Return settings for this server.

    Parameters
    ----------
    settings
        As `read` returns them.
    target, alertmanager
        `host:port` of the server and of Alertmanager, if there is one.
    """
    jobs = [job | {"static_configs": [{"targets": [target]}]} for job in settings["scrape_configs"]]
    found = {key: value for key, value in settings.items() if key != "alerting"} | {"scrape_configs": jobs}
    if alertmanager is not None:
        found["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return found
