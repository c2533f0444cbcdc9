"""Whether Kubernetes and the Prometheus operator would know the fields of an object."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import FOLDER, missing, run, tool

VERSIONS = ("1.27", "1.32", "1.37")
"""Kubernetes whose schemas the objects are checked against: the oldest that the chart admits, and later ones."""

_MODELS = FOLDER / "node/node_modules/@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1"
_CHECK = """
const [models, text] = process.argv.slice(1);
for (const object of JSON.parse(text)) {
  const module = await import(`file://${models}/${object.kind}.js`);
  try {
    new module[object.kind](object).validate();
  } catch (error) {
    console.log(`${object.kind}/${object.metadata.name}: ${error.message}`);
  }
}
"""

# The operator's npm models take unknown fields, so those that are used here are listed; None ends the comparison.
_ENDPOINT = {
    "port": None, "path": None, "interval": None, "scrapeTimeout": None,
    "relabelings": {
        "sourceLabels": None, "separator": None, "targetLabel": None, "regex": None, "replacement": None,
        "action": None,
    },
}  # fmt: skip
_RULE = {"alert": None, "record": None, "expr": None, "for": None, "keep_firing_for": None, "labels": None,
         "annotations": None}  # fmt: skip
_SPECS: dict[str, dict[str, Any]] = {
    "PodMonitor": {"selector": {"matchLabels": None}, "podMetricsEndpoints": _ENDPOINT},
    "PrometheusRule": {"groups": {"name": None, "interval": None, "rules": _RULE}},
}


def problems(objects: Iterable[dict[str, Any]], folder: Path, versions: Iterable[str] = VERSIONS) -> list[str]:
    """Return what is wrong with objects; `folder` is for files in between."""
    known = [o for o in objects if not o["apiVersion"].startswith("monitoring.coreos.com/")]
    operator = [o for o in objects if o["apiVersion"].startswith("monitoring.coreos.com/")]
    found = _of_operator(operator) if operator else []
    file = folder / "objects.yaml"
    file.write_text(yaml.safe_dump_all(known))
    for version in versions if known else ():
        done = run(tool("kubernetes-validate"), "--strict", "--quiet", "--no-warn", "-k", version, file)
        if done.returncode != 0:
            found.append(f"{version}: {done.stdout}{done.stderr}")
    return found


def _of_operator(objects: list[dict[str, Any]]) -> list[str]:
    if not _MODELS.is_dir():
        missing("@kubernetes-models/prometheus-operator is not here: run deploy/tools.sh with npm installed")
    done = subprocess.run(
        [tool("node"), "--input-type=module", "--eval", _CHECK, "--", _MODELS, json.dumps(objects)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    unknown = [
        f"{o['kind']}/{o['metadata']['name']}: unknown field {path}"
        for o in objects
        for path in _unknown(o["spec"], _SPECS[o["kind"]], "spec")
    ]
    return done.stdout.splitlines() + unknown


def _unknown(value: Any, allowed: dict[str, Any] | None, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _unknown(item, allowed, path)
    elif isinstance(value, dict) and allowed is not None:
        for key, below in value.items():
            if key in allowed:
                yield from _unknown(below, allowed[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
