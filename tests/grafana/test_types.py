"""Dashboards against the types of @grafana/schema, four versions; the types are shown to bite."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.grafana import boards
from tests.grafana.boards import Board, panel
from tests.grafana.engine import HERE, VERSIONS, node


def _check(version: str, files: Sequence[Path]) -> list[dict[str, str]]:
    command = [node(), "types.cjs", version, *map(str, files)]
    made = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False, timeout=180)
    assert made.returncode == 0, made.stderr
    found: list[dict[str, str]] = json.loads(made.stdout)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_boards_are_what_the_schema_says(version: str) -> None:
    assert _check(version, [boards.path(uid) for uid in boards.UIDS]) == []


# ------------------------------------------------------------------------------------------------- deliberate faults
Spoil = Callable[[Board], Any]
_HEATMAP, _TILE, _CURVES, _LANES = "Sink mass by layer", "Mean sink mass", "Sink mass over layers", "Patches over time"


def _options(title: str, **changes: Any) -> Spoil:
    return lambda board: panel(board, title)["options"].update(changes)


FAULTS: dict[str, tuple[str, Spoil]] = {
    "misspelt option": ("sluice-attention", _options(_TILE, colourMode="value")),
    "value that an option has not": ("sluice-attention", _options(_TILE, colorMode="values")),
    "option of another panel": ("sluice-attention", _options(_HEATMAP, reduceOptions={"calcs": ["last"]})),
    "misspelt nested option": ("sluice-attention", _options(_CURVES, legend={"showLegend": True, "place": "bottom"})),
    "misspelt field option": (
        "sluice-attention",
        lambda b: panel(b, _CURVES)["fieldConfig"]["defaults"]["custom"].update(lineWidht=1),
    ),
    "misspelt option of an override": (
        "sluice-layers",
        lambda b: panel(b, "Each layer now")["fieldConfig"]["overrides"][0]["properties"][1].update(id="custom.least"),
    ),
    "misspelt default": ("sluice-attention", lambda b: panel(b, _TILE)["fieldConfig"]["defaults"].update(units="s")),
    "old panel option": ("sluice-patches", lambda b: panel(b, _LANES).update(nullPointMode="connected")),
    "mapping without a type": (
        "sluice-patches",
        lambda b: panel(b, _LANES)["fieldConfig"]["defaults"]["mappings"][0].update(type="values"),
    ),
    "variable with leftovers": ("sluice-attention", lambda b: b["templating"]["list"][1].update(auto_count=30)),
    "link with leftovers": ("sluice-attention", lambda b: b["links"][0].update(place="inControlsMenu")),
    "tooltip as text": ("sluice-attention", lambda b: b.update(graphTooltip="shared")),
}


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of the faults that each version caught."""
    folder = tmp_path_factory.mktemp("spoiled")
    files: dict[str, str] = {}
    for place, (name, (uid, spoil)) in enumerate(FAULTS.items()):
        board = boards.load(uid)
        spoil(board)
        file = folder / f"{place}.json"
        file.write_text(json.dumps(board), encoding="utf-8")
        files[str(file)] = name
    return {
        version: {files[fault["file"]] for fault in _check(version, [Path(file) for file in files])}
        for version in (VERSIONS[0], VERSIONS[-1])
    }


@pytest.mark.parametrize("name", FAULTS)
def test_types_catch(name: str, caught: dict[str, set[str]]) -> None:
    assert [version for version, names in caught.items() if name in names]
