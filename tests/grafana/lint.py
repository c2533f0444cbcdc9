"""Rules for dashboards: what Grafana's own linter asks for, over all panel types, and what Sluice asks for besides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.grafana import boards, promql
from tests.grafana.boards import Board
from vllm_sluice.telemetry.catalogue import BY_NAME as METRICS

VLLM = frozenset(
    {
        "vllm:generation_tokens_total",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:num_requests_running",
        "vllm:prompt_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
    }
)
"""Metrics of vLLM that boards may use; the recorded stretch of a real server has them all."""
PROMETHEUS = frozenset({"ALERTS", "scrape_duration_seconds"})
"""What Prometheus adds itself."""
ALERTS = frozenset(
    {
        "NonFiniteValues", "ServingRangeSaturated", "QuantizationRangeExceeded", "MassiveActivationsNew",
        "SinkRateShifted", "ActivationDrift", "PatchNotApplied", "RanksDisagree", "EnginePaused", "SnapshotStale",
        "ProbeErrors", "ProbeCostHigh", "ConfigFileBroken", "RestartNeeded",
        "BaselineUnusable",
    }
)  # fmt: skip
RUNBOOK = re.compile(
    r"https://github\.com/vllm-sluice/sluice/blob/main/deploy/prometheus/runbooks/Sluice(\w+)\.md"
)
FULL_DETAIL = "`telemetry.detail: full`"
MOST_PANELS = 40
_BUILT_IN = {"__rate_interval", "__range", "__interval", "__interval_ms", "__url_time_range", "__data", "__all"}
_REQUIRED_VARIABLES = ["datasource", "job", "model_name", "instance", "engine"]


def faults(board: Board) -> list[str]:
    """Return everything that is wrong with a dashboard, each as `rule: where: what`."""
    return [f"{rule.__name__.lstrip('_')}: {fault}" for rule in _RULES for fault in rule(board)]


def _datasource(board: Board) -> Iterator[str]:
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    for panel in boards.panels(board):
        for where in (panel, *panel["targets"]):
            if where.get("datasource") != wanted:
                yield f"{panel['title']}: another data source than the variable: {where.get('datasource')}"
    for variable in board["templating"]["list"]:
        if variable["type"] == "query" and variable.get("datasource") != wanted:
            yield f"variable {variable['name']}: another data source than the variable"
    for annotation in board["annotations"]["list"]:
        if not annotation.get("builtIn") and annotation.get("datasource") != wanted:
            yield f"annotation {annotation['name']}: another data source than the variable"


def _matchers(board: Board) -> Iterator[str]:
    for where, expr in _expressions(board):
        for selector in promql.selectors(expr):
            labels = ["job", "instance"] + ([] if selector.metric.startswith("scrape_") else ["model_name", "engine"])
            # Not every alert has all of these labels.
            wanted = "=~${}|" if selector.metric == "ALERTS" else "=~${}"
            for label in labels:
                if selector.matchers.get(label) != wanted.format(label):
                    yield f"{where}: {selector.metric} without {label}{wanted.format(label)}"


def _tiles_now(board: Board) -> Iterator[str]:
    for panel in boards.panels(board):
        if panel["type"] == "stat" and not all(target["instant"] for target in panel["targets"]):
            yield f"{panel['title']}: asks over the time range, so it shows the last value of what is gone"


def _counters(board: Board) -> Iterator[str]:
    for where, expr in _expressions(board):
        for selector in promql.selectors(expr):
            counter = selector.metric.endswith(("_total", "_bucket"))
            if counter and not selector.as_rate and not where.endswith(" ever"):  # "ever": a total since the start
                yield f"{where}: counter {selector.metric} without rate or increase"
            if not counter and selector.as_rate:
                yield f"{where}: rate of {selector.metric}, which is no counter"


def _rate_interval(board: Board) -> Iterator[str]:
    for where, expr in _expressions(board):
        for selector in promql.selectors(expr):
            fixed = bool(re.fullmatch(r"\d+[smhd]", selector.span))
            if fixed and "Before and after" not in where:
                yield f"{where}: a fixed span [{selector.span}]; use $__rate_interval"


def _metrics(board: Board) -> Iterator[str]:
    known = METRICS.keys() | VLLM | PROMETHEUS
    for where, expr in _expressions(board):
        for selector in promql.selectors(expr):
            if selector.metric not in known:
                yield f"{where}: {selector.metric} is not in the catalogue"
            elif selector.metric in METRICS:
                yield from _labels(where, selector)


def _labels(where: str, selector: promql.Selector) -> Iterator[str]:
    known = {"job", "instance", "model_name", "engine", *METRICS[selector.metric].labels}
    for label in selector.matchers.keys() - known:
        yield f"{where}: {selector.metric} has no label {label}"


def _variables(board: Board) -> Iterator[str]:
    names = [variable["name"] for variable in board["templating"]["list"]]
    if names[: len(_REQUIRED_VARIABLES)] != _REQUIRED_VARIABLES:
        yield f"variables: {names} do not begin with {_REQUIRED_VARIABLES}"
    for variable in board["templating"]["list"]:
        if variable["type"] == "query" and variable["refresh"] != 2:
            yield f"variable {variable['name']}: not read again when the time range changes"
        if variable.get("includeAll") and variable.get("allValue") != ".+":
            yield f"variable {variable['name']}: All is not .+"
    things = [*boards.panels(board), *board["templating"]["list"], *board["annotations"]["list"]]
    texts = [(thing.get("title") or thing["name"], text) for thing in things for text in _strings(thing)]
    for where, text in texts:
        for name in sorted(promql.variables(text) - set(names) - _BUILT_IN):
            yield f"{where}: unknown variable ${name}"
    used = {name for _, text in texts for name in promql.variables(text)}
    yield from (f"variable {name}: not used" for name in names if name not in used)


def _units(board: Board) -> Iterator[str]:
    for panel in boards.panels(board):
        if panel["type"] == "heatmap":
            if not panel["options"]["cellValues"].get("unit"):
                yield f"{panel['title']}: no unit for cells"
        elif panel["type"] == "table":
            shown = {name for override in panel["fieldConfig"]["overrides"] for name in [override["matcher"]["options"]]
                     if any(p["id"] == "unit" for p in override["properties"])}  # fmt: skip
            organize = next(t for t in panel["transformations"] if t["id"] == "organize")["options"]
            for name in organize["indexByName"]:
                heading = organize["renameByName"].get(name, name)
                if heading not in shown:
                    yield f"{panel['title']}: no unit for column {heading}"
        elif not panel["fieldConfig"]["defaults"].get("unit"):
            yield f"{panel['title']}: no unit"


def _descriptions(board: Board) -> Iterator[str]:
    for panel in boards.panels(board):
        text = panel.get("description", "")
        if len(text.split("\n\n")[0]) < 20:
            yield f"{panel['title']}: no description"
        if "\n\nGood: " not in text:
            yield f"{panel['title']}: does not say what good looks like"
        read = {s.metric for t in panel["targets"] for s in promql.selectors(t["expr"])}
        named = set(re.findall(r"`([\w:]+)`", text.rsplit("\n\n", 1)[-1]))
        if read != named:
            yield f"{panel['title']}: names the metrics {sorted(named)}, reads {sorted(read)}"
    if len(board.get("description", "")) < 20:
        yield "board: no description"


def _ids(board: Board) -> Iterator[str]:
    everything = [*board["panels"], *(inner for row, inner in boards.with_rows(board) if row)]
    ids = [panel.get("id") for panel in everything]
    for panel in everything:
        if not isinstance(panel.get("id"), int) or panel["id"] <= 0:
            yield f"{panel['title']}: id {panel.get('id')}"
        elif ids.count(panel["id"]) > 1:
            yield f"{panel['title']}: id {panel['id']} is not unique"
    titles = [panel["title"] for panel in everything]
    yield from (f"{title}: title is not unique" for title in sorted(set(titles)) if titles.count(title) > 1)


def _links(board: Board) -> Iterator[str]:
    for panel in boards.panels(board):
        for link in panel.get("links", []):
            found = RUNBOOK.fullmatch(link["url"])
            if not found or found.group(1) not in ALERTS:
                yield f"{panel['title']}: no such runbook: {link['url']}"
        for text in _strings(panel["fieldConfig"]):
            target = re.match(r"/d/([\w-]+)", text)
            if target and target.group(1) not in boards.UIDS:
                yield f"{panel['title']}: no such board: {target.group(1)}"
    tags = [link.get("tags") for link in board["links"] if link["type"] == "dashboards"]
    if ["vllm"] not in tags or not all(link["includeVars"] and link["keepTime"] for link in board["links"][:2]):
        yield "board: links to the boards of vLLM must keep variables and time"


def _detail(board: Board) -> Iterator[str]:
    """Metrics that are not exported by default belong in a collapsed row and must say what they need."""
    for row, panel in boards.with_rows(board):
        names = {s.metric for t in panel["targets"] for s in promql.selectors(t["expr"])}
        full = {name for name in names if name in METRICS and METRICS[name].detail == "full"}
        if not full:
            continue
        if row is None or not row["collapsed"]:
            yield f"{panel['title']}: {sorted(full)} are not exported by default, and its row is open"
        if FULL_DETAIL not in panel["description"]:
            yield f"{panel['title']}: does not say that it needs telemetry.detail: full"


def _no_value(board: Board) -> Iterator[str]:
    for panel in boards.panels(board):
        if panel["type"] != "table" and not panel["fieldConfig"]["defaults"].get("noValue"):
            yield f"{panel['title']}: does not say why it may be empty"


def _state_colours(board: Board) -> Iterator[str]:
    """With threshold colours a state timeline shows the thresholds' ranges in place of the mapped states."""
    for panel in boards.panels(board):
        if panel["type"] == "state-timeline" and panel["fieldConfig"]["defaults"]["color"]["mode"] != "fixed":
            yield f"{panel['title']}: a state timeline needs a fixed colour and mappings"


def _overlap(board: Board) -> Iterator[str]:
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        if place["x"] + place["w"] > 24:
            yield f"{panel['title']}: wider than the board"
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"])
                     for y in range(place["y"], place["y"] + place["h"])):  # fmt: skip
            if cell in taken:
                yield f"{panel['title']}: lies over {taken[cell]}"
                break
            taken[cell] = panel["title"]


def _board(board: Board) -> Iterator[str]:
    if not 39 <= board["schemaVersion"] <= 42:
        yield f"board: schemaVersion {board['schemaVersion']}"
    if not {"vllm", "sluice"} <= set(board["tags"]):
        yield f"board: tags {board['tags']}"
    if board["uid"] not in boards.UIDS or not board["title"].startswith("Sluice / "):
        yield f"board: uid {board['uid']}, title {board['title']}"
    if "id" in board or "version" in board:
        yield "board: id and version belong to a server"
    if len(boards.panels(board)) > MOST_PANELS:
        yield "board: too many panels"


def _expressions(board: Board) -> Iterator[tuple[str, str]]:
    for panel in boards.panels(board):
        organize = [t["options"]["renameByName"] for t in panel.get("transformations", []) if t["id"] == "organize"]
        for target in panel["targets"]:
            heading = organize[0].get(f"Value #{target['refId']}", "") if organize else ""
            yield f"{panel['title']}, {target['refId']} {heading}".rstrip(), target["expr"]
    for annotation in board["annotations"]["list"]:
        if "expr" in annotation:
            yield f"annotation {annotation['name']}", annotation["expr"]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


_RULES: tuple[Callable[[Board], Iterator[str]], ...] = (
    _datasource, _matchers, _tiles_now, _counters, _rate_interval, _metrics, _variables, _units, _descriptions, _ids,
    _links,
    _detail, _no_value, _state_colours, _overlap, _board,
)  # fmt: skip
