"""Runs `engine.cjs`: dashboards through Grafana's own data code, on a real Prometheus."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import need_program
from tests.grafana.stretches import Stretch

HERE = Path(__file__).resolve().parent
VERSIONS = ("10.4", "11.6", "12.4", "13.2")
_INSTALL_SECONDS = 600


@dataclass(frozen=True)
class Report:
    """What the engine found on one board with one version of Grafana's libraries.

    Attributes
    ----------
    faults
        `where: what`, each.
    empty
        Panels' queries, variables and annotations that found nothing.
    panels
        What is displayed, by title.
    events
        Annotations by name, as `title@milliseconds`.
    """

    faults: list[str]
    empty: set[str]
    panels: dict[str, Any] = field(repr=False)
    events: dict[str, list[str]]


def node() -> str:
    """Return node, with the libraries that `package-lock.json` names installed beside this file."""
    program = need_program("node", "nodejs npm")
    npm = need_program("npm", "npm")
    installed, lock = HERE / "node_modules/.package-lock.json", HERE / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        made = subprocess.run(
            [npm, "ci", "--ignore-scripts"], cwd=HERE, capture_output=True, text=True, check=False,
            timeout=_INSTALL_SECONDS,
        )  # fmt: skip
        assert made.returncode == 0, f"npm ci in tests/grafana: {made.stderr[-2000:]}"
        installed.touch()
    return program


def run(
    files: Sequence[Path], stretch: Stretch, scratch: Path, versions: Sequence[str] = VERSIONS
) -> dict[Path, dict[str, Report]]:
    """Run dashboards over a history; return reports by file and version."""
    job, report = scratch / "job.json", scratch / "report.json"
    job.write_text(
        json.dumps(
            {
                "url": stretch.prometheus.url,
                "from": stretch.start,
                "to": stretch.end,
                "scrape": stretch.scrape,
                "versions": list(versions),
                "boards": [str(file) for file in files],
                "report": str(report),
            }
        ),
        encoding="utf-8",
    )
    made = subprocess.run(
        [node(), "engine.cjs", str(job)], cwd=HERE, capture_output=True, text=True, check=False, timeout=300
    )
    assert made.returncode == 0, made.stderr[-4000:]
    return {
        Path(file): {
            version: Report(
                [f"{fault['where']}: {fault['what']}" for fault in one["faults"]],
                set(one["empty"]),
                one["panels"],
                one["events"],
            )
            for version, one in by_version.items()
        }
        for file, by_version in json.loads(report.read_text(encoding="utf-8")).items()
    }
