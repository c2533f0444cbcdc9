"""The files in deploy/: YAML, shell, generated parts, Prometheus's configuration, rules for several machines."""

from __future__ import annotations

import shutil
import sys

import pytest
import yaml

from tests.deploy.tools import DEPLOY, ROOT, RULES, need_sources, output, run, tool
from vllm_sluice.telemetry.catalogue import BY_NAME

NODE_RULES = DEPLOY / "prometheus/multi-node/multi-node.rules.yml"
NODE_ALERTS = NODE_RULES.with_name("multi-node-alerts.rules.yml")


def yamllint(*paths):
    return run(tool("yamllint"), "--strict", "-c", DEPLOY / ".yamllint.yaml", *paths)


def test_yaml_is_tidy():
    done = yamllint("deploy", *(ROOT / "grafana").glob("*.yaml"))
    assert done.returncode == 0, done.stdout


def test_yamllint_finds_a_key_that_comes_twice(tmp_path):
    (tmp_path / "twice.yaml").write_text("a: 1\nb: 2\na: 3\n")
    assert 'duplication of key "a"' in yamllint(tmp_path).stdout


def test_shell_scripts_have_no_findings(tmp_path):
    # SC2015 is about `a && b || fail`, which is meant as it stands.
    command = [tool("shellcheck"), "--exclude=SC2015"]
    output(*command, *sorted(DEPLOY.rglob("*.sh")), ROOT / ".ci/run")
    (tmp_path / "wrong.sh").write_text("#!/bin/sh\nrm -r $1/cache\n")
    assert "SC2086" in run(*command, tmp_path / "wrong.sh").stdout


def test_generated_files_are_up_to_date():
    need_sources()
    output(sys.executable, DEPLOY / "generate.py", "--check")


def test_a_changed_source_is_noticed(tmp_path):
    need_sources()
    for part in ("deploy", "grafana/dashboards", "plugin"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    generate = [sys.executable, tmp_path / "deploy/generate.py"]
    output(*generate)
    output(*generate, "--check")
    changed = tmp_path / RULES.relative_to(ROOT)
    changed.write_text(changed.read_text().replace("for: ", "for: 1", 1))
    (tmp_path / "grafana/dashboards/sluice-new.json").write_text("{}")
    done = run(*generate, "--check")
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "deploy/kustomize/components/prometheus-operator/prometheusrule.yaml",
        "grafana/kustomization.yaml",
    ]


@pytest.fixture
def prometheus_folder(tmp_path):
    """The folder /etc/prometheus of the compose file."""
    need_sources()
    shutil.copy(DEPLOY / "compose/prometheus.yml", tmp_path)
    shutil.copytree(RULES.parent, tmp_path / "rules")
    return tmp_path


def test_prometheus_takes_the_configuration_of_compose(prometheus_folder):
    checked = output(tool("promtool"), "check", "config", prometheus_folder / "prometheus.yml")
    assert f"{len(list(RULES.parent.glob('*.yml')))} rule files found" in checked


def test_promtool_refuses_an_unknown_key(prometheus_folder):
    file = prometheus_folder / "prometheus.yml"
    file.write_text(file.read_text().replace("sample_limit", "samples_limit"))
    assert "field samples_limit not found" in run(tool("promtool"), "check", "config", file).stderr


def test_compose_asks_prometheus_for_the_same_as_everywhere():
    need_sources()
    here, there = (
        yaml.safe_load(path.read_text())
        for path in (DEPLOY / "compose/prometheus.yml", DEPLOY / "prometheus/prometheus.yml")
    )
    for name in ("scrape_interval", "evaluation_interval"):
        assert here["global"][name] == there["global"][name]
    jobs = [next(j for j in file["scrape_configs"] if j["job_name"] == "vllm") for file in (here, there)]
    assert jobs[0].get("sample_limit") == jobs[1].get("sample_limit")


def test_alertmanager_takes_its_configuration():
    need_sources()
    output(tool("amtool"), "check-config", DEPLOY / "prometheus/alertmanager.yml")


def test_rules_for_several_machines_combine_as_the_catalogue_says(tmp_path):
    """Two machines, a tensor-parallel rank each: replicated values take the largest, heads are added or averaged."""
    output(tool("promtool"), "check", "rules", NODE_RULES)
    labels = 'server="s", model_name="m", engine="0", layer="001"'
    cases = {"activation_abs_max": (4, 7, "max", 7), "attention_sink_heads": (2, 3, "sum", 5),
             "attention_sink_mass": (0.25, 0.5, "avg", 0.375)}  # fmt: skip
    series, tests = [], []
    for name, (first, second, how, combined) in cases.items():
        assert {"avg": "mean"}.get(how, how) == BY_NAME[f"sluice_{name}"].combine
        for instance, value in (("a", first), ("b", second)):
            series.append({"series": f'sluice_{name}{{instance="{instance}", {labels}}}', "values": f"{value}x3"})
        # A replica that is no part of a server on several machines is left alone.
        series.append({"series": f'sluice_{name}{{instance="c", model_name="m", engine="0", layer="001"}}',
                       "values": "99x3"})  # fmt: skip
        record = f"server_engine:sluice_{name}:{how}"
        tests.append({"expr": record, "eval_time": "2m", "exp_samples": [{"labels": f"{record}{{{labels}}}",
                                                                           "value": combined}]})  # fmt: skip
    file = tmp_path / "test.yml"
    unit = {"interval": "1m", "input_series": series, "promql_expr_test": tests}
    file.write_text(yaml.safe_dump({"rule_files": [str(NODE_RULES)], "evaluation_interval": "1m", "tests": [unit]}))
    output(tool("promtool"), "test", "rules", file)
    tests[0]["exp_samples"][0]["value"] = 11
    file.write_text(yaml.safe_dump({"rule_files": [str(NODE_RULES)], "evaluation_interval": "1m", "tests": [unit]}))
    assert run(tool("promtool"), "test", "rules", file).returncode == 1


def test_alerts_for_several_machines(tmp_path):
    tests = NODE_ALERTS.with_name("multi-node-alerts.test.yml")
    output(tool("promtool"), "test", "rules", tests)
    for old, new in (("up == 1", "up >= 0"), (" unless on (job, instance) vllm:", " and on (job, instance) vllm:"),
                     ("unless on (job, instance)\n", "and on (job, instance)\n"), ("[2m])) > 0", "[2m])) >= 0"),
                     ("            vllm:num_requests_running{server!=\"\"}\n", "            up\n"),
                     ("for: 2m", "for: 9m"), ("for: 1m", "for: 9m")):  # fmt: skip
        text = NODE_ALERTS.read_text()
        assert old in text
        (tmp_path / NODE_ALERTS.name).write_text(text.replace(old, new))
        shutil.copy(tests, tmp_path)
        assert run(tool("promtool"), "test", "rules", tmp_path / tests.name).returncode == 1, f"{old} -> {new}"


def test_alerts_for_several_machines_lead_where_those_for_one_lead():
    """They bear the names of alerts for one target, so board, panel, runbook and severity are the same."""
    one_target, several = (
        {rule["alert"]: rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
         if "alert" in rule}
        for path in (RULES, NODE_ALERTS)
    )  # fmt: skip
    assert several
    for name, rule in several.items():
        other = one_target[name]
        assert rule["labels"] == other["labels"]
        assert rule["annotations"]["runbook_url"] == other["annotations"]["runbook_url"]
        ends = [
            (url.partition("?")[0], url.rpartition("&")[2])
            for url in (rule["annotations"]["dashboard_url"], other["annotations"]["dashboard_url"])
        ]
        assert ends[0] == ends[1]


def test_the_tools_script_says_where_it_puts_things(tmp_path):
    said = output(DEPLOY / "tools.sh", "--folder", env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    assert said == f"{tmp_path}/.cache/sluice/deploy-tools\n"
