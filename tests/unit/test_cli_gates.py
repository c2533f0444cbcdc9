"""`sluice gates inspect`, and reading safetensors files without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from vllm_sluice import cli
from vllm_sluice.commands import gatefile

HIDDEN = 64
HEADS = 4
CONFIG = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "hidden_size": HIDDEN, "architectures": ["Llama"]}


def gate(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.output_gate.{part}"


def head_gates(layers: int = 2) -> dict[str, np.ndarray]:
    tensors = {}
    for layer in range(layers):
        tensors[gate(layer, "weight")] = np.full((HEADS, HIDDEN), 0.5, np.float32)
        tensors[gate(layer, "bias")] = np.array([-2, -1, 0, 1], np.float32)
    return tensors


@pytest.fixture
def inspect(capsys):
    def run(path, *options: str):
        status = cli.main(["gates", "inspect", str(path), *options])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def sidecar(tmp_path):
    def save(tensors, metadata=None, config=None) -> Path:
        path = tmp_path / "gates.safetensors"
        save_file(tensors, path, metadata)
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return path

    return save


def test_a_good_sidecar_is_a_table_with_a_line_a_layer(inspect, sidecar):
    path = sidecar(head_gates())
    status, out, _ = inspect(path)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"{path}: 2 gates; head or element known from the shape"
    cells = [line.split() for line in lines[3:]]
    mean = np.mean(1 / (1 + np.exp([2, 1, 0, -1])))
    assert cells[0] == [
        "model.layers.0.self_attn", "head", "4", "x", "64", "F32", "0.5", "0.5", "0.5",
        "4", "-2", "-0.5", "1", f"{mean:.3f}",
    ]  # fmt: skip
    assert cells[1][0] == "model.layers.1.self_attn"


def test_layers_come_in_their_order_not_in_that_of_their_names(inspect, sidecar):
    path = sidecar({gate(layer, "weight"): np.zeros((HEADS, HIDDEN), np.float32) for layer in (10, 9, 0)})
    found = json.loads(inspect(path, "--json")[1])
    assert [row["layer"] for row in found["gates"]] == [0, 9, 10]


def test_json_has_shapes_values_and_no_nan(inspect, sidecar):
    tensors = head_gates()
    tensors[gate(1, "weight")][:] = np.nan
    status, out, _ = inspect(sidecar(tensors), "--json")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert status == 1
    assert found["gates"][0]["weight"] == {
        "shape": [4, 64], "dtype": "F32", "min": 0.5, "mean": 0.5, "max": 0.5, "not_finite": 0,
    }  # fmt: skip
    assert found["gates"][1]["weight"]["mean"] is None
    assert found["gates"][1]["weight"]["not_finite"] == HEADS * HIDDEN
    assert found["problems"] == ["model.layers.1.self_attn: output_gate.weight has 256 NaN or infinite values"]


def test_a_gate_without_bias_is_half_open_at_zero(inspect, sidecar):
    out = inspect(sidecar({gate(0, "weight"): np.zeros((HEADS, HIDDEN), np.float32)}))[1]
    assert out.splitlines()[-1].split()[-2:] == ["missing", "0.500"]


@pytest.mark.parametrize(
    ("rows", "metadata", "config", "expected", "source"),
    [
        (HEADS, None, None, "head", "shape"),
        (HIDDEN, None, None, "element", "shape"),
        (HIDDEN, {"granularity": "element"}, None, "element", "metadata"),
        (8, {"granularity": "head"}, None, "head", "metadata"),
        (HEADS, None, CONFIG, "head", "config.json"),
        (HIDDEN, None, CONFIG, "element", "config.json"),
        (8 * HEADS, None, {**CONFIG, "head_dim": 8}, "element", "config.json"),
        (HEADS, None, {"text_config": CONFIG}, "head", "config.json"),
    ],
)
def test_head_or_element_is_read_where_it_is_known(inspect, sidecar, rows, metadata, config, expected, source):
    path = sidecar({gate(0, "weight"): np.zeros((rows, HIDDEN), np.float32)}, metadata, config)
    found = json.loads(inspect(path, "--json")[1])["gates"][0]
    assert (found["granularity"], found["known_from"]) == (expected, source)


def test_a_checkpoint_folder_is_read_as_one(inspect, tmp_path):
    for layer in (0, 1):
        tensors = {name: t for name, t in head_gates().items() if f".{layer}." in name}
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = np.zeros((4, 4), np.float32)
        save_file(tensors, tmp_path / f"model-{layer}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    status, out, _ = inspect(tmp_path)
    assert status == 0
    assert out.startswith(f"{tmp_path}: 2 gates; head or element known from the config.json\n")


def test_bfloat16_and_float16_are_read_exactly(inspect, tmp_path):
    values = torch.tensor([[1.5, -0.0078125], [3.0, 65280.0]])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        path = tmp_path / "a.safetensors"
        save_torch({"w": values.to(dtype)}, path)
        read = gatefile.read_header(path).tensors["w"].read()
        assert read.tolist() == values.to(dtype).double().tolist()


def test_a_dtype_without_plain_numbers_is_listed_without_values(inspect, tmp_path):
    path = tmp_path / "a.safetensors"
    save_torch({gate(0, "weight"): torch.zeros(HEADS, HIDDEN).to(torch.float8_e4m3fn)}, path)
    status, out, _ = inspect(path)
    assert status == 0
    assert "F8_E4M3  ?" in out


@given(arrays.arrays(np.float32, (3, 5), elements=st.floats(allow_nan=False, width=32)))
def test_values_survive_the_file(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("values") / "a.safetensors"
    save_file({"first": np.zeros(3, np.float32), "w": values}, path)
    assert np.array_equal(gatefile.read_header(path).tensors["w"].read(), values.astype(np.float64))


# ---------------------------------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize(
    ("change", "config", "problem"),
    [
        ({gate(0, "weight"): np.full((HEADS, HIDDEN), np.inf, np.float32)}, None, "has 256 NaN or infinite values"),
        ({gate(1, "bias"): np.array([0, np.nan, 0, 0], np.float32)}, None, "output_gate.bias has 1 NaN or infinite"),
        ({gate(1, "bias"): np.zeros(5, np.float32)}, None, "output_gate.bias has shape [5], expected [4]"),
        ({gate(1, "weight"): np.zeros(HIDDEN, np.float32)}, None, "has shape [64], expected [rows, hidden]"),
        ({gate(1, "weight"): np.zeros((HIDDEN, HIDDEN), np.float32)}, CONFIG, "is head-wise and model.layers.1"),
        ({gate(1, "weight"): np.zeros((5, HIDDEN), np.float32)}, CONFIG,
         "has 5 rows; config.json allows 4 (head-wise) or 64 (element-wise) rows"),
        ({gate(1, "weight"): np.zeros((HEADS, 32), np.float32)}, CONFIG, "has 32 columns; the hidden size is 64"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_layer(inspect, sidecar, change, config, problem):
    status, out, _ = inspect(sidecar({**head_gates(), **change}, None, config))
    assert status == 1
    wrong = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert any(problem in line for line in wrong), wrong


def test_a_bias_without_its_weight_is_wrong(inspect, sidecar):
    tensors = head_gates()
    del tensors[gate(1, "weight")]
    status, out, _ = inspect(sidecar(tensors))
    assert status == 1
    assert "wrong: model.layers.1.self_attn: output_gate.bias is there but output_gate.weight is missing" in out


def test_a_file_without_gates_is_refused_with_what_it_holds(inspect, sidecar):
    path = sidecar({"lm_head.weight": np.zeros((2, 2), np.float32)})
    status, out, err = inspect(path)
    assert (status, out) == (1, "")
    assert err == (
        f"sluice: {path} has no gate: a name ending in .output_gate.weight is needed, "
        "its 1 tensors are named like lm_head.weight\n"
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it is empty"),
        (b"abc", "it is 3 bytes long"),
        (b"PK\x03\x04" + b"\x00" * 40, "a zip archive, such as a PyTorch checkpoint"),
        (b"\x80\x02}q\x00." + b"\x00" * 40, "a Python pickle"),
        (b"GGUF" + b"\x03\x00" * 20, "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a Git LFS pointer; fetch the file itself"),
        (b"A text that someone saved under the wrong name.", "text that begins 'A text that someone saved under "),
        (struct.pack("<Q", 10**6) + b"{}" + b"\x01" * 30, "a file that begins with the bytes 40 42 0f"),
        (struct.pack("<Q", 4) + b"{bad" + b"\x00" * 40, "its header cannot be read"),
        (struct.pack("<Q", 2) + b"{}", None),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused_with_what_it_is(inspect, tmp_path, content, found):
    path = tmp_path / "gates.safetensors"
    path.write_bytes(content)
    status, _, err = inspect(path)
    assert status == 1
    if found is None:
        assert "it holds no tensor at all" in err
    else:
        assert err.startswith(f"sluice: {path} is not a safetensors file: ")
        assert found in err
    assert len(err.splitlines()) == 1


def test_a_file_that_was_cut_off_is_refused(inspect, sidecar):
    path = sidecar(head_gates())
    path.write_bytes(path.read_bytes()[:-100])
    err = inspect(path)[2]
    assert "is not a safetensors file: its header cannot be read" in err
    assert "is it cut off?" in err


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    path.write_bytes(content)
    try:
        gatefile.read_header(path)
    except gatefile.Problem as error:
        assert str(path) in str(error)


def test_a_missing_file_and_an_empty_folder_are_refused(inspect, tmp_path):
    assert inspect(tmp_path / "none.safetensors")[2] == f"sluice: there is no file {tmp_path / 'none.safetensors'}\n"
    assert inspect(tmp_path)[2] == f"sluice: {tmp_path} holds no .safetensors file\n"


def test_a_broken_config_beside_the_file_is_named(inspect, sidecar, tmp_path):
    path = sidecar(head_gates())
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'} is not valid JSON" in inspect(path)[2]
    (tmp_path / "config.json").write_text("[]")
    assert "holds a list; a JSON object is needed" in inspect(path)[2]
