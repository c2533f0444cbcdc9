"""`sluice stack` without vLLM: what is refused, what is started with which settings, and a clean end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, need_program
from tests.serving.server import get
from tests.unit.test_cli_demo import RUNNER, SERVER, free_port, machine, model, runs, wait_for  # noqa: F401
from vllm_sluice import cli
from vllm_sluice.stack import grafana, prometheus, run, server

DEPLOY = ROOT / "deploy" / "prometheus"

# Stands in for grafana-server: says how it was started, and answers.
GRAFANA = """#!{python}
import http.server, json, os, sys
settings = {{k: v for k, v in os.environ.items() if k.startswith("GF_")}}
open("{report}", "w").write(json.dumps({{"arguments": sys.argv[1:], "settings": settings}}))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

address = (settings["GF_SERVER_HTTP_ADDR"], int(settings["GF_SERVER_HTTP_PORT"]))
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture
def dashboards(tmp_path) -> Path:
    folder = tmp_path / "dashboards"
    folder.mkdir()
    (folder / "sluice-overview.json").write_text("{}")
    return folder


@pytest.fixture
def programs(tmp_path) -> Path:
    """Return a folder with the real Prometheus and nothing else, to be the whole PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "prometheus").symlink_to(need_program("prometheus", "prometheus"))
    return folder


@pytest.fixture
def whole(tmp_path, model, dashboards, programs):  # noqa: F811
    """Start the stack with a stand-in for the server; return the process, whose output is a file."""
    processes = []
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    (tmp_path / "server.py").write_text(SERVER)

    def start(*arguments: str):
        out = (tmp_path / "out").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", RUNNER, str(tmp_path / "server.py"), "stack", model,
             "--port", str(free_port()), "--dashboards", str(dashboards), *arguments],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch), "PATH": str(programs)},
        )  # fmt: skip
        processes.append(process)
        process.text = lambda: (tmp_path / "out").read_text()
        process.scratch = scratch
        return process

    yield start
    for process in processes:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def url_of(name: str, text: str) -> str:
    found = re.search(rf"^  {name} +(http://127\.0\.0\.1:\d+)", text, re.MULTILINE)
    assert found, text
    return found[1]


def alertmanagers(prometheus: str) -> list[str]:
    answer = json.loads(get(f"{prometheus}/api/v1/alertmanagers"))
    return [one["url"] for one in answer["data"]["activeAlertmanagers"]]


# ---------------------------------------------------------------------------------------------- what is refused
def test_a_missing_prometheus_is_one_line(machine, model, dashboards, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["stack", model, "--dashboards", str(dashboards)]) == 1
    assert capsys.readouterr().err == (
        "sluice: Prometheus is not installed; on Debian: apt-get install prometheus prometheus-alertmanager\n"
    )


def test_a_folder_without_rules_is_one_line(machine, model, dashboards, tmp_path, capsys):  # noqa: F811
    assert cli.main(["stack", model, "--deploy", str(tmp_path), "--dashboards", str(dashboards)]) == 1
    assert f"{tmp_path} has no rules/*.yml; --deploy takes a folder like deploy/prometheus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "{0} has no prometheus.yml; --deploy takes a folder like deploy/prometheus of Sluice's repository"),
        ("rule_files: [", "{0}/prometheus.yml cannot be read: "),
        ("\xff", "{0}/prometheus.yml cannot be read: "),
        ("", "{0}/prometheus.yml has no settings of Prometheus; "),
        ("scrape_configs: [{job_name: vllm}]", "{0}/prometheus.yml has None as rule_files; it takes a list, such as"),
        ("rule_files: rules/*.yml", "{0}/prometheus.yml has 'rules/*.yml' as rule_files; it takes a list, such as"),
        ("rule_files: [rules/*.yml]", "{0}/prometheus.yml has None as scrape_configs; it takes a list, such as"),
        ("rule_files: [rules/*.yml]\nscrape_configs: [vllm]", "has ['vllm'] as scrape_configs; it takes a list"),
        ("rule_files: [rules/*.yml]\nscrape_configs: [{job_name: vllm}]\nglobal: [15s]", "has ['15s'] as global;"),
        ("rule_files: [rule/*.yml]\nscrape_configs: [{job_name: vllm}]",
         "rule_files of {0}/prometheus.yml names no file that exists: {0}/rule/*.yml; mend it"),
    ],
)  # fmt: skip
def test_settings_that_the_stack_cannot_use_are_told_before_anything_starts(
    machine, model, dashboards, tmp_path, capsys, monkeypatch, text, found  # noqa: F811
):
    monkeypatch.setattr(server, "start", lambda *_: pytest.fail("the server was started"))
    deploy = tmp_path / "deploy"
    shutil.copytree(DEPLOY / "rules", deploy / "rules")
    if text is not None:
        (deploy / "prometheus.yml").write_text(text, encoding="latin-1")
    arguments = ["stack", model, "--port", str(free_port()), "--deploy", str(deploy), "--dashboards", str(dashboards)]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("sluice: ")
    assert found.format(deploy) in err


def test_alertmanager_without_settings_is_told_before_anything_starts(
    machine, model, dashboards, programs, tmp_path, capsys, monkeypatch  # noqa: F811
):
    monkeypatch.setattr(server, "start", lambda *_: pytest.fail("the server was started"))
    (programs / "alertmanager").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(programs))
    deploy = tmp_path / "deploy"
    shutil.copytree(DEPLOY / "rules", deploy / "rules")
    shutil.copy(DEPLOY / "prometheus.yml", deploy)
    arguments = ["stack", model, "--port", str(free_port()), "--deploy", str(deploy), "--dashboards", str(dashboards)]
    assert cli.main(arguments) == 1
    assert f"{deploy} has no alertmanager.yml, and Alertmanager is installed ({programs}" in capsys.readouterr().err


def test_an_installed_package_asks_for_the_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "_CHECKOUT", tmp_path)
    with pytest.raises(run.Problem, match="no checkout of Sluice, so deploy/prometheus must be named: --deploy FOLDER"):
        run.folder(None, run._DEPLOY, "rules/*.yml", "--deploy")
    assert run.folder(DEPLOY, run._DEPLOY, "rules/*.yml", "--deploy") == DEPLOY


def test_a_taken_port_is_one_line(machine, model, dashboards, capsys):  # noqa: F811
    need_program("prometheus", "prometheus")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["stack", model, "--port", str(port), "--dashboards", str(dashboards)]) == 1
    assert capsys.readouterr().err.startswith(f"sluice: port {port} is taken; ")


# ---------------------------------------------------------------------------------------------- the whole
def test_all_are_started_connected_and_stopped(whole, programs, tmp_path):
    (programs / "prometheus-alertmanager").symlink_to(
        need_program("prometheus-alertmanager", "prometheus-alertmanager"))
    report = tmp_path / "grafana.json"
    (programs / "grafana-server").write_text(GRAFANA.format(python=sys.executable, report=report))
    (programs / "grafana-server").chmod(0o755)
    process = whole()
    wait_for(lambda: "Ctrl-C stops everything" in process.text() or process.poll() is not None, 90)
    text = process.text()
    assert "twin is being served and watched:" in text
    assert "is not installed" not in text

    monitor, manager, boards = (url_of(name, text) for name in ("Prometheus", "Alertmanager", "Grafana"))
    wait_for(lambda: alertmanagers(monitor) == [f"{manager}/api/v2/alerts"])
    groups = json.loads(get(f"{monitor}/api/v1/rules"))["data"]["groups"]
    shipped = [g for path in (DEPLOY / "rules").glob("*.yml") for g in yaml.safe_load(path.read_text())["groups"]]
    assert {g["name"]: len(g["rules"]) for g in groups} == {g["name"]: len(g["rules"]) for g in shipped}

    said = json.loads(report.read_text())
    provisioned = Path(said["settings"]["GF_PATHS_PROVISIONING"])
    source = json.loads((provisioned / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert (source["url"], source["type"], source["uid"]) == (monitor, "prometheus", "prometheus")
    assert source["jsonData"]["timeInterval"] == yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["global"][
        "scrape_interval"]
    provider = json.loads((provisioned / "dashboards" / "sluice.yaml").read_text())["providers"][0]
    assert [path.name for path in Path(provider["options"]["path"]).iterdir()] == ["sluice-overview.json"]
    assert boards.endswith(f":{said['settings']['GF_SERVER_HTTP_PORT']}")
    assert said["arguments"][0].startswith("--homepath=")

    children = [int(p) for p in re.findall(r"\d+", subprocess.run(
        ["/usr/bin/pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout)]
    assert len(children) == 4
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not any(runs(pid) for pid in children)
    assert list(process.scratch.glob("sluice-stack-*")) == []


def test_it_says_what_is_missing(whole):
    process = whole()
    wait_for(lambda: "Ctrl-C stops everything" in process.text() or process.poll() is not None, 90)
    text = process.text()
    assert "Alertmanager is not installed, so nobody is told; apt-get install prometheus-alertmanager" in text
    assert "Grafana is not installed (no grafana-server on PATH)" in text
    assert alertmanagers(url_of("Prometheus", text)) == []
    wait_for(lambda: "alerts: none" in process.text())


def test_settings_that_prometheus_refuses_end_it_with_the_reason(whole, tmp_path):
    deploy = tmp_path / "deploy"
    shutil.copytree(DEPLOY / "rules", deploy / "rules")
    shutil.copy(DEPLOY / "prometheus.yml", deploy)
    rules = deploy / "rules" / "sluice.rules.yml"
    rules.write_text(rules.read_text().replace("max by (", "max bye (", 1))
    process = whole("--deploy", str(deploy))
    assert process.wait(90) == 1
    assert "sluice: the prometheus ended with status 1: " in process.text()
    assert 'unexpected identifier \\"bye\\"' in process.text()


# ---------------------------------------------------------------------------------------------- the parts
def test_rules_are_named_from_anywhere_and_alerting_only_where_it_is():
    settings = prometheus.aimed(prometheus.read(Path(os.path.relpath(DEPLOY))), "127.0.0.1:8001", None)
    assert settings["rule_files"] == [str(DEPLOY / "rules" / "*.yml")]
    assert settings["scrape_configs"][0]["static_configs"] == [{"targets": ["127.0.0.1:8001"]}]
    assert settings["scrape_configs"][0]["sample_limit"] > 0
    assert "alerting" not in settings


def test_settings_may_be_short_and_hold_a_date(tmp_path, monkeypatch):
    (tmp_path / "a.yml").write_text("groups: []\n")
    (tmp_path / "prometheus.yml").write_text(
        f"rule_files: [{tmp_path}/a.yml]\nscrape_configs: [{{job_name: vllm, params: {{since: [2026-11-21]}}}}]\n"
    )
    settings = prometheus.read(tmp_path)
    assert prometheus.scrape_interval(settings) == "1m"
    monkeypatch.setattr(prometheus, "program", lambda _: "prometheus")
    monkeypatch.setattr(prometheus, "Child", lambda *_: None)
    prometheus.start(prometheus.aimed(settings, "127.0.0.1:8001", None), tmp_path)
    written = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert written["scrape_configs"][0]["params"] == {"since": ["2026-11-21"]}


def test_grafanas_other_name_takes_a_subcommand(monkeypatch, tmp_path):
    started = {}
    monkeypatch.setattr(grafana, "installed", lambda: "/opt/grafana/bin/grafana")
    monkeypatch.setattr(grafana, "_HOME", tmp_path / "none")
    monkeypatch.setattr(grafana, "Child", lambda name, command, log, environ: started.update(command=command))
    grafana.start(tmp_path, "http://127.0.0.1:9090", "15s", tmp_path)
    assert started["command"] == ["/opt/grafana/bin/grafana", "server", "--homepath=/opt/grafana"]
