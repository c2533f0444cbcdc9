"""PromQL that every board shares: label selection, rates, targets. Only what Prometheus 2.42 accepts."""

from __future__ import annotations

from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
ENGINE = "job, instance, model_name, engine"
"""Labels of one engine; a join or an aggregate that keeps them still obeys every variable."""
LAYER = f"{ENGINE}, layer"
SELECTED = 'job=~"$job", instance=~"$instance", model_name=~"$model_name", engine=~"$engine"'

Target = dict[str, Any]


def of(metric: str, *matchers: str) -> str:
    """Select the series of a metric that the board's variables leave in."""
    return f"{metric}{{{', '.join((SELECTED, *matchers))}}}"


def alerts(*matchers: str) -> str:
    """Select alerts; those about a whole server have no `engine`, those about several machines no `instance`."""
    selected = ", ".join(f'{label}=~"${label}|"' for label in ENGINE.split(", "))
    return f"ALERTS{{{', '.join((selected, *matchers))}}}"


def of_layers(metric: str, *matchers: str) -> str:
    """Select the series of a metric of layers that the board's variables leave in."""
    return of(metric, 'layer=~"$layer"', *matchers)


def equal(label: str, value: str) -> str:
    """Return a matcher for one value of a label."""
    return f'{label}="{value}"'


def once(expression: str) -> str:
    """Leave an engine whose machines are scraped one by one (`sluice exporter`) where its first rank is."""
    first = of("sluice_generation", equal("rank", "pp0-tp0"), equal("kind", "applied"))
    return f"({expression} and on ({ENGINE}) {first})"


def rate(selector: str) -> str:
    """Per second, over a span that always holds enough scrapes."""
    return f"rate({selector}[$__rate_interval])"


def increase(selector: str) -> str:
    """How much a counter rose in the time range that the board shows."""
    return f"increase({selector}[$__range])"


def quantile(share: float, histogram: str, labels: str, *matchers: str) -> str:
    """Quantile of a histogram of vLLM by labels."""
    buckets = rate(of(f"{histogram}_bucket", *matchers))
    return f"histogram_quantile({share}, sum by (le, {labels}) ({buckets}))"


def to_baseline(metric: str, baseline: str) -> str:
    """Per layer, how many times the baseline's value; nothing where there is no baseline."""
    return f"{of_layers(metric)} / on ({LAYER}) ({of_layers(baseline)} > 0)"


def ranks_behind() -> str:
    """For each rank 1 if its applied generation is not the desired one, else 0."""
    wanted, applied = (
        f"max by ({ENGINE}, rank) ({of('sluice_generation', equal('kind', kind))})" for kind in ("desired", "applied")
    )
    return f"{wanted} != bool {applied}"


def cost(labels: str) -> str:
    """Share of the forward passes' time that probes take, by labels of an engine."""
    spent, base = (f"sum by ({labels}) ({rate(of(f'sluice_{name}_seconds_total'))})" for name in ("probe", "forward"))
    return f"{spent} / ({base} > 0)"


def series(expr: str, legend: str) -> Target:
    """Ask for a curve for each series, over the time range."""
    return {**_target(expr), "range": True, "instant": False, "format": "time_series", "legendFormat": legend}


def now(expr: str, legend: str) -> Target:
    """Ask for one value for each series, at the end of the time range."""
    return {**_target(expr), "range": False, "instant": True, "format": "time_series", "legendFormat": legend}


def rows(expr: str, *, over_time: bool = False) -> Target:
    """Ask for a table's rows: labels and value, now or for every step of the time range."""
    return {**_target(expr), "range": over_time, "instant": not over_time, "format": "table", "legendFormat": ""}


def _target(expr: str) -> Target:
    return {"datasource": DATASOURCE, "editorMode": "code", "expr": expr}
