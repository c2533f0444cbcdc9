"""Shared by all tests: where things are, and what may be skipped."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"

for name in [n for n in os.environ if n.startswith("SLUICE_")]:
    del os.environ[name]  # settings of the caller's shell must not change a test
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores Ctrl-C for what it starts in the background


def need_program(name: str, package: str) -> str:
    """Return the path of a program; skip the test, or fail it where nothing may be skipped, if it is missing."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed: apt-get install {package}"
        if os.environ.get("REQUIRE_SYSTEM_TOOLS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def passages() -> list[str]:
    """Return the book passages that the demo sends."""
    text = (ROOT / "plugin/vllm_sluice/demo/passages.txt").read_text(encoding="utf-8")
    return [part.strip() for part in text.split("\n\n") if len(part.strip()) > 200]


@pytest.fixture(scope="session")
def twin_vanilla() -> Path:
    return MODELS / "twin-vanilla"


@pytest.fixture(scope="session")
def twin_gated() -> Path:
    return MODELS / "twin-gated"
