"""promtool and Prometheus of Debian 12, and the newest that Debian has."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, need_program

NEWEST = ROOT / "build" / "prometheus-newest"
FETCH = ROOT / "tests" / "tools" / "prometheus-newest.sh"

Promtool = Callable[..., subprocess.CompletedProcess[str]]


def newest(program: str) -> str:
    """Return a program of the newest Prometheus; it is fetched where nothing may be skipped."""
    path = NEWEST / "usr" / "bin" / program
    if not path.exists():
        if os.environ.get("REQUIRE_SYSTEM_TOOLS") != "1":
            pytest.skip(f"no newest Prometheus here: {FETCH.relative_to(ROOT)} {NEWEST.relative_to(ROOT)}")
        done = subprocess.run([FETCH, NEWEST], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    return str(path)


@pytest.fixture(params=["installed", "newest"])
def promtool(request: pytest.FixtureRequest) -> Promtool:
    """Run promtool and return what it said."""
    program = need_program("promtool", "prometheus") if request.param == "installed" else newest("promtool")

    def run(*arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], input=text, capture_output=True, text=True, timeout=300, check=False
        )

    return run
