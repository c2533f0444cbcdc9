"""The dashboards keep the rules; each rule is shown to bite on a dashboard that was spoiled on purpose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import ROOT, need_program
from tests.grafana import boards, lint
from tests.grafana.boards import Board, panel

RUNBOOKS = "https://github.com/vllm-sluice/sluice/blob/main/deploy/prometheus/runbooks"
_OVERVIEW, _LAYERS, _ATTENTION = "sluice-overview", "sluice-layers", "sluice-attention"


def test_files_are_what_the_generator_makes() -> None:
    command = [sys.executable, str(ROOT / "grafana/generate.py"), "--check"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


def test_check_notices_a_file_that_was_edited(tmp_path: Any) -> None:
    copy = tmp_path / "grafana"
    subprocess.run(["cp", "-r", str(ROOT / "grafana"), str(copy)], check=True)
    edited = copy / f"dashboards/{_LAYERS}.json"
    edited.write_text(edited.read_text(encoding="utf-8").replace("Layers now", "Layers today"), encoding="utf-8")
    (copy / "dashboards/left-over.json").write_text("{}", encoding="utf-8")
    command = [sys.executable, str(copy / "generate.py"), "--check"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 1
    assert f"{_LAYERS}.json" in made.stderr
    assert "left-over.json" in made.stderr


@pytest.mark.parametrize("uid", boards.UIDS)
def test_keeps_the_rules(uid: str) -> None:
    assert lint.faults(boards.load(uid)) == []


@pytest.mark.parametrize("uid", boards.UIDS)
def test_fits_in_a_config_map(uid: str) -> None:
    assert boards.path(uid).stat().st_size < 200_000


def test_smoke_script_is_clean() -> None:
    shellcheck = need_program("shellcheck", "shellcheck")
    made = subprocess.run([shellcheck, str(ROOT / "grafana/smoke.sh")], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout


def test_uids_are_the_files() -> None:
    assert {path.stem for path in boards.FOLDER.glob("*.json")} == set(boards.UIDS)


def test_every_alert_has_a_panel_and_every_panel_its_runbook() -> None:
    everything = [panel for uid in boards.UIDS for panel in boards.panels(boards.load(uid))]
    linked = {link["title"].removeprefix("Runbook: Sluice") for panel in everything for link in panel.get("links", [])}
    assert linked == lint.ALERTS
    folder = ROOT / "deploy/prometheus/runbooks"
    if folder.exists():
        assert {f"Sluice{name}.md" for name in linked} <= {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------- deliberate faults
Spoil = Callable[[Board], Any]
_TILE = "Serving range"


def _expr(title: str, old: str, new: str) -> Spoil:
    def spoil(board: Board) -> None:
        target = panel(board, title)["targets"][0]
        assert old in target["expr"]
        target["expr"] = target["expr"].replace(old, new)

    return spoil


def _drop(title: str, *path: str) -> Spoil:
    def spoil(board: Board) -> None:
        inner: dict[str, Any] = panel(board, title)
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return spoil


def _set(title: str, value: Any, *path: str) -> Spoil:
    def spoil(board: Board) -> None:
        inner: dict[str, Any] = panel(board, title)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return spoil


def _move_to_open_row(title: str) -> Spoil:
    def spoil(board: Board) -> None:
        row = next(row for row, inner in boards.with_rows(board) if row and inner["title"] == title)
        row["collapsed"] = False

    return spoil


def _job(board: Board) -> dict[str, Any]:
    variable: dict[str, Any] = board["templating"]["list"][1]
    return variable


def _overrides(board: Board, title: str) -> list[dict[str, Any]]:
    overrides: list[dict[str, Any]] = panel(board, title)["fieldConfig"]["overrides"]
    return overrides


FAULTS: dict[str, tuple[str, Spoil, str]] = {
    "data source by name": (
        _OVERVIEW, _set(_TILE, {"type": "prometheus", "uid": "prometheus"}, "datasource"), "datasource"),
    "data source of a query": (
        _OVERVIEW, lambda b: panel(b, _TILE)["targets"][0].pop("datasource"), "datasource"),
    "data source of a variable": (
        _OVERVIEW, lambda b: _job(b).update(datasource="Prometheus"), "datasource"),
    "data source of an annotation": (
        _OVERVIEW, lambda b: b["annotations"]["list"][1].pop("datasource"), "datasource"),
    "no instance matcher": (_OVERVIEW, _expr(_TILE, 'instance=~"$instance", ', ""), "matchers"),
    "equality for a variable of several": (_OVERVIEW, _expr(_TILE, 'job=~"$job"', 'job="$job"'), "matchers"),
    "alerts of one engine only": (
        _OVERVIEW, _expr("Alerts firing", 'engine=~"$engine|"', 'engine=~"$engine"'), "matchers"),
    "a tile over the time range": (
        _OVERVIEW, lambda b: panel(b, _TILE)["targets"][0].update(instant=False, range=True), "tiles_now"),
    "counter without rate": (_LAYERS, _expr("Massive activations by position", "rate(", "("), "counters"),
    "rate of a gauge": (
        _LAYERS, _expr("Sink mass by layer", "(sluice_attention", "(rate(sluice_attention"), "counters"),
    "fixed span": (_LAYERS, _expr("Massive activations by position", "$__rate_interval", "5m"), "rate_interval"),
    "misspelt metric": (_LAYERS, _expr("Sink mass by layer", "sink_mass", "sink_mas"), "metrics"),
    "metric of vLLM that is not listed": (
        _OVERVIEW, _expr("Tokens looked at", "sluice_tokens_observed_total", "vllm:num_preemptions_total"), "metrics"),
    "label that the metric has not": (
        _LAYERS, _expr("Sink mass by layer", 'layer=~"$layer"', 'site="hidden"'), "metrics"),
    "unknown variable": (_LAYERS, _expr("Sink mass by layer", "$layer", "$layers"), "variables"),
    "variable that nothing uses": (
        _OVERVIEW, lambda b: b["templating"]["list"].append({**_job(b), "name": "site"}), "variables"),
    "variable that is not read again": (_OVERVIEW, lambda b: _job(b).update(refresh=1), "variables"),
    "variables in another order": (_OVERVIEW, lambda b: b["templating"]["list"].reverse(), "variables"),
    "no unit on a tile": (_OVERVIEW, _drop(_TILE, "fieldConfig", "defaults", "unit"), "units"),
    "no unit on a heatmap": (_LAYERS, _drop("Sink mass by layer", "options", "cellValues", "unit"), "units"),
    "no unit on a column": (_LAYERS, lambda b: _overrides(b, "Each layer now").pop(1), "units"),
    "no description": (_OVERVIEW, _set(_TILE, "", "description"), "descriptions"),
    "does not say what is good": (
        _OVERVIEW, _set(_TILE, "Largest activation of all.\n\nMetric: `sluice_info`", "description"), "descriptions"),
    "names another metric": (
        _ATTENTION, _expr("Sink mass now", "sluice_attention_sink_mass", "sluice_gate_mean"), "descriptions"),
    "id 0": (_OVERVIEW, _set(_TILE, 0, "id"), "ids"),
    "the same id twice": (_OVERVIEW, lambda b: b["panels"][1].update(id=b["panels"][2]["id"]), "ids"),
    "runbook of no alert": (
        _OVERVIEW, _set(_TILE, [{"title": "Runbook", "url": f"{RUNBOOKS}/SluiceRangeFull.md"}], "links"), "links"),
    "link to no board": (
        _LAYERS, lambda b: _overrides(b, "Each layer now")[-1]["properties"][0]["value"][0].update(
            url="/d/sluice-layer?x=1"), "links"),
    "link that drops the variables": (_OVERVIEW, lambda b: b["links"][1].update(includeVars=False), "links"),
    "full detail in an open row": (_LAYERS, _move_to_open_row("Top channels"), "detail"),
    "full detail that is not said": (
        _LAYERS, _set("Top channels", "The three largest.\n\nGood: few.\n\nMetric: `x`", "description"), "detail"),
    "empty without a reason": (_OVERVIEW, _drop(_TILE, "fieldConfig", "defaults", "noValue"), "no_value"),
    "state timeline with threshold colours": (
        "sluice-patches", _set("Patches over time", {"mode": "thresholds"}, "fieldConfig", "defaults", "color"),
        "state_colours"),
    "one panel over another": (_OVERVIEW, lambda b: b["panels"][2]["gridPos"].update(x=0), "overlap"),
    "old schema": (_OVERVIEW, lambda b: b.update(schemaVersion=36), "board"),
    "without the tag of vLLM": (_OVERVIEW, lambda b: b.update(tags=["sluice"]), "board"),
    "another uid": (_OVERVIEW, lambda b: b.update(uid="overview"), "board"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_lint_catches(name: str) -> None:
    uid, spoil, rule = FAULTS[name]
    board = boards.load(uid)
    spoil(board)
    assert [fault for fault in lint.faults(board) if fault.startswith(f"{rule}: ")], lint.faults(board)
