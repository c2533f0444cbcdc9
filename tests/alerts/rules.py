"""The shipped rules as data, and what they link to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy" / "prometheus"
RULES = DEPLOY / "rules" / "sluice.rules.yml"
RUNBOOKS = DEPLOY / "runbooks"
RUNBOOK_URL = "https://github.com/vllm-sluice/sluice/blob/main/deploy/prometheus/runbooks/{}.md"
SEVERITIES = ("critical", "warning", "info")
DASHBOARDS = (
    "sluice-overview", "sluice-layers", "sluice-attention", "sluice-quantization", "sluice-patches", "sluice-monitor",
    "sluice-fleet",
)  # fmt: skip
"""Uids of the boards in grafana/dashboards; a board is the file of that name."""

_NAME = re.compile(r"\b(?:[a-z_]+:)?(?:sluice|vllm)[:_][a-z0-9_]+(?::[a-z0-9_]+)?")
_SELECTOR = re.compile(r"\b((?:sluice_|vllm:)[a-z0-9_]+)\{([^}]*)\}")
_COMMENT = re.compile(r"#.*")


def groups(path: Path = RULES) -> list[dict[str, Any]]:
    """Return the rule groups of a file."""
    loaded: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    return loaded


def alerts(path: Path = RULES) -> dict[str, dict[str, Any]]:
    """Return every alert by its name."""
    return {rule["alert"]: rule for group in groups(path) for rule in group["rules"] if "alert" in rule}


def recordings(path: Path = RULES) -> dict[str, str]:
    """Return the expression of every recorded series."""
    return {rule["record"]: rule["expr"] for group in groups(path) for rule in group["rules"] if "record" in rule}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield name and expression of every rule, comments left out."""
    for group in groups():
        for rule in group["rules"]:
            yield rule.get("record") or rule["alert"], _COMMENT.sub("", rule["expr"])


def names(expression: str) -> set[str]:
    """Return the metrics and recorded series in an expression."""
    return set(_NAME.findall(expression))


def selectors(expression: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each metric with the labels that its selector names."""
    for name, matchers in _SELECTOR.findall(expression):
        yield name, re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers)
