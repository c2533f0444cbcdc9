"""The generated dashboards and how to walk through them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

FOLDER = ROOT / "grafana/dashboards"
UIDS = (
    "sluice-overview", "sluice-layers", "sluice-attention", "sluice-quantization", "sluice-patches", "sluice-monitor",
    "sluice-fleet",
)  # fmt: skip

Board = dict[str, Any]
Panel = dict[str, Any]


def path(uid: str) -> Path:
    """Return where a dashboard is."""
    return FOLDER / f"{uid}.json"


def load(uid: str) -> Board:
    """Read a dashboard."""
    board: Board = json.loads(path(uid).read_text(encoding="utf-8"))
    return board


def with_rows(board: Board) -> Iterator[tuple[Panel | None, Panel]]:
    """Yield every panel that is not a row, with the collapsed row that it is in, if any."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from ((panel, inner) for inner in panel.get("panels", []))
        else:
            yield None, panel


def panels(board: Board) -> list[Panel]:
    """Return every panel that is not a row, those in collapsed rows too."""
    return [panel for _, panel in with_rows(board)]


def panel(board: Board, title: str) -> Panel:
    """Return the panel with a title, to be looked at or spoiled."""
    return next(panel for panel in panels(board) if panel["title"] == title)
