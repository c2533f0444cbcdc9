#!/usr/bin/env python3
"""Writes the files below deploy/ and grafana/ that are made from others, or checks them with --check.

Kustomize reads no file outside the folder that names it, and a PrometheusRule holds its rules; so what cannot be
shared by reference is written from its source here, and a test runs the check. The Helm chart needs nothing: its
folder `files` links to the sources.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = "# Made by deploy/generate.py from {source}; do not edit.\n"
RULES = "deploy/prometheus/rules/sluice.rules.yml"
FLEET_RULES = "deploy/prometheus/rules/sluice-fleet.rules.yml"
NODE_RULES = "deploy/prometheus/multi-node/multi-node.rules.yml"
NODE_ALERTS = "deploy/prometheus/multi-node/multi-node-alerts.rules.yml"
DASHBOARDS = "grafana/dashboards"
CATALOGUE = "plugin/vllm_sluice/telemetry/catalogue.py"


def prometheus_rule(name: str, source: str, rules: str) -> str:
    """Return rules, which are the text of a rule file, as an object of the Prometheus operator."""
    spec = "".join(f"  {line}\n" if line else "\n" for line in rules.splitlines())
    return (
        MADE.format(source=source)
        + f"apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: {name}\nspec:\n{spec}"
    )


def dashboards(names: list[str]) -> str:
    """Return the kustomization that makes one ConfigMap of each dashboard, for Grafana's dashboard sidecar."""
    text = (
        MADE.format(source=DASHBOARDS)
        + "# A root of its own, so that deploy/kustomize can use the dashboards without a copy.\n"
        + "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\ngeneratorOptions:\n"
        + '  disableNameSuffixHash: true\n  labels:\n    grafana_dashboard: "1"\n'
        + "  annotations:\n    grafana_folder: Sluice\nconfigMapGenerator:\n"
    )
    return text + "".join(f"  - name: {name}\n    files:\n      - dashboards/{name}.json\n" for name in names)


def node_rules() -> str:
    """Return recording rules that combine the parts of one server on several machines as the catalogue says."""
    from vllm_sluice.telemetry.catalogue import CATALOGUE as METRICS

    text = MADE.format(source=CATALOGUE) + NODE_RULES_ABOUT + "groups:\n  - name: sluice.multi-node\n    rules:\n"
    for metric in METRICS:
        if metric.group in ("patch", "monitor"):  # about one machine's ranks, or about the server as a whole
            continue
        how = {"mean": "avg"}.get(metric.combine, metric.combine)
        by = ", ".join(("server", "model_name", "engine", *metric.labels))
        if metric.kind == "counter":
            record = f"server_engine:{metric.name.removesuffix('_total')}:rate5m_{how}"
            expression = f"{how} by ({by}) (rate({metric.name}[5m]))"
        else:
            record = f"server_engine:{metric.name}:{how}"
            expression = f"{how} by ({by}) ({metric.name})"
        text += f"      - record: {record}\n        expr: {selected(expression)}\n"
    return text


NODE_RULES_ABOUT = """\
# For servers whose ranks run on several machines, each scraped by itself (`sluice exporter`). Every target of such a
# server needs the same label `server`; targets without it are left alone. docs/deploy.md says how.
"""


def selected(expression: str) -> str:
    """Limit the one metric of an expression to targets with the label `server`."""
    matcher = '{server!=""}'
    if "[5m]" in expression:
        return expression.replace("[5m]", f"{matcher}[5m]")
    return f"{expression.removesuffix(')')}{matcher})"


def made() -> Iterator[tuple[str, str]]:
    """Yield path and text of every file whose sources are there."""
    combined = node_rules()
    yield NODE_RULES, combined
    operator, node = "components/prometheus-operator/prometheusrule", "components/multi-node-rules/prometheusrule"
    for path, name, source, rules in (
        (node, "sluice-multi-node", NODE_RULES, combined),
        (f"{node}-alerts", "sluice-multi-node-alerts", NODE_ALERTS, (ROOT / NODE_ALERTS).read_text()),
        (operator, "sluice", RULES, (ROOT / RULES).read_text()),
        (f"{operator}-fleet", "sluice-fleet", FLEET_RULES, (ROOT / FLEET_RULES).read_text()),
    ):
        yield f"deploy/kustomize/{path}.yaml", prometheus_rule(name, source, rules)
    names = sorted(path.stem for path in (ROOT / DASHBOARDS).glob("*.json"))
    yield "grafana/kustomization.yaml", dashboards(names)


def main() -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if a file would change")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT / "plugin"))
    stale = []
    for name, text in made():
        path = ROOT / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'not up to date; run deploy/generate.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
