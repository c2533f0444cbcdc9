"""A whole board: variables, links, annotations, and panels laid out in rows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sluice_boards.panels import RUNBOOKS, Panel
from sluice_boards.queries import DATASOURCE, SELECTED, of

SCHEMA_VERSION = 39
"""Grafana 10.4's; newer servers migrate it when they load it."""
TAGS = ["vllm", "sluice"]
"""`vllm` is the tag of vLLM's own boards, so that links go both ways."""
_COLUMNS = 24


@dataclass(frozen=True)
class Row:
    """Panels under a heading; a collapsed row's queries run only when somebody opens it."""

    title: str
    panels: Sequence[Panel]
    collapsed: bool = False


def board(
    uid: str, title: str, description: str, rows: Sequence[Row], *,
    layer: bool = False, variables: Sequence[dict[str, Any]] = (), time: str = "now-1h",
) -> dict[str, Any]:  # fmt: skip
    """Return a dashboard; `layer` adds the variable that narrows the layers."""
    listed = [*_engine_variables(), *([_layer_variable()] if layer else []), *variables]
    return {
        "uid": uid,
        "title": f"Sluice / {title}",
        "description": description,
        "tags": TAGS,
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": time, "to": "now"},
        "timezone": "browser",
        "links": _links(),
        "templating": {"list": listed},
        "annotations": {"list": [_built_in(), _changes()]},
        "panels": _laid_out(rows),
    }


def query_variable(name: str, label: str, query: str, *, several: bool = True) -> dict[str, Any]:
    """Return a variable whose values are label values; with `several` any number, all at first."""
    variable: dict[str, Any] = {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": f"variable-{name}"},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": several,
        "includeAll": several,
    }
    if several:
        variable |= {"allValue": ".+", "current": {"text": ["All"], "value": ["$__all"]}}
    return variable


def _engine_variables() -> list[dict[str, Any]]:
    # sluice_info is one series an engine, and there also while the engine is idle.
    return [
        {
            "type": "datasource",
            "name": "datasource",
            "label": "Data source",
            "query": "prometheus",
            "includeAll": False,
            "multi": False,
        },
        query_variable("job", "Job", "label_values(sluice_info, job)"),
        query_variable("model_name", "Model", 'label_values(sluice_info{job=~"$job"}, model_name)'),
        query_variable(
            "instance", "Instance", 'label_values(sluice_info{job=~"$job", model_name=~"$model_name"}, instance)'
        ),
        query_variable(
            "engine",
            "Engine",
            'label_values(sluice_info{job=~"$job", model_name=~"$model_name", instance=~"$instance"}, engine)',
        ),
    ]


def _layer_variable() -> dict[str, Any]:
    # A counter, because the window's gauges are left out of an idle engine.
    return query_variable("layer", "Layer", f"label_values({of('sluice_nonfinite_total')}, layer)")


def _links() -> list[dict[str, Any]]:
    common = {"includeVars": True, "keepTime": True, "targetBlank": False, "tooltip": "", "url": ""}
    return [
        {"type": "dashboards", "title": "Sluice", "tags": ["sluice"], "asDropdown": False, "icon": "dashboard",
         **common},
        {"type": "dashboards", "title": "vLLM", "tags": ["vllm"], "asDropdown": True, "icon": "dashboard", **common},
        {"type": "link", "title": "Runbooks", "tags": [], "asDropdown": False, "icon": "doc", **common,
         "url": RUNBOOKS.replace("/blob/", "/tree/"), "targetBlank": True, "includeVars": False, "keepTime": False},
    ]  # fmt: skip


def _built_in() -> dict[str, Any]:
    return {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }


def _changes() -> dict[str, Any]:
    # The value is the time of the change: exact whatever the step, and no mark for a patch that was never changed.
    return {
        "name": "Patch changes",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "purple",
        "expr": f"sluice_patch_last_change_timestamp_seconds{{{SELECTED}}} * 1000",
        "step": "30s",
        "titleFormat": "{{patch}} changed",
        "textFormat": "engine {{engine}} of {{instance}}",
        "tagKeys": "patch,engine",
        "useValueForTime": True,
    }


def _laid_out(rows: Sequence[Row]) -> list[Panel]:
    laid_out: list[Panel] = []
    top = 0
    for row in rows:
        heading = {
            "type": "row",
            "id": _identity(f"row {row.title}"),
            "title": row.title,
            "collapsed": row.collapsed,
            "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
            "panels": [],
        }
        placed, below = _placed(row.panels, top + 1)
        if row.collapsed:
            heading["panels"] = placed
            laid_out.append(heading)
            top += 1
        else:
            laid_out += [heading, *placed]
            top = below
    return laid_out


def _placed(panels: Sequence[Panel], top: int) -> tuple[list[Panel], int]:
    """Put panels side by side as they fit; return them and the first free line below."""
    placed, left, height = [], 0, 0
    for panel in panels:
        size = panel["gridPos"]
        if left + size["w"] > _COLUMNS:
            top, left, height = top + height, 0, 0
        position = {"x": left, "y": top, "w": size["w"], "h": size["h"]}
        placed.append({**panel, "id": _identity(panel["title"]), "gridPos": position})
        left, height = left + size["w"], max(height, size["h"])
    return placed, top + height


def _identity(title: str) -> int:
    """Return a panel's id: it follows from the title, so that a link to a panel outlives new neighbours."""
    return zlib.crc32(title.encode()) % 1_000_000 + 1
