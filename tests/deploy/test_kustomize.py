"""The kustomizations: built by kustomize and checked against the schemas of Kubernetes and the Prometheus operator."""

from __future__ import annotations

import copy
import shutil

import pytest
import yaml

from tests.deploy.kubernetes import problems
from tests.deploy.tools import DASHBOARDS, KUSTOMIZE, ROOT, RULES, built, need_sources, one, output, run, tool
from vllm_sluice import cli, config
from vllm_sluice.control.journal import stamp

PLAIN = ("base", "overlays/annotations", "overlays/cpu", "overlays/multi-node")
OPERATOR = "overlays/prometheus-operator"
NODE_RULES = "components/multi-node-rules"


@pytest.mark.parametrize("name", [*PLAIN, OPERATOR, NODE_RULES])
def test_it_builds_and_every_field_is_known(name, tmp_path):
    if name == OPERATOR:
        need_sources()
    assert problems(built(KUSTOMIZE / name), tmp_path) == []


def test_kubectl_builds_the_same():
    for name in PLAIN:
        other = output(tool("kubectl"), "kustomize", KUSTOMIZE / name)
        assert tuple(yaml.safe_load_all(other)) == built(KUSTOMIZE / name)


def test_a_misspelt_field_of_a_deployment_is_found(tmp_path):
    deployment = copy.deepcopy(one(built(KUSTOMIZE / "base"), "Deployment", "sluice"))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    (found,) = problems([deployment], tmp_path, versions=["1.32"])
    assert "readynessProbe" in found


@pytest.mark.parametrize(
    ("key", "value", "said"), [("interval", "15 sec", "interval"), ("intervall", "15s", "unknown field")]
)
def test_a_fault_in_a_pod_monitor_is_found(tmp_path, key, value, said):
    need_sources()
    monitor = copy.deepcopy(one(built(KUSTOMIZE / OPERATOR), "PodMonitor", "sluice"))
    monitor["spec"]["podMetricsEndpoints"][0][key] = value
    (found,) = problems([monitor], tmp_path)
    assert said in found


def test_a_wrong_patch_target_stops_the_build(tmp_path):
    shutil.copytree(KUSTOMIZE, tmp_path / "k")
    patch = tmp_path / "k/components/cpu/kustomization.yaml"
    patch.write_text(patch.read_text().replace("requests/nvidia.com~1gpu", "requests/nvidia.com~1gpus"))
    assert "nonexistent key" in run(tool("kustomize"), "build", tmp_path / "k/overlays/cpu").stderr


# ---------------------------------------------------------------------------------------------- what is in them
def test_the_server_runs_without_privileges():
    for name in PLAIN:
        for workload in (o for o in built(KUSTOMIZE / name) if o["kind"] in ("Deployment", "StatefulSet")):
            pod = workload["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (2000, 0)
            assert not pod["automountServiceAccountToken"]
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert "memory" in container["resources"]["limits"]


def test_an_edited_config_map_reaches_the_server():
    """A mounted directory is renewed by the kubelet, a subPath never; a hashed name would restart the pod instead."""
    objects = built(KUSTOMIZE / "base")
    pod = one(objects, "Deployment", "sluice")["spec"]["template"]["spec"]
    mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "config")
    assert "subPath" not in mount
    variable = next(e for e in pod["containers"][0]["env"] if e["name"] == "SLUICE_CONFIG")
    assert variable["value"] == f"{mount['mountPath']}/sluice.yaml"
    assert next(v for v in pod["volumes"] if v["name"] == "config")["configMap"]["name"] == "sluice-config"


def test_the_settings_of_the_server_are_good(tmp_path):
    file = tmp_path / "sluice.yaml"
    file.write_text(one(built(KUSTOMIZE / "base"), "ConfigMap", "sluice-config")["data"]["sluice.yaml"])
    config.load(file, environ={})


def test_what_kubernetes_sets_for_the_service_is_no_setting():
    """A Service called sluice puts SLUICE_SERVICE_HOST and others into pods that ask for service links."""
    config.load(environ={"SLUICE_SERVICE_HOST": "10.0.0.1", "SLUICE_PORT_8000_TCP": "tcp://10.0.0.1:8000"})


def test_selectors_match_the_pods():
    for name in PLAIN:
        objects = built(KUSTOMIZE / name)
        pods = {
            o["metadata"]["name"]: o["spec"]["template"]["metadata"]["labels"]
            for o in objects if o["kind"] in ("Deployment", "StatefulSet")
        }  # fmt: skip
        for service in (o for o in objects if o["kind"] == "Service"):
            selected = [pod for pod, labels in pods.items() if service["spec"]["selector"].items() <= labels.items()]
            assert selected == ["sluice"], (name, service["metadata"]["name"])


def test_without_a_gpu_nothing_asks_for_one():
    text = yaml.safe_dump(one(built(KUSTOMIZE / "overlays/cpu"), "Deployment", "sluice"))
    assert "nvidia.com" not in text
    assert "image: sluice:cpu" in text


def test_annotations_name_the_port_of_the_server():
    template = one(built(KUSTOMIZE / "overlays/annotations"), "Deployment", "sluice")["spec"]["template"]
    port = template["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port)


def test_rules_of_the_operator_are_those_of_prometheus():
    need_sources()
    rule = one(built(KUSTOMIZE / OPERATOR), "PrometheusRule", "sluice")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())


def test_promtool_takes_the_rules_out_of_the_object(tmp_path):
    need_sources()
    rule = one(built(KUSTOMIZE / OPERATOR), "PrometheusRule", "sluice")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"]))
    assert "SUCCESS" in output(tool("promtool"), "check", "rules", tmp_path / "rules.yml")


def test_every_dashboard_is_a_config_map_for_the_sidecar():
    need_sources()
    labelled = [o for o in built(KUSTOMIZE / OPERATOR) if "labels" in o["metadata"]]
    objects = [o for o in labelled if o["metadata"]["labels"].get("grafana_dashboard") == "1"]
    names = {file.stem for file in DASHBOARDS.glob("*.json")}
    assert {o["metadata"]["name"] for o in objects} == names
    for o in objects:
        (file, text), = o["data"].items()
        assert text == (DASHBOARDS / file).read_text()
        assert len(text.encode()) < 1 << 20  # the limit of a ConfigMap
        assert o["metadata"]["annotations"]["grafana_folder"] == "Sluice"


def test_both_nodes_load_the_same_model_and_only_the_other_node_has_an_exporter():
    objects = built(KUSTOMIZE / "overlays/multi-node")
    head = one(objects, "Deployment", "sluice")["spec"]["template"]["spec"]["containers"]
    worker = one(objects, "StatefulSet", "sluice-worker")
    containers = worker["spec"]["template"]["spec"]["containers"]
    assert [c["name"] for c in head] == ["vllm"]
    assert [c["name"] for c in containers] == ["vllm", "exporter"]
    assert head[0]["args"][0] == containers[0]["args"][0]
    assert worker["spec"]["ordinals"]["start"] == 1
    folders = {next(e["value"] for e in c["env"] if e["name"] == "SLUICE_RUN_DIR") for c in [*head, *containers]}
    assert len(folders) == 1
    assert not any("Probe" in key or key == "ports" for key in containers[0])


def test_every_port_that_is_scraped_exists():
    need_sources()
    monitor = one(built(KUSTOMIZE / OPERATOR), "PodMonitor", "sluice")
    objects = built(KUSTOMIZE / "overlays/multi-node")
    ports = {
        port["name"]
        for o in objects if o["kind"] in ("Deployment", "StatefulSet")
        for container in o["spec"]["template"]["spec"]["containers"]
        for port in container.get("ports", ())
    }  # fmt: skip
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == ports


def test_exporter_is_asked_for_things_that_it_knows():
    worker = one(built(KUSTOMIZE / "overlays/multi-node"), "StatefulSet", "sluice-worker")
    container = worker["spec"]["template"]["spec"]["containers"][1]
    args = cli._parser([]).parse_args([*container["command"][1:], *container["args"]])
    assert args.port == container["ports"][0]["containerPort"]
    assert (ROOT / "plugin/vllm_sluice/commands/exporter.py").is_file()


def test_the_kubelets_way_to_renew_a_file_is_seen(tmp_path):
    """It writes a new folder and turns the link `..data` over to it; the file is a link through that one."""
    for number, window in enumerate((60, 90)):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}/sluice.yaml").write_text(f"telemetry: {{window_seconds: {window}}}\n")
    data, file = tmp_path / "..data", tmp_path / "sluice.yaml"
    data.symlink_to("..0")
    file.symlink_to("..data/sluice.yaml")
    before = stamp(file)
    (tmp_path / "..data_tmp").symlink_to("..1")
    (tmp_path / "..data_tmp").rename(data)
    assert stamp(file) != before
    assert config.load(file, environ={}).config.telemetry.window_seconds == 90
