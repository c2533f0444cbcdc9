"""The shipped rules: what promtool says of them, what they link to, and whether their unit tests can fail."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.alerts.conftest import Promtool
from tests.alerts.rules import (
    DASHBOARDS,
    DEPLOY,
    RULES,
    RUNBOOK_URL,
    RUNBOOKS,
    SEVERITIES,
    alerts,
    expressions,
    names,
    recordings,
    selectors,
)
from tests.conftest import ROOT, need_program
from vllm_sluice import cli
from vllm_sluice.telemetry.catalogue import BY_NAME, COMMON_LABELS

TESTS = sorted((DEPLOY / "tests").glob("*.yml"))
TARGET_LABELS = ("job", "instance")

VLLM = {"vllm:num_requests_running": ()}
IN_RUNBOOKS = {"vllm:iteration_tokens_total_count"}
"""What runbooks ask vLLM besides."""


# ---------------------------------------------------------------------------------------------- what promtool says
def test_config_and_rules_are_good(promtool: Promtool) -> None:
    for arguments in (["check", "config", DEPLOY / "prometheus.yml"], ["check", "rules", RULES]):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts()) + len(recordings())} rules found" in done.stdout


def test_the_unit_tests_pass(promtool: Promtool) -> None:
    assert len(TESTS) >= 6
    done = promtool("test", "rules", *TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SUCCESS") == len(TESTS)


def test_the_configuration_of_alertmanager_is_good() -> None:
    amtool = need_program("amtool", "prometheus-alertmanager")
    path = DEPLOY / "alertmanager.yml"
    done = subprocess.run([amtool, "check-config", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for severity, receiver in (("critical", "pager"), ("warning", "tickets"), ("info", "board")):
        done = subprocess.run(
            [amtool, "config", "routes", "test", f"--config.file={path}", f"severity={severity}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stdout.strip() == receiver


def test_alertmanager_names_alerts_that_exist() -> None:
    tree = yaml.safe_load((DEPLOY / "alertmanager.yml").read_text(encoding="utf-8"))
    named = {
        name
        for rule in tree["inhibit_rules"]
        for matcher in rule["source_matchers"] + rule["target_matchers"]
        for name in re.findall(r"Sluice\w+", matcher)
    }
    assert len(named) >= 6
    assert named <= alerts().keys()
    for rule in tree["inhibit_rules"]:
        for name in re.findall(r"Sluice\w+", str(rule)):
            missing = set(rule["equal"]) - labels_of(name)
            assert not missing, f"{name} has no label {missing}, so this inhibition would match too much"


def labels_of(alert: str) -> set[str]:
    """Return the labels that the description of an alert relies on; an alert for a server has no engine."""
    wanted = set(re.findall(r"\$labels\.(\w+)", alerts()[alert]["annotations"]["dashboard_url"]))
    return wanted & {*TARGET_LABELS, *COMMON_LABELS}


# ---------------------------------------------------------------------------------------------- both ways
@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_positive_and_a_negative_case(name: str) -> None:
    cases: list[bool] = []
    for path in TESTS:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            cases += [bool(c["exp_alerts"]) for c in test.get("alert_rule_test", []) if c["alertname"] == name]
    assert cases.count(True) >= 1, "no test expects it"
    assert cases.count(False) >= 2, "hardly a test expects it to be quiet"


@pytest.mark.parametrize("name", recordings())
def test_every_recorded_series_has_a_value_and_an_absence(name: str) -> None:
    cases = [case["exp_samples"] for case in expression_cases() if selects(case["expr"], name)]
    assert any(cases), "no test expects a value"
    assert any(not case or all(sample["value"] == 0 for sample in case) for case in cases), "no test expects nothing"


def expression_cases() -> Iterator[dict[str, Any]]:
    for path in TESTS:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            yield from test.get("promql_expr_test", [])


def selects(expression: str, name: str) -> bool:
    """Tell whether a test's expression looks at a series, by name or by a pattern for names."""
    pattern = re.match(r'\{__name__=~"([^"]*)"\}', expression)
    return re.fullmatch(pattern[1], name) is not None if pattern else name in names(expression)


COMPARED = re.compile(r"(>=|<=|>|<|==) (\d+(?:\.\d+)?)")
Change = Callable[[dict[str, Any]], None]


def mutated(folder: Path, change: Change, tests: Iterable[Path]) -> dict[str, Any]:
    """Copy rules and some of the tests, change every rule, and return those alerts that are different now."""
    for name in ("rules", "tests"):
        (folder / name).mkdir(parents=True)
    for path in tests:
        shutil.copy(path, folder / "tests")
    for path in RULES.parent.glob("*.yml"):
        shutil.copy(path, folder / "rules")
    tree = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for group in tree["groups"]:
        for rule in group["rules"]:
            change(rule)
    path = folder / "rules" / RULES.name
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return {name: rule for name, rule in alerts(path).items() if rule != alerts()[name]}


def failures(folder: Path) -> str:
    """Return what promtool says if tests fail, else nothing."""
    done = subprocess.run(
        [need_program("promtool", "prometheus"), "test", "rules", *sorted((folder / "tests").glob("*.yml"))],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr if done.returncode else ""


def raise_threshold(rule: dict[str, Any]) -> None:
    if "alert" in rule:
        rule["expr"] = COMPARED.sub(lambda m: f"{m[1]} {float(m[2]) * 1.5 + 1}", rule["expr"])


def lower_threshold(rule: dict[str, Any]) -> None:
    if "alert" in rule:
        rule["expr"] = COMPARED.sub(lambda m: f"{m[1]} {float(m[2]) * 0.6 - 0.4}", rule["expr"])


def triple_for(rule: dict[str, Any]) -> None:
    if "for" in rule:
        rule["for"] = f"{3 * int(rule['for'][:-1])}m"


def drop_for(rule: dict[str, Any]) -> None:
    rule.pop("for", None)


@pytest.mark.parametrize(
    "change", [raise_threshold, lower_threshold, triple_for, drop_for], ids=lambda change: change.__name__
)
def test_a_changed_alert_fails_its_unit_tests(tmp_path: Path, change: Change) -> None:
    changed = mutated(tmp_path, change, [path for path in TESTS if path.stem != "massive_history"])
    assert len(changed) >= 11
    said = failures(tmp_path)
    missed = [name for name in changed if f"alertname: {name}," not in said and f'alertname=\\"{name}\\"' not in said]
    assert missed == []


# Recorded series carry thresholds too: series, test file, what is replaced.
RECORDED_CHANGES = (
    ("model_engine:sluice_drifted_layers:count", "drift", "> bool 2", "> bool 2.6"),
    ("model_engine:sluice_drifted_layers:count", "drift", "> bool 2", "> bool 1.8"),
    ("model_engine:sluice_drifted_layers:count", "drift", "< 0.5", "< 0.3"),
    ("model_engine:sluice_drifted_layers:count", "drift", "< 0.5", "< 0.6"),
    ("model_engine:sluice_drifted_layers:count", "drift", "[5m]) < 0.5", "[1m]) < 0.5"),
    ("model_engine:sluice_drifted_layers:count", "drift", "[5m])) > 0", "[5m])) >= 0"),
    ("model_engine:sluice_sink_shifted_layers:count", "drift", "0.15", "0.3"),
    ("model_engine:sluice_sink_shifted_layers:count", "drift", "0.15", "0.1"),
    ("model_engine:sluice_sink_shifted_layers:count", "drift", "abs(", "("),
    ("model_engine:sluice_patch_changed:recent15m", "drift", "< 900", "< 500"),
    ("model_engine:sluice_patch_changed:recent15m", "drift", "< 900", "< 1300"),
    ("model_engine:sluice_nonfinite:increase5m", "range", "< 300", "< 3000000"),
    ("model_engine:sluice_nonfinite:increase5m", "range", "< 300", "< 0"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_baseline", "< 600", "< 3000000"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_baseline", "< 600", "< 0"),
    ("model_engine:sluice_nonfinite:increase5m", "range", "sluice_nonfinite_total * 0", "vector(0)"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_baseline", "< 500", "< 900"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_baseline", "< 500", "< 30"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_baseline", "< 50\n", "< 10\n"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_baseline", "< 50\n", "< 95\n"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_history", "> 10000", "> 1e9"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_history", "> 100\n", "> -1\n"),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_history", "15m == ", "15m >= "),
    ("model_engine_layer_position:sluice_massive_activations:new10m", "massive_history", "offset 6h", "offset 20m"),
)


@pytest.mark.parametrize(("name", "file", "old", "new"), RECORDED_CHANGES)
def test_a_changed_recording_fails_its_unit_tests(tmp_path: Path, name: str, file: str, old: str, new: str) -> None:
    assert old in recordings()[name]

    def change(rule: dict[str, Any]) -> None:
        if rule.get("record") == name:
            rule["expr"] = rule["expr"].replace(old, new)

    mutated(tmp_path, change, [DEPLOY / "tests" / f"{file}.yml"])
    assert "FAILED" in failures(tmp_path)


# ---------------------------------------------------------------------------------------------- what they rely on
def test_every_metric_exists_with_the_labels_that_rules_use() -> None:
    known = {name: metric.labels for name, metric in BY_NAME.items()} | VLLM
    for rule, expression in expressions():
        for name in names(expression) - recordings().keys():
            assert name in known, f"{rule} uses {name}, which nobody exports"
        for name, labels in selectors(expression):
            assert set(labels) <= {*known[name], *COMMON_LABELS, *TARGET_LABELS}, rule


def test_metrics_of_vllm_are_vllms() -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None, "vLLM is not installed"
    source = (Path(str(found.origin)).parent / "v1/metrics/loggers.py").read_text(encoding="utf-8")
    for name in VLLM:
        assert f'"{name}"' in source


@pytest.mark.parametrize("name", recordings())
def test_a_recorded_series_keeps_what_boards_filter_by(name: str) -> None:
    level = re.fullmatch(r"model_engine((?:_layer)?(?:_site|_position)?):\w+:\w+", name)
    assert level
    kept = {*TARGET_LABELS, *COMMON_LABELS, *level[1].split("_")[1:]}
    found = [
        set(re.findall(r'(\w+)="', sample["labels"]))
        for case in expression_cases()
        for sample in case["exp_samples"]
        if sample["labels"].startswith(name + "{")
    ]
    assert found, "no unit test expects its labels"
    assert all(labels == kept for labels in found)


# ---------------------------------------------------------------------------------------------- what they link to
@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_to_do(name: str) -> None:
    alert = alerts()[name]
    assert alert["labels"] == {"severity": alert["labels"]["severity"]}
    assert alert["labels"]["severity"] in SEVERITIES
    notes = alert["annotations"]
    assert notes.keys() == {"summary", "description", "dashboard_url", "runbook_url"}
    assert "{{ $labels.model_name }}" in notes["summary"]
    assert not notes["summary"].endswith(".")
    assert notes["description"].endswith((".", "{{ end }}"))
    if name not in ("SluiceEnginePaused", "SluiceConfigFileBroken", "SluiceBaselineUnusable"):
        assert "$value" in notes["description"], "the description has no value"
    assert notes["runbook_url"] == RUNBOOK_URL.format(name)


@pytest.mark.parametrize("name", alerts())
def test_an_alert_links_to_a_board_with_its_variables(name: str) -> None:
    url = alerts()[name]["annotations"]["dashboard_url"]
    found = re.match(r"/d/([a-z-]+)\?", url)
    assert found
    uid = found[1]
    assert uid in DASHBOARDS
    variables = dict(re.findall(r"var-(\w+)=\{\{ \$labels\.(\w+) \| urlquery \}\}", url))
    assert all(variable == label for variable, label in variables.items())
    assert {"job", "instance", "model_name"} <= variables.keys() <= {"job", "instance", "model_name", "engine"}
    panel = re.search(r"&viewPanel=(\d+)$", url)
    assert panel
    board = ROOT / "grafana" / "dashboards" / f"{uid}.json"
    if board.exists():
        tree = json.loads(board.read_text(encoding="utf-8"))
        assert tree["uid"] == uid
        assert variables.keys() <= {variable["name"] for variable in tree["templating"]["list"]}
        linked = {p["id"]: p["title"] for p in panels(tree) if f"/{name}.md" in json.dumps(p.get("links", []))}
        assert int(panel[1]) in linked, f"of {uid} these panels link to the runbook of {name}: {linked}"


def panels(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all panels of a board, those in collapsed rows too."""
    for panel in tree["panels"]:
        yield panel
        yield from panel.get("panels", [])


def test_a_runbook_for_each_alert_and_none_without() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {*alerts(), "README"}


@pytest.mark.parametrize("name", alerts())
def test_a_runbook_has_its_parts_and_queries_that_can_be_run(name: str, tmp_path: Path) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Impact", "Diagnosis", "Resolution"]
    assert f"Severity: {alerts()[name]['labels']['severity']}." in text
    queries = re.findall(r"```promql\n(.*?)```", text, re.DOTALL)
    assert queries, "no query"
    known = {*BY_NAME, *VLLM, *IN_RUNBOOKS, *recordings()}
    for query in queries:
        assert names(query) <= known, query
    rules = [{"record": f"query{n}", "expr": query} for n, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "runbook", "rules": rules}]}))
    done = subprocess.run(
        [need_program("promtool", "prometheus"), "check", "rules", tmp_path / "rules.yml"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


COMMAND = re.compile(r"(?:`|^    )sluice ([a-z][^`\n]*)", re.MULTILINE)


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_commands_in_a_runbook_exist(path: Path) -> None:
    for command in COMMAND.findall(path.read_text(encoding="utf-8")):
        words = command.split(" #")[0].split()
        if words[0] == "serve":
            continue  # passes everything on to vLLM
        values = [{"MODEL": "models/twin-gated", "VALUE": "1"}.get(word, word) for word in words]
        cli._parser(values).parse_args(values)  # exits with a message if there is no such command or option


def test_the_table_of_runbooks_is_the_rules() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \|", (RUNBOOKS / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    expected = [(name, name, alert["labels"]["severity"]) for name, alert in alerts().items()]
    assert sorted(rows) == sorted(expected)
    assert [severity for _, _, severity in rows] == sorted((s for _, _, s in rows), key=SEVERITIES.index)


def test_the_table_in_the_docs_is_the_rules() -> None:
    text = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (Sluice\w+) \| (\w+) \| (\w+) \|", text, re.MULTILINE)
    assert rows == [(name, alert["labels"]["severity"], alert.get("for", "0")) for name, alert in alerts().items()]
    for name in re.findall(r"model_engine[a-z_]*:\w+:\w+", text):
        assert name in recordings()
