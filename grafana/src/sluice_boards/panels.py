"""Panels as dicts of Grafana's Classic model. Only options that Grafana 10.4 to 13.2 know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sluice_boards.needs import IDLE, Need
from sluice_boards.queries import DATASOURCE, Target

RUNBOOKS = "https://github.com/vllm-sluice/sluice/blob/main/deploy/prometheus/runbooks"
NEUTRAL = "blue"
"""For values that are neither good nor bad in themselves."""
OFF = "#6e7687"
"""A grey that is quieter than "on" in the dark and in the light theme."""

Panel = dict[str, Any]
Steps = Sequence[tuple[float | None, str]]

_METRIC = re.compile(r"\b(sluice_[a-z0-9_]+|vllm:[a-z0-9_]+|ALERTS|up|scrape_[a-z_]+)\b(?=\s*[{\[])")


def steps(good: str = "green", **colours: float) -> Steps:
    """Thresholds: `steps(orange=0.5, red=0.9)` is green, orange from 0.5 on, red from 0.9 on."""
    return ((None, good), *((value, colour) for colour, value in colours.items()))


def below(red: float, orange: float) -> Steps:
    """Thresholds where low is bad."""
    return ((None, "red"), (red, "orange"), (orange, "green"))


NO_JUDGEMENT: Steps = ((None, NEUTRAL),)


def stat(
    title: str, says: str, good: str, target: Target, unit: str, *,
    colours: Steps = NO_JUDGEMENT, alert: str = "", need: Need = IDLE, decimals: int | None = None,
    width: int = 3, texts: Mapping[float, tuple[str, str]] | None = None,
    plenty: tuple[str, float] | None = None,
) -> Panel:  # fmt: skip
    """One large number; `plenty` is what to show above a value, where the number no longer matters."""
    panel = _panel("stat", title, says, good, [target], unit, alert, need, (width, 4))
    panel["fieldConfig"]["defaults"] |= {"thresholds": _thresholds(colours), "color": {"mode": "thresholds"}}
    _decimals(panel, decimals)
    if texts:
        panel["fieldConfig"]["defaults"]["mappings"] = _mappings(texts)
    if plenty:
        above = {"from": plenty[1], "to": None, "result": {"text": plenty[0], "color": "green", "index": 0}}
        panel["fieldConfig"]["defaults"]["mappings"] = [{"type": "range", "options": above}]
    panel["options"] = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    }
    return panel


def timeseries(
    title: str, says: str, good: str, targets: Target | Sequence[Target], unit: str, *,
    alert: str = "", need: Need = IDLE, size: tuple[int, int] = (12, 8), stacked: bool = False,
    least: float | None = 0, most: float | None = None, log: bool = False, limit: Steps = (),
    decimals: int | None = None,
) -> Panel:  # fmt: skip
    """Curves over time, the largest first in tooltip and legend."""
    panel = _panel("timeseries", title, says, good, targets, unit, alert, need, size)
    defaults = panel["fieldConfig"]["defaults"]
    defaults["color"] = {"mode": "palette-classic"}
    defaults["custom"] = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 25 if stacked else 5,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
    }
    if limit:
        defaults["thresholds"] = _thresholds(limit)
        defaults["custom"]["thresholdsStyle"] = {"mode": "dashed"}
    if not log and least is not None:
        defaults["min"] = least
    if most is not None:
        defaults["max"] = most
    _decimals(panel, decimals)
    panel["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


def layer_heatmap(
    title: str, says: str, good: str, target: Target, unit: str, *,
    alert: str = "", need: Need = IDLE, size: tuple[int, int] = (12, 10), decimals: int = 2,
    bounds: tuple[float | None, float | None] = (None, None), scheme: str = "Spectral", low_is_bad: bool = False,
) -> Panel:  # fmt: skip
    """Layers upwards, time to the right, the value as colour; one series a layer, no histogram.

    Grafana turns a sequential scheme around by itself in one of its themes, and a diverging one in both, whatever
    `reverse` says. Diverging schemes therefore always end in red; where low is what to look at, a reversed sequential
    one makes low bright in both themes.
    """
    if low_is_bad:
        scheme = "Inferno"
    panel = _panel("heatmap", title, says, good, [target], "", alert, need, size)
    panel["maxDataPoints"] = 240
    colour: dict[str, Any] = {
        "mode": "scheme", "scheme": scheme, "steps": 64, "reverse": low_is_bad, "exponent": 0.5, "fill": "dark-orange",
        "scale": "exponential",
    }  # fmt: skip
    colour |= {name: value for name, value in zip(("min", "max"), bounds, strict=True) if value is not None}
    panel["options"] = {
        "calculate": False,
        "cellGap": 0,
        "cellValues": {"unit": unit, "decimals": decimals},
        "color": colour,
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": -1e9},  # the default hides small values, and a gate of 0 is one
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "axisLabel": "layer"},
    }
    return panel


def bar_gauge(
    title: str, says: str, good: str, target: Target, unit: str, *,
    colours: Steps = NO_JUDGEMENT, alert: str = "", need: Need = IDLE, size: tuple[int, int] = (12, 10),
    decimals: int | None = None, least: float = 0, most: float | None = None,
) -> Panel:  # fmt: skip
    """One bar for each series now; scrolls where there are many."""
    panel = _panel("bargauge", title, says, good, [target], unit, alert, need, size)
    defaults = panel["fieldConfig"]["defaults"]
    defaults |= {"thresholds": _thresholds(colours), "color": {"mode": "thresholds"}, "min": least}
    if most is not None:
        defaults["max"] = most
    _decimals(panel, decimals)
    panel["options"] = {
        "displayMode": "basic",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": True,
        "text": {"titleSize": 12, "valueSize": 13},
        "valueMode": "text",
        "namePlacement": "left",
        "sizing": "manual",
        "minVizHeight": 14,
        "maxVizHeight": 22,
        "minVizWidth": 8,
    }
    return panel


def state_timeline(
    title: str, says: str, good: str, targets: Target | Sequence[Target], states: Mapping[float, tuple[str, str]], *,
    alert: str = "", need: Need = IDLE, size: tuple[int, int] = (12, 6), merge: bool = True,
) -> Panel:  # fmt: skip
    """Show a lane for each series; `states` says what a value means and its colour."""
    panel = _panel("state-timeline", title, says, good, targets, "none", alert, need, size)
    # With threshold colours Grafana shows the thresholds' ranges in place of the mapped states.
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "fixed", "fixedColor": OFF},
        "mappings": _mappings(states),
        "custom": {"fillOpacity": 80, "lineWidth": 0},
    }
    panel["maxDataPoints"] = 480
    panel["options"] = {
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
        "mergeValues": merge,
        "rowHeight": 0.8,
        "showValue": "auto",
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return panel


def table(
    title: str, says: str, good: str, columns: Sequence[Column], *,
    labels: Mapping[str, str], sort: str = "", alert: str = "", need: Need = IDLE, size: tuple[int, int] = (24, 10),
    link: tuple[str, str] | None = None, label_texts: Mapping[str, Mapping[float, tuple[str, str]]] | None = None,
) -> Panel:  # fmt: skip
    """Show a row for each combination of labels and a column for each query.

    `labels` maps the label that is shown to its heading, in order; labels that are not named are hidden. The queries
    must be aggregated to the same labels, or their rows do not merge. `label_texts` says what a label's values mean.
    """
    panel = _panel("table", title, says, good, [column["target"] for column in columns], "", alert, need, size)
    del panel["fieldConfig"]["defaults"]["noValue"]  # it would stand in every empty cell
    values = [f"Value #{target['refId']}" if len(columns) > 1 else "Value" for target in panel["targets"]]
    headings = dict(zip(values, (column["heading"] for column in columns), strict=True))
    order = [*labels, *values]
    hidden = {name: True for name in ("Time", "job", "instance", "model_name", "engine") if name not in labels}
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {
            "excludeByName": hidden,
            "indexByName": {name: place for place, name in enumerate(order)},
            "renameByName": {**labels, **headings},
        }},
    ]  # fmt: skip
    if sort:
        by = {"field": sort.lstrip("-"), "desc": sort.startswith("-")}
        panel["transformations"].append({"id": "sortBy", "options": {"fields": {}, "sort": [by]}})
    # Numbers that are names, such as layer 007, must not be formatted as numbers.
    panel["fieldConfig"]["overrides"] = [
        *(_override(heading, {"unit": "string", **_least_width(heading, _LABEL_WIDTHS.get(heading, 60))})
          for heading in labels.values()),
        *(_override(column["heading"], {**_least_width(column["heading"]), **column["properties"]})
          for column in columns),
    ]
    for heading, texts in (label_texts or {}).items():
        properties = {"mappings": _mappings(texts), "custom.cellOptions": {"type": "color-text"}}
        panel["fieldConfig"]["overrides"].append(_override(heading, properties))
    if link:
        heading, url = link
        panel["fieldConfig"]["overrides"].append(
            _override(heading, {"links": [{"title": "Look at it", "url": url, "targetBlank": False}]})
        )
    panel["options"] = {"showHeader": True, "cellHeight": "sm"}
    return panel


Column = dict[str, Any]
_LABEL_WIDTHS = {"instance": 115, "model": 90}


def _least_width(heading: str, least: int = 50) -> dict[str, int]:
    """Make room for the heading; Grafana's 150 pixels a column push the last ones out of sight."""
    return {"custom.minWidth": max(least, round(7.2 * len(heading)) + 22)}


def column(
    heading: str, target: Target, unit: str, *,
    decimals: int | None = None, colours: Steps = (), texts: Mapping[float, tuple[str, str]] | None = None,
) -> Column:  # fmt: skip
    """Return a table's column: heading, query, unit, and colours where a judgement is justified."""
    properties: dict[str, Any] = {"unit": unit}
    if decimals is not None:
        properties["decimals"] = decimals
    if colours:
        properties |= {"thresholds": _thresholds(colours), "custom.cellOptions": {"type": "color-text"}}
        properties["color"] = {"mode": "thresholds"}
    if texts:
        properties |= {"mappings": _mappings(texts), "custom.cellOptions": {"type": "color-text"}}
    if unit == "dateTimeAsIso":
        properties["custom.minWidth"] = 170
    return {"heading": heading, "target": target, "properties": properties}


def runbook(alert: str) -> str:
    """Return the address of an alert's runbook."""
    return f"{RUNBOOKS}/{alert}.md"


def metrics(panel: Panel) -> list[str]:
    """Return the metrics that a panel queries, in order."""
    found = [name for target in panel["targets"] for name in _METRIC.findall(target["expr"])]
    return list(dict.fromkeys(found))


def _panel(
    kind: str, title: str, says: str, good: str, targets: Target | Sequence[Target], unit: str, alert: str,
    need: Need, size: tuple[int, int],
) -> Panel:  # fmt: skip
    targets = [targets] if isinstance(targets, dict) else targets
    panel: Panel = {
        "type": kind,
        "title": title,
        "datasource": DATASOURCE,
        "gridPos": {"w": size[0], "h": size[1]},
        "targets": [{**target, "refId": chr(ord("A") + place)} for place, target in enumerate(targets)],
        "fieldConfig": {"defaults": {"noValue": need.no_value}, "overrides": []},
    }
    if unit:
        panel["fieldConfig"]["defaults"]["unit"] = unit
    names = metrics(panel)
    named = ("Metric: " if len(names) == 1 else "Metrics: ") + ", ".join(f"`{name}`" for name in names)
    panel["description"] = "\n\n".join(part for part in (says, f"Good: {good}", need.text, named) if part)
    if alert:
        panel["links"] = [{"title": f"Runbook: {alert}", "url": runbook(alert), "targetBlank": True}]
    return panel


def _decimals(panel: Panel, decimals: int | None) -> None:
    if decimals is not None:
        panel["fieldConfig"]["defaults"]["decimals"] = decimals


def _thresholds(colours: Steps) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in colours]}


def _mappings(texts: Mapping[float, tuple[str, str]]) -> list[dict[str, Any]]:
    options = {
        f"{value:g}": {"text": text, "color": colour, "index": place}
        for place, (value, (text, colour)) in enumerate(texts.items())
    }
    return [{"type": "value", "options": options}]


def _override(heading: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "matcher": {"id": "byName", "options": heading},
        "properties": [{"id": name, "value": value} for name, value in properties.items()],
    }
