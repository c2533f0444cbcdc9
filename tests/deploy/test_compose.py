"""The compose file, as docker compose reads it; no engine is needed for that and none is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.deploy.tools import DASHBOARDS, DEPLOY, ROOT, need_sources, output, run, tool
from vllm_sluice import config

COMPOSE = DEPLOY / "compose"
FILE = COMPOSE / "docker-compose.yml"
PROFILES = ("gpu", "cpu")


def command(profile: str, file: Path = FILE) -> list[str | Path]:
    return [
        tool("docker-compose"), "--file", file, "--env-file", COMPOSE / ".env.example", "--profile", profile, "config",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=PROFILES)
def services(request):
    read = json.loads(output(*command(request.param), "--format", "json"))
    assert f"vllm-{request.param}" in read["services"]
    assert len(read["services"]) == 4
    return read["services"]


def test_ports_listen_on_the_loopback_interface_only(services):
    ports = [port for service in services.values() for port in service["ports"]]
    assert len(ports) == 4
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_tags_are_pinned(services):
    for service in services.values():
        tag = service["image"].rpartition(":")[2]
        assert "build" in service or (tag != "latest" and tag.lstrip("v")[0].isdigit()), service["image"]


def test_mounted_sources_exist_and_cannot_be_written(services):
    need_sources()
    for service in services.values():
        for volume in service["volumes"]:
            if volume["type"] == "bind":
                assert volume["read_only"], volume
                assert Path(volume["source"]).exists(), volume


def test_everything_is_watched_and_starts_in_order(services):
    for name, service in services.items():
        assert name.startswith("vllm-") or "healthcheck" in service  # vLLM's is in its image
    for waiting, awaited in (("grafana", "prometheus"), ("prometheus", "alertmanager")):
        assert services[waiting]["depends_on"][awaited]["condition"] == "service_healthy"


def test_capabilities_are_dropped(services):
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())


def test_the_server_answers_to_the_name_that_prometheus_asks(services):
    vllm = next(service for name, service in services.items() if name.startswith("vllm-"))
    assert vllm["networks"]["default"]["aliases"] == ["vllm"]
    targets = [
        target
        for job in yaml.safe_load((COMPOSE / "prometheus.yml").read_text())["scrape_configs"]
        for part in job["static_configs"]
        for target in part["targets"]
    ]
    assert "vllm:8000" in targets


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    healthcheck: &healthcheck", "    healthchek: &healthcheck", "additional properties 'healthchek'"),
        ("condition: service_healthy}\n    healthcheck", "condition: healthy}\n    healthcheck", "depends_on"),
        ("${GRAFANA_PORT:-3000}:3000", "${GRAFANA_PORT:-3000}:http", "Invalid containerPort: http"),
    ],
)
def test_compose_refuses_a_fault(old, new, said):
    text = FILE.read_text()
    assert text.count(old) >= 1
    faulty = COMPOSE / "faulty.docker-compose.yml"  # beside the other, for its relative paths
    faulty.write_text(text.replace(old, new))
    try:
        done = run(*command("cpu", faulty), "--quiet")
    finally:
        faulty.unlink()
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize("profile", PROFILES)
def test_the_example_of_settings_has_the_defaults(profile):
    bare = [part if part != COMPOSE / ".env.example" else "/dev/null" for part in command(profile)]
    assert output(*bare) == output(*command(profile))


def test_the_settings_of_the_server_are_good():
    config.load(COMPOSE / "sluice/sluice.yaml", environ={})


# ---------------------------------------------------------------------------------------------- Grafana's provisioning
# No official validator was found. The keys below are those of Grafana's documentation on provisioning.
SOURCE_KEYS = {"name", "uid", "type", "access", "url", "isDefault", "editable", "jsonData"}
SOURCE_SETTINGS = {
    "prometheus": {"httpMethod", "timeInterval", "manageAlerts"},
    "alertmanager": {"implementation", "handleGrafanaManagedAlerts"},
}
PROVIDER_KEYS = {"name", "folder", "folderUid", "type", "allowUiUpdates", "disableDeletion", "updateIntervalSeconds",
                 "options"}  # fmt: skip


def provisioned(kind: str) -> dict:
    files = list((COMPOSE / "grafana" / kind).glob("*.yml"))
    assert len(files) == 1
    return yaml.safe_load(files[0].read_text())


def test_data_sources_have_known_keys_and_point_at_services(services):
    read = provisioned("datasources")
    assert set(read) == {"apiVersion", "datasources"}
    assert [source["uid"] for source in read["datasources"]] == ["sluice-prometheus", "sluice-alertmanager"]
    for source in read["datasources"]:
        assert set(source) <= SOURCE_KEYS
        assert set(source["jsonData"]) == SOURCE_SETTINGS[source["type"]]
        name, _, port = source["url"].removeprefix("http://").partition(":")
        assert int(port) == services[name]["ports"][0]["target"]
    assert [source["isDefault"] for source in read["datasources"] if "isDefault" in source] == [True]


def test_the_time_interval_is_the_scrape_interval():
    interval = provisioned("datasources")["datasources"][0]["jsonData"]["timeInterval"]
    assert interval == yaml.safe_load((COMPOSE / "prometheus.yml").read_text())["global"]["scrape_interval"]


def test_dashboards_are_read_from_a_mounted_folder(services):
    need_sources()
    read = provisioned("dashboards")
    assert set(read) == {"apiVersion", "providers"}
    (provider,) = read["providers"]
    assert set(provider) <= PROVIDER_KEYS
    mounts = {volume["target"]: volume["source"] for volume in services["grafana"]["volumes"]}
    assert Path(mounts[provider["options"]["path"]]) == DASHBOARDS
    for kind in ("datasources", "dashboards"):
        assert Path(mounts[f"/etc/grafana/provisioning/{kind}"]) == COMPOSE / "grafana" / kind
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DASHBOARDS / home.relative_to(provider["options"]["path"])).is_file()


def test_dashboards_find_their_data_source():
    """By the variable `datasource`, which takes the default one, or by a uid that is provisioned."""
    need_sources()
    known = {source["uid"] for source in provisioned("datasources")["datasources"]} | {"${datasource}", "-- Grafana --"}

    def uids(value):
        if isinstance(value, dict):
            source = value.get("datasource")
            if isinstance(source, dict) and "uid" in source:
                yield source["uid"]
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from uids(item)

    for file in DASHBOARDS.glob("*.json"):
        assert set(uids(json.loads(file.read_text()))) <= known | {"grafana"}, file.relative_to(ROOT)
