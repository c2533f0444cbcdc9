"""The programs that check the files in deploy/, which `deploy/tools.sh` fetches, and what they are run with."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
RULES = DEPLOY / "prometheus/rules/sluice.rules.yml"
DASHBOARDS = ROOT / "grafana/dashboards"

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sluice/deploy-tools"
FOLDER = Path(os.environ.get("DEPLOY_TOOLS") or _CACHE)


def missing(reason: str) -> None:
    """Skip the test, or fail it where nothing may be skipped."""
    if os.environ.get("REQUIRE_SYSTEM_TOOLS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def tool(name: str) -> str:
    """Return the path of a program."""
    path = shutil.which(name, path=f"{FOLDER / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        missing(f"{name} is not here: run deploy/tools.sh")
    return str(path)


def need_sources() -> None:
    """Go on only where the alert rules and the dashboards are."""
    if not RULES.is_file() or not any(DASHBOARDS.glob("*.json")):
        missing(f"without {RULES.relative_to(ROOT)} or {DASHBOARDS.relative_to(ROOT)} there is nothing to deploy")


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in the root of the repository and return how it ended, with what it printed."""
    return subprocess.run(
        [str(part) for part in command], cwd=options.pop("cwd", ROOT), capture_output=True, text=True, timeout=300,
        check=False, **options,
    )  # fmt: skip


def output(*command: str | Path, **options: Any) -> str:
    """Run a program that has to succeed, and return its standard output."""
    done = run(*command, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@functools.cache
def built(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return the objects of a kustomization."""
    return tuple(yaml.safe_load_all(output(tool("kustomize"), "build", folder)))


def one(objects: Any, kind: str, name: str) -> dict[str, Any]:
    """Return the object of that kind and name."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    assert len(found) == 1, [(o["kind"], o["metadata"]["name"]) for o in objects]
    return dict(found[0])
