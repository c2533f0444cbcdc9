"""The Helm chart.

helm itself cannot be had from the registries that the tests use, so the templates are rendered by a stand-in on the
same template engine (`chart_render`), and by helm where it is installed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from tests.deploy.kubernetes import problems
from tests.deploy.tools import DASHBOARDS, DEPLOY, FOLDER, KUSTOMIZE, RULES, built, need_sources, one, output, run, tool

CHART = DEPLOY / "helm/sluice"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
RENDERER = Path(__file__).parent / "chart_render"
OPERATOR = {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")}


def values(**changes: Any) -> dict[str, Any]:
    """Return the chart's values with changes, merged as helm merges."""

    def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
        both = [key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)]
        return {**below, **above, **{key: merge(below[key], above[key]) for key in both}}

    return merge(yaml.safe_load((CHART / "values.yaml").read_text()), changes)


@pytest.fixture(scope="session")
def renderer(tmp_path_factory) -> str:
    program = tmp_path_factory.mktemp("chart_render") / "chart_render"
    offline = {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": "-mod=mod", "GOCACHE": str(FOLDER / "go-cache")}
    environment = {**os.environ, **offline}
    output(tool("go"), "build", "-o", program, ".", cwd=RENDERER, env=environment)
    return str(program)


@pytest.fixture(params=["stand-in", "helm"] if shutil.which("helm") else ["stand-in"])
def render(request, renderer, tmp_path):
    """Return what renders the chart: the stand-in, and helm where it is."""

    def by_stand_in(**changes: Any) -> list[dict[str, Any]]:
        chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
        context = {
            "Values": values(**changes),
            "Release": {"Name": "sluice", "Namespace": "default", "Service": "Helm"},
            "Chart": {"Name": chart["name"], "Version": chart["version"]},
        }
        return [o for o in yaml.safe_load_all(output(renderer, CHART, input=json.dumps(context))) if o]

    def by_helm(**changes: Any) -> list[dict[str, Any]]:
        file = tmp_path / "values.json"
        file.write_text(json.dumps(changes))
        output("helm", "lint", "--strict", CHART, "--values", file)
        return [o for o in yaml.safe_load_all(output("helm", "template", "sluice", CHART, "--values", file)) if o]

    return by_stand_in if request.param == "stand-in" else by_helm


EVERYTHING: dict[str, Any] = {
    **OPERATOR,
    "podMonitor": {"enabled": True, "labels": {"release": "kube-prometheus-stack"}},
    "scrapeAnnotations": True,
    "args": ["--max-model-len", "4096"],
    "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
    "image": {"pullSecrets": [{"name": "registry"}]},
    "nodeSelector": {"gpu": "true"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "modelCacheClaim": "models",
    "config": {"patches": {"gate": {"enabled": False}}},
}


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_it_renders_and_every_field_is_known(render, changes, tmp_path):
    need_sources()
    assert jsonschema_rs.validator_for(SCHEMA).is_valid(values(**changes))
    assert problems(render(**changes), tmp_path) == []


def test_the_pod_is_that_of_the_kustomization(render):
    need_sources()
    chart = one(render(), "Deployment", "sluice")["spec"]
    base = copy.deepcopy(one(built(KUSTOMIZE / "base"), "Deployment", "sluice")["spec"])
    container = chart["template"]["spec"]["containers"][0]
    assert container.pop("imagePullPolicy") == "IfNotPresent"
    assert chart == base


def test_settings_and_service_are_those_of_the_kustomization(render):
    need_sources()
    objects = render()
    for kind, name in (("ConfigMap", "sluice-config"), ("Service", "sluice")):
        ours, theirs = one(objects, kind, name), one(built(KUSTOMIZE / "base"), kind, name)
        if kind == "ConfigMap":
            ours, theirs = (yaml.safe_load(o["data"]["sluice.yaml"]) for o in (ours, theirs))
        else:
            ours, theirs = ours["spec"], theirs["spec"]
        assert ours == theirs


def test_options_arrive(render):
    need_sources()
    objects = render(**EVERYTHING)
    pod = one(objects, "Deployment", "sluice")["spec"]["template"]
    container = pod["spec"]["containers"][0]
    assert container["args"][-2:] == ["--max-model-len", "4096"]
    assert container["env"][-1] == {"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == "8000"
    assert {"name": "model-cache", "persistentVolumeClaim": {"claimName": "models"}} in pod["spec"]["volumes"]
    settings = yaml.safe_load(one(objects, "ConfigMap", "sluice-config")["data"]["sluice.yaml"])
    assert settings["patches"]["gate"]["enabled"] is False
    assert one(objects, "PodMonitor", "sluice")["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_rules_and_dashboards_are_the_sources(render):
    """What looks like a template in the rules, {{ $labels }}, must arrive as it is."""
    need_sources()
    objects = render(**OPERATOR)
    rule = one(objects, "PrometheusRule", "sluice")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    assert "{{ $labels" in yaml.safe_dump(rule)
    found = {k: v for o in objects if o["kind"] == "ConfigMap" for k, v in o["data"].items() if k.endswith(".json")}
    assert {k: json.loads(v) for k, v in found.items()} == {
        file.name: json.loads(file.read_text()) for file in DASHBOARDS.glob("*.json")
    }


def test_the_sources_are_linked_and_not_copied():
    for link, source in (("dashboards", DASHBOARDS), ("sluice.rules.yml", RULES)):
        path = CHART / "files" / link
        assert path.is_symlink()
        assert not path.readlink().is_absolute()
        assert path.parent.joinpath(path.readlink()).resolve() == source


@pytest.mark.parametrize(
    "changes",
    [
        {"modle": "x"},
        {"model": ""},
        {"replicas": "two"},
        {"podMonitor": {"interval": "15 sec"}},
        {"podMonitor": {"enabeld": True}},
        {"sharedMemory": "8 GB"},
        {"resources": {"limits": {"memory": 48}}},
        {"adminToken": {"secret": None}},
    ],
    ids=str,
)
def test_the_schema_refuses_wrong_values(changes):
    assert not jsonschema_rs.validator_for(SCHEMA).is_valid(values(**changes))


def test_the_stand_in_refuses_a_value_that_is_not_there(renderer, tmp_path):
    shutil.copytree(CHART, tmp_path / "chart", symlinks=True, ignore=shutil.ignore_patterns("files"))
    service = tmp_path / "chart/templates/service.yaml"
    service.write_text(service.read_text().replace(".Release.Name", ".Release.Nmae", 1))
    context = {"Values": values(), "Release": {"Name": "s", "Service": "Helm"}, "Chart": {"Name": "s", "Version": "1"}}
    done = run(renderer, tmp_path / "chart", input=json.dumps(context))
    assert done.returncode == 1
    assert "Nmae" in done.stderr
