"""The command line: what it prints, its exit statuses, and the errors of `config`, `metrics` and `lab`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from vllm_sluice import __version__, cli, config


@pytest.fixture
def sluice(capsys, monkeypatch):
    """Run a command in this process; return exit status, standard output and standard error."""

    def run(*arguments: str):
        try:
            status = cli.main(arguments)
        except SystemExit as stopped:
            status = stopped.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    monkeypatch.delenv("SLUICE_CONFIG", raising=False)
    return run


def test_the_command_starts_without_torch_and_vllm():
    """Start-up is what a shell waits for; importing torch alone takes seconds."""
    program = (
        "import sys; from vllm_sluice import cli\n"
        "for words in (['config', 'check'], ['metrics', 'docs'], ['gates', 'inspect', 'no-such-file']):\n"
        "    cli.main(words)\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'vllm', 'transformers', 'openai')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_version(sluice):
    assert sluice("--version") == (0, f"sluice {__version__}\n", "")


def test_help_names_every_command(sluice):
    status, out, _ = sluice("--help")
    assert status == 0
    for command in ("serve", "demo", "doctor", "config", "gates", "metrics", "exporter", "lab"):
        assert f"\n    {command} " in out


def test_no_command_and_an_unknown_one_are_usage_errors(sluice):
    assert sluice()[0] == 2
    status, _, err = sluice("sevre")
    assert status == 2
    assert "sevre" in err


def test_lab_has_its_own_commands(sluice):
    status, out, _ = sluice("lab", "--help")
    assert status == 0
    assert "train" in out
    assert "evaluate" in out


# ---------------------------------------------------------------------------------------------- config
def test_config_show_prints_every_setting_and_the_origin_of_those_that_were_set(sluice, tmp_path, monkeypatch):
    path = tmp_path / "sluice.yaml"
    path.write_text("patches: {gate: {enabled: false}}")
    monkeypatch.setenv("SLUICE_PROBES__ATTENTION__QUERIES", "3")
    status, out, err = sluice("config", "show", str(path))
    assert (status, err) == (0, "")
    shown = yaml.safe_load(out)
    assert shown["patches"]["gate"]["enabled"] is False
    assert shown["probes"]["attention"]["queries"] == 3
    assert f"# patches.gate.enabled: from {path}\n" in out
    assert "# probes.attention.queries: from SLUICE_PROBES__ATTENTION__QUERIES\n" in out


def test_what_config_show_prints_can_be_used_as_a_file(sluice, tmp_path):
    path = tmp_path / "sluice.yaml"
    path.write_text(sluice("config", "show")[1])
    assert sluice("config", "check", str(path))[0] == 0


@pytest.mark.parametrize("option", [[], ["--sluice-config"]])
def test_config_check_accepts_a_good_file(sluice, tmp_path, option):
    path = tmp_path / "sluice.yaml"
    path.write_text("enabled: true\nlive: {enabled: false}\n")
    status, out, _ = sluice("config", "check", *option, str(path))
    assert status == 0
    assert out == f"{path}: good, 2 settings, structural fingerprint {config.Config().structural_fingerprint()}\n"


def test_config_check_looks_at_the_file_that_the_server_would_read(sluice, tmp_path, monkeypatch):
    path = tmp_path / "sluice.yaml"
    path.write_text("enabled: true\n")
    monkeypatch.setenv("SLUICE_CONFIG", str(path))
    assert sluice("config", "check")[1].startswith(f"{path}: good, 1 setting, ")


@pytest.mark.parametrize("command", ["check", "show"])
def test_an_unusable_configuration_is_exit_status_2_with_the_key(sluice, tmp_path, command):
    path = tmp_path / "sluice.yaml"
    path.write_text("patches: {gate: {enabld: true}}")
    status, out, err = sluice("config", command, str(path))
    assert (status, out) == (2, "")
    assert err.startswith("sluice: the configuration cannot be used:\npatches.gate.enabld (from ")
    assert "Did you mean patches.gate.enabled?" in err


def test_two_configuration_files_are_one_too_many(sluice):
    status, _, err = sluice("config", "check", "a.yaml", "--sluice-config", "b.yaml")
    assert status == 1
    assert err == "sluice: two configuration files were named, a.yaml and b.yaml; name one\n"


def test_config_schema_is_the_schema(sluice):
    assert json.loads(sluice("config", "schema")[1]) == config.schema()


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m vllm_sluice.cli config schema | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


# ---------------------------------------------------------------------------------------------- metrics docs
def test_metrics_docs_checks_a_page(sluice, tmp_path):
    page = tmp_path / "metrics.md"
    assert sluice("metrics", "docs", "--output", str(page))[0] == 0
    assert sluice("metrics", "docs")[1] == page.read_text()
    assert sluice("metrics", "docs", "--check", str(page)) == (0, "", "")
    page.write_text(page.read_text() + "more")
    status, _, err = sluice("metrics", "docs", "--check", str(page))
    assert status == 1
    assert err == f"sluice: {page} does not match the catalogue of metrics; make it anew with: make docs\n"
    page.unlink()
    assert "make it with: make docs" in sluice("metrics", "docs", "--check", str(page))[2]
