"""The whole way of an alert: /metrics, a real Prometheus, a real Alertmanager, a webhook; and what inhibits what.

Rules, routes and inhibitions are the shipped ones; only times are shortened and receivers replaced.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.alerts.exporter import Exporter, Values, running, served
from tests.alerts.rules import DEPLOY, RULES, RUNBOOK_URL
from tests.alerts.test_rules import VLLM
from tests.conftest import need_program
from tests.serving.server import Child, free_port, get

LAYERS = ("000", "001", "002", "003")
SHORT = {"group_wait": "1s", "group_interval": "1s", "repeat_interval": "1h"}


@dataclass
class Webhook:
    """Keeps what Alertmanager sends: receiver, alert name, status and the alert."""

    received: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)

    def take(self, receiver: str, body: bytes) -> None:
        for alert in json.loads(body)["alerts"]:
            self.received.append((receiver, alert["labels"]["alertname"], alert["status"], alert))

    def has(self, receiver: str, name: str, status: str = "firing") -> bool:
        return (receiver, name, status) in [entry[:3] for entry in self.received]


@dataclass
class AlertPath:
    """All that runs, and the values behind /metrics."""

    values: Values
    webhook: Webhook
    alertmanager: str
    prometheus: str

    def states(self) -> dict[str, str]:
        """Return `active` or `suppressed` of every alert that Alertmanager has."""
        found = json.loads(get(f"{self.alertmanager}/api/v2/alerts"))
        return {alert["labels"]["alertname"]: alert["status"]["state"] for alert in found}

    def description(self, name: str) -> str:
        """Return what Prometheus now says of an alert that fires; empty if it does not."""
        alerts = json.loads(get(f"{self.prometheus}/api/v1/alerts"))["data"]["alerts"]
        found = [a["annotations"]["description"] for a in alerts if a["labels"]["alertname"] == name]
        return found[0] if found else ""

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not happen; Alertmanager has {self.states()}"
            time.sleep(0.3)


def shortened_rules(folder: Path) -> Path:
    tree = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for group in tree["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "2s"
            rule["expr"] = rule["expr"].replace("[10m:30s]", "[10s:1s]").replace("ratio[2m]", "ratio[2s]")
            if "keep_firing_for" in rule:
                rule["keep_firing_for"] = "1s"
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def prometheus_config(folder: Path, target: str, alertmanager: str) -> Path:
    tree = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    tree["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    tree["rule_files"] = [str(shortened_rules(folder))]
    tree["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    tree["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def alertmanager_config(folder: Path, webhook: str) -> Path:
    tree = yaml.safe_load((DEPLOY / "alertmanager.yml").read_text(encoding="utf-8"))
    for route in (tree["route"], *tree["route"]["routes"]):
        route.update(SHORT)
    for receiver in tree["receivers"]:
        receiver["webhook_configs"] = [{"url": f"{webhook}/{receiver['name']}"}]
    path = folder / "alertmanager.yml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Iterator[AlertPath]:
    prometheus = need_program("prometheus", "prometheus")
    alertmanager = need_program("prometheus-alertmanager", "prometheus-alertmanager")
    ports = [free_port() for _ in range(4)]
    target, hook, manager, monitor = (f"127.0.0.1:{port}" for port in ports)
    webhook = Webhook()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            webhook.take(self.path.strip("/"), self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    values: Values = {
        "sluice_serving_dtype_max": {(): 65504.0},
        "sluice_activation_abs_max": {(layer,): 10.0 for layer in LAYERS},
        "sluice_baseline_activation_abs_max": {(layer,): 10.0 for layer in LAYERS},
        "sluice_nonfinite_total": {(layer,): 0.0 for layer in LAYERS},
        "sluice_start_tokens_observed_total": {(): 100.0},
        "vllm:num_requests_running": {(): 1.0},
    }
    environment = dict(os.environ)
    children = []
    with served(Exporter(VLLM, values), ports[0]), running(ThreadingHTTPServer(("127.0.0.1", ports[1]), Hook)):
        try:
            children.append(Child(
                [alertmanager, f"--config.file={alertmanager_config(tmp_path, f'http://{hook}')}",
                 f"--storage.path={tmp_path / 'alertmanager'}", f"--web.listen-address={manager}",
                 "--cluster.listen-address="],
                tmp_path / "alertmanager.log", environment,
            ))  # fmt: skip
            children.append(Child(
                [prometheus, f"--config.file={prometheus_config(tmp_path, target, manager)}",
                 f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={monitor}"],
                tmp_path / "prometheus.log", environment,
            ))  # fmt: skip
            whole = AlertPath(values, webhook, f"http://{manager}", f"http://{monitor}")
            wait_until_ready(children, [f"http://{manager}/-/ready", f"http://{monitor}/-/ready"])
            yield whole
        finally:
            for child in children:
                child.stop(20)


def wait_until_ready(children: list[Child], urls: list[str]) -> None:
    end = time.monotonic() + 60
    for url in urls:
        while True:
            try:
                get(url, timeout=2)
                break
            except OSError:
                assert all(child.process.poll() is None for child in children), [child.tail() for child in children]
                assert time.monotonic() < end, [child.tail() for child in children]
                threading.Event().wait(0.2)


def test_an_alert_reaches_the_webhook_and_the_worse_one_silences_it(path: AlertPath) -> None:
    query = urllib.parse.quote("model_engine:sluice_drifted_layers:count == 0")
    path.until(lambda: bool(json.loads(get(f"{path.prometheus}/api/v1/query?query={query}"))["data"]["result"]),
               "a healthy start")  # fmt: skip
    assert path.states() == {}

    # Three layers leave the baseline: a ticket, with all that a person needs.
    path.values["sluice_activation_abs_max"] = {(layer,): 50.0 for layer in LAYERS}
    path.until(lambda: path.webhook.has("tickets", "SluiceActivationDrift"), "the ticket for drift")
    alert = next(entry[3] for entry in path.webhook.received)
    assert alert["labels"]["severity"] == "warning"
    assert alert["annotations"]["runbook_url"] == RUNBOOK_URL.format("SluiceActivationDrift")
    assert alert["annotations"]["dashboard_url"].startswith("/d/sluice-layers?var-job=vllm&var-instance=127.0.0.1%3A")
    assert "&var-model_name=org%2Fmodel&var-engine=0&viewPanel=" in alert["annotations"]["dashboard_url"]
    assert "In 4 layers of org/model (engine 0, " in alert["annotations"]["description"]
    # The worst layer is named by a query of its own, which finds nothing where the scrape just before came too late:
    # Prometheus writes the text anew in every round, the webhook has that of one.
    path.until(lambda: "at 5.00 times its baseline." in path.description("SluiceActivationDrift"), "the worst layer")

    # One comes near float16's largest number: a page, and drift is no news any more.
    path.until(lambda: path.states() == {"SluiceActivationDrift": "active"}, "drift alone")
    path.values["sluice_activation_abs_max"] = {(layer,): 40000.0 for layer in LAYERS}
    path.until(lambda: path.webhook.has("pager", "SluiceServingRangeSaturated"), "the page for saturation")
    saturated = {"SluiceActivationDrift": "suppressed", "SluiceServingRangeSaturated": "active"}
    path.until(lambda: path.states() == saturated, "the inhibition of drift")

    # NaN: the worst silences both.
    path.values["sluice_nonfinite_total"] = {(layer,): 7.0 for layer in LAYERS}
    path.until(lambda: path.webhook.has("pager", "SluiceNonFiniteValues"), "the page for NaN")
    nonfinite = dict.fromkeys(saturated, "suppressed") | {"SluiceNonFiniteValues": "active"}
    path.until(lambda: path.states() == nonfinite, "the inhibition of saturation")

    # Nothing went to a receiver that is not meant.
    assert {(receiver, name) for receiver, name, _, _ in path.webhook.received} == {
        ("tickets", "SluiceActivationDrift"),
        ("pager", "SluiceServingRangeSaturated"),
        ("pager", "SluiceNonFiniteValues"),
    }

    # Back to normal but for NaN, which stays for five minutes: the others end.
    path.values["sluice_activation_abs_max"] = {(layer,): 10.0 for layer in LAYERS}
    path.until(lambda: path.states() == {"SluiceNonFiniteValues": "active"}, "the end of the others")
