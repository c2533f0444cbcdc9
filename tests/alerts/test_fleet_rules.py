"""The recording rules for many engines: what they rely on, and that their unit tests can fail."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.alerts.rules import DEPLOY, names, recordings
from vllm_sluice.telemetry.catalogue import BY_NAME

FLEET = DEPLOY / "rules" / "sluice-fleet.rules.yml"
TESTS = DEPLOY / "tests" / "fleet.yml"
_LABELS = {"vllm_version"}
CHANGES = (("max by (job, instance", "min by (job, instance"), ("avg by", "max by"), ("(0.5,", "(0.9,"),
           ("rate(", "delta("), ("> bool 0", ">= bool 0"),
           ("engine, version, vllm_version)", "engine, version, vllm_version, fingerprint)"),
           ("max by (job, model_name)", "min by (job, model_name)"))  # fmt: skip


def test_what_is_used_exists_and_what_is_recorded_is_tested():
    recorded = recordings(FLEET)
    known = BY_NAME.keys() | recordings().keys() | recorded.keys()
    for name, expression in recorded.items():
        assert names(expression) - _LABELS <= known, name
    cases = [
        case["expr"].partition("{")[0]
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test["promql_expr_test"]
        if case["exp_samples"]
    ]
    assert set(cases) == set(recorded)


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_changed_rule_fails_its_unit_test(tmp_path: Path, old: str, new: str):
    shutil.copytree(DEPLOY / "rules", tmp_path / "rules")
    (tmp_path / "tests").mkdir()
    shutil.copy(TESTS, tmp_path / "tests")
    path = tmp_path / "rules" / FLEET.name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "tests" / TESTS.name], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "FAILED" in done.stdout + done.stderr
