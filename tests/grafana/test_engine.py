"""Every query, variable and annotation on a real Prometheus, the answers through four versions of Grafana's code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.grafana import boards, engine
from tests.grafana.boards import Board, panel
from tests.grafana.engine import VERSIONS, Report
from tests.grafana.stretches import Stretch
from tests.monitoring import history
from vllm_sluice.telemetry.catalogue import BY_NAME as METRICS

Reports = dict[str, dict[str, Report]]


def _reports(stretch: Stretch, scratch: Path) -> Reports:
    found = engine.run([boards.path(uid) for uid in boards.UIDS], stretch, scratch)
    return {file.stem: by_version for file, by_version in found.items()}


@pytest.fixture(scope="module")
def on_generated(generated: Stretch, scratch: Path) -> Reports:
    return _reports(generated, scratch)


@pytest.fixture(scope="module")
def on_recorded(recorded: Stretch, scratch: Path) -> Reports:
    return _reports(recorded, scratch)


@pytest.fixture(scope="module")
def on_bare(bare: Stretch, scratch: Path) -> Reports:
    return _reports(bare, scratch)


# --------------------------------------------------------------------------------------------- the generated history
def test_history_has_every_metric() -> None:
    assert history.names() == METRICS.keys()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("uid", boards.UIDS)
def test_shows_all_of_the_generated_history(uid: str, version: str, on_generated: Reports) -> None:
    report = on_generated[uid][version]
    assert report.faults == []
    assert report.empty == set()
    assert report.panels.keys() == {panel["title"] for panel in boards.panels(boards.load(uid))}


_RED, _ORANGE, _GREEN = "#F2495C", "#FF9830", "#73BF69"
TILES = {
    # Board, panel: what the known faults must look like, text and colour, at the end of the history.
    ("sluice-overview", "Alerts firing"): ("3", _RED),
    ("sluice-overview", "Non-finite values"): ("189", _RED),
    ("sluice-overview", "Serving range"): ("93.6%", _RED),
    ("sluice-overview", "Ranks behind"): ("1", _RED),
    ("sluice-overview", "Oldest snapshot"): ("6.0 mins", _RED),
    ("sluice-overview", "Probe errors"): ("18", _ORANGE),
    ("sluice-overview", "Probe cost"): ("14.5%", _ORANGE),
    ("sluice-patches", "Generations apart"): ("2", _RED),
    ("sluice-patches", "Engines paused"): ("1", _RED),
    ("sluice-patches", "Settings waiting for a restart"): ("2", _ORANGE),
    ("sluice-monitor", "Configuration file"): ("cannot be used", _RED),
    ("sluice-quantization", "Serving dtype headroom"): ("1.07 ×", _ORANGE),
    ("sluice-quantization", "INT8 static headroom"): ("0.01 ×", _RED),
    ("sluice-quantization", "Clipped by static scales"): ("0.00108%", _ORANGE),
    ("sluice-fleet", "With non-finite values"): ("1", _RED),
    ("sluice-fleet", "With old snapshots"): ("1", _ORANGE),
}


@pytest.mark.parametrize(("uid", "title"), TILES)
def test_tile_shows_the_known_fault(uid: str, title: str, on_generated: Reports) -> None:
    for version in VERSIONS:
        (shown,) = on_generated[uid][version].panels[title]["shown"]
        assert (shown["last"]["text"], shown["last"]["color"]) == TILES[uid, title], version


def test_annotations_are_the_switches_to_the_millisecond(on_generated: Reports) -> None:
    wanted = {f"gate changed@{(history.START + 60 * minute + 0.25) * 1000:.0f}" for minute in history.SWITCHES}
    for uid in boards.UIDS:
        assert set(on_generated[uid]["13.2"].events["Patch changes"]) == wanted


def test_before_and_after_are_those_of_the_switch(on_generated: Reports) -> None:
    table = on_generated["sluice-patches"]["13.2"].panels["Before and after each change"]
    found = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    steady = [row for row in found if row["engine"] == history.STEADY.engine]
    assert [row["to"] for row in steady] == ["on", "off", "on", "off"]  # the newest first
    for row in steady:
        on, off = (float(row[f"sinks {when}"].rstrip("%")) for when in _ON_OFF[row["to"]])
        assert 6 < on < 7, row
        assert 37 < off < 43, row  # the history waves a little


_ON_OFF = {"on": ("after", "before"), "off": ("before", "after")}


def test_lanes_show_the_faults(on_generated: Reports) -> None:
    def states(uid: str, title: str, lane: str) -> list[str]:
        shown = on_generated[uid]["13.2"].panels[title]["shown"]
        return next(one["states"] for one in shown if one["name"] == lane)  # type: ignore[no-any-return]

    assert states("sluice-patches", "Patches over time", "gate 10.0.0.1:8000 0") == ["on", "off"]
    assert states("sluice-patches", "Ranks", "10.0.0.1:8000 1 pp0-tp1") == ["applied", "behind"]
    assert states("sluice-patches", "Ranks", "10.0.0.1:8000 0 pp0-tp1") == ["applied"]
    lanes = "Layers against the baseline"
    assert "over twice or under half" in states("sluice-layers", lanes, f"{history.DRIFTING_LAYER:03d}")
    assert "not finite" in states("sluice-layers", lanes, f"{history.BROKEN_LAYER:03d}")
    assert states("sluice-layers", lanes, "000") == ["as recorded"]


def test_worst_engine_is_first(on_generated: Reports) -> None:
    panels = on_generated["sluice-fleet"]["13.2"].panels
    for title in ("Largest over median activation", "Snapshot age", "Probe cost"):
        assert panels[title]["rows"][0][:2] == [history.DRIFTING.model_name, history.DRIFTING.instance]


# ---------------------------------------------------------------------------------------------- the recorded stretch
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("uid", boards.UIDS)
def test_shows_all_of_the_recorded_hour(uid: str, version: str, on_recorded: Reports) -> None:
    report = on_recorded[uid][version]
    assert report.faults == []
    assert report.empty == ({"Alerts firing, A"} if uid == "sluice-overview" else set())  # at the end only `info` fires


def test_recorded_events_show(on_recorded: Reports) -> None:
    patches = on_recorded["sluice-patches"]["13.2"]
    assert len(patches.events["Patch changes"]) == 6
    table = patches.panels["Before and after each change"]
    assert {row[table["columns"].index("to")] for row in table["rows"]} == {"on", "off"}
    lanes = on_recorded["sluice-overview"]["13.2"].panels["Alerts over time"]["shown"]
    assert {lane["name"]: lane["states"] for lane in lanes} == {
        "SluiceConfigFileBroken": ["warning"], "SluiceProbeCostHigh": ["info"], "SluiceRestartNeeded": ["info"],
    }  # fmt: skip


EMPTY_WHEN_BARE = {
    "sluice-overview": {"Alerts firing, A", "Alerts over time, A"},
    "sluice-layers": {
        "Largest activation, times the baseline, A", "Largest over median, times the baseline, A",
        "Sink mass, change from the baseline, A", "Layers against the baseline, A",
    },
    "sluice-attention": set[str](),
    "sluice-patches": {
        "Log-probability in trials, A", "Tokens and non-finite rows in trials, A",
        "Tokens and non-finite rows in trials, B",
    },
    "sluice-monitor": {"Baseline file, A"},
    "sluice-fleet": set[str](),
}  # fmt: skip
"""What a server without baseline, quantization probe, guard and rules has nothing to say about."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("uid", EMPTY_WHEN_BARE)
def test_shows_the_rest_of_a_bare_server(uid: str, version: str, on_bare: Reports) -> None:
    report = on_bare[uid][version]
    assert report.faults == []
    assert report.empty == EMPTY_WHEN_BARE[uid]


def test_quantization_board_is_empty_without_the_probe(on_bare: Reports) -> None:
    board = boards.load("sluice-quantization")
    report = on_bare["sluice-quantization"]["13.2"]
    queries = {f"{panel['title']}, {target['refId']}" for panel in boards.panels(board) for target in panel["targets"]}
    assert report.empty == queries | {f"variable {name}" for name in ("site", "format", "scale")}


# ------------------------------------------------------------------------------------------------- deliberate faults
Spoil = Callable[[Board], Any]
_OVERVIEW, _LAYERS, _PATCHES = "sluice-overview", "sluice-layers", "sluice-patches"
_HEATMAP, _TABLE = "Sink mass by layer", "Each layer now"


def _expr(title: str, old: str, new: str) -> Spoil:
    def spoil(board: Board) -> None:
        target = panel(board, title)["targets"][0]
        assert old in target["expr"]
        target["expr"] = target["expr"].replace(old, new)

    return spoil


FAULTS: dict[str, tuple[str, Spoil, str]] = {
    # Board, what is spoiled, and what must be said.
    "misspelt metric": (_LAYERS, _expr(_HEATMAP, "sink_mass", "sink_mas"), f"{_HEATMAP}, A"),
    "a label that no series has": (_LAYERS, _expr(_HEATMAP, "engine=~", "engines=~"), f"{_HEATMAP}, A"),
    "broken PromQL": (_LAYERS, _expr(_HEATMAP, "avg by (layer) (", "avg by (layer) "), "parse error"),
    "PromQL that 2.42 does not know": (_LAYERS, _expr(_HEATMAP, "avg by (layer)", "mad_over_time"), "parse error"),
    "unknown variable": (_LAYERS, _expr(_HEATMAP, "$layer", "$layers"), "unknown variable"),
    "join of different labels": (
        _LAYERS, _expr("Largest activation, times the baseline", "engine, layer)", "engine)"),
        "Largest activation, times the baseline"),
    "rows that are no layers": (
        _LAYERS, lambda b: panel(b, _HEATMAP)["targets"][0].update(legendFormat="L{{layer}}"), "no layers"),
    "two rows for a layer": (_LAYERS, _expr(_HEATMAP, "by (layer)", "by (layer, instance)"), "more than one row"),
    "legend that says nothing": (
        _OVERVIEW, lambda b: panel(b, "Sink mass")["targets"][0].update(legendFormat="Value"), "says nothing"),
    "unknown unit": (
        _OVERVIEW, lambda b: panel(b, "Sink mass")["fieldConfig"]["defaults"].update(unit="percents"), "unknown unit"),
    "unknown colour": (
        _OVERVIEW, lambda b: panel(b, "Ranks behind")["fieldConfig"]["defaults"]["thresholds"]["steps"][0].update(
            color="redd"), "no colour"),
    "override that matches nothing": (
        _LAYERS, lambda b: panel(b, _TABLE)["fieldConfig"]["overrides"][1]["matcher"].update(options="max"),
        "override matches no field"),
    "unknown transformation": (
        _LAYERS, lambda b: panel(b, _TABLE)["transformations"][0].update(id="merges"), "unknown transformation"),
    "rows that do not merge": (
        _LAYERS, _expr(_TABLE, "max by (layer)", "max by (layer, __name__)"), "columns"),
    "column that is renamed from nothing": (
        _LAYERS, lambda b: panel(b, _TABLE)["transformations"][1]["options"]["renameByName"].update({"Value #Z": "z"}),
        "organize names no field"),
    "sorted by nothing": (
        "sluice-fleet", lambda b: panel(b, "Snapshot age")["transformations"][2]["options"]["sort"][0].update(
            field="age"), "sorted by no field"),
    "state without a name": (
        _PATCHES, lambda b: panel(b, "Patches over time")["fieldConfig"]["defaults"]["mappings"][0]["options"].pop("0"),
        "states without a name"),
    "annotation that never happens": (
        _PATCHES, lambda b: b["annotations"]["list"][1].update(expr="sluice_patch_last_change * 1000"),
        "annotation Patch changes"),
    "variable without values": (
        _PATCHES, lambda b: b["templating"]["list"][1]["query"].update(query="label_values(sluice_infos, job)"),
        "variable job"),
}  # fmt: skip


@pytest.fixture(scope="module")
def on_spoiled(generated: Stretch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    folder = tmp_path_factory.mktemp("spoiled")
    files: dict[Path, str] = {}
    for place, (name, (uid, spoil, _)) in enumerate(FAULTS.items()):
        board = boards.load(uid)
        spoil(board)
        file = folder / f"{place}.json"
        file.write_text(json.dumps(board), encoding="utf-8")
        files[file] = name
    found = engine.run(list(files), generated, folder, ["13.2"])
    return {files[file]: by_version["13.2"] for file, by_version in found.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_engine_catches(name: str, on_spoiled: dict[str, Report]) -> None:
    report = on_spoiled[name]
    said = [*report.faults, *report.empty]
    assert [text for text in said if FAULTS[name][2] in text], said
