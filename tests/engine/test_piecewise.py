"""The GPU's compile path on the CPU, cold and warm, and the stale-cache cases both ways.

One cache folder, five processes: stock (cold), with probes and gated (neither may load the artifact of another), gated
again (loads its own), stock again (loads its own, not the gated one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.engine import quantized
from tests.engine.engine import EVERY_ROW
from tests.engine.expected import expected
from tests.engine.quantized import EVERY_ROW_QUANTIZED, check_quantization, site_tensors
from tests.engine.test_statistics import FLOAT32, check
from vllm_sluice.lab.reference import reference_model

TOLERANCE = 1e-4


def run(folder: Path, cache: Path, model: Path, variables: dict[str, str], prompts: list[list[int]],
        **request: Any) -> dict[str, Any]:
    folder.mkdir()
    (folder / "request.json").write_text(
        json.dumps(
            {"cache": str(cache), "model": str(model), "variables": variables, "prompts": prompts, **request}
        )
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'plugin'}"
    command = [sys.executable, "-m", "tests.engine.piecewise", str(folder / "request.json"), str(folder / "answer.pt")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answer: dict[str, Any] = torch.load(folder / "answer.pt", weights_only=True)
    assert answer["mode"] == 3
    return answer


@pytest.fixture(scope="module")
def gated_vanilla(twin_vanilla: Path, twin_gated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The vanilla twin with the gated twin's gates: as a sidecar, and as a checkpoint for the reference."""
    folder = tmp_path_factory.mktemp("piecewise-models")
    gates = {k: v for k, v in load_file(twin_gated / "model.safetensors").items() if ".output_gate." in k}
    sidecar = folder / "gates.safetensors"
    save_file(gates, sidecar)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    save_file({**load_file(twin_vanilla / "model.safetensors"), **gates}, checkpoint / "model.safetensors",
              metadata={"format": "pt"})
    settings = json.loads((twin_gated / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(settings))
    return sidecar, checkpoint


def test_piecewise_compile_cold_and_warm_and_never_stale(twin_vanilla, gated_vanilla, prompts, tmp_path):
    sidecar, checkpoint = gated_vanilla
    prompts = prompts[:2]
    stock = {"SLUICE_ENABLED": "false"}
    gated = {**EVERY_ROW_QUANTIZED, "SLUICE_PATCHES__GATE__SOURCE": str(sidecar)}
    cache = tmp_path / "cache"

    with torch.no_grad():
        plain = [reference_model(twin_vanilla)(torch.tensor([ids])).logits[0] for ids in prompts]
        with_gates = [reference_model(checkpoint)(torch.tensor([ids])).logits[0] for ids in prompts]
    assert all((a - b).abs().max() > 0.5 for a, b in zip(plain, with_gates, strict=True))

    def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
        return all((a - b).abs().max() < TOLERANCE for a, b in zip(ours, theirs, strict=True))

    first = run(tmp_path / "stock-cold", cache, twin_vanilla, stock, prompts)
    assert first["saved"] == 1
    assert first["loaded"] == 0
    assert first["pieces"] > 6
    assert close(first["on"], plain)

    probes = run(tmp_path / "probes-cold", cache, twin_vanilla, EVERY_ROW, prompts)
    assert probes["loaded"] == 0
    assert probes["saved"] == 1
    assert all(torch.equal(a, b) for a, b in zip(probes["on"], first["on"], strict=True))
    metrics = {tuple(key): value for key, value in probes["metrics"]}
    check(metrics, expected(twin_vanilla, prompts), {"default": FLOAT32})

    cold = run(tmp_path / "gated-cold", cache, twin_vanilla, gated, prompts)
    assert cold["loaded"] == 0
    assert cold["saved"] == 1

    warm = run(tmp_path / "gated-warm", cache, twin_vanilla, gated, prompts)
    assert warm["loaded"] == 1
    assert warm["saved"] == 0

    for answer in (cold, warm):
        assert close(answer["on"], with_gates)
        assert all(torch.equal(a, b) for a, b in zip(answer["off"], first["on"], strict=True))
        assert answer["compiled_by_switch"] == 0
        metrics = {tuple(key): value for key, value in answer["metrics"]}
        check(metrics, expected(checkpoint, prompts), {"default": FLOAT32})
        sizes = [len(ids) for ids in prompts]
        check_quantization(metrics, site_tensors(checkpoint, prompts), sizes, quantized.FLOAT32)

    again = run(tmp_path / "stock-warm", cache, twin_vanilla, stock, prompts)
    assert again["loaded"] == 1
    assert all(torch.equal(a, b) for a, b in zip(again["on"], first["on"], strict=True))


def test_without_the_key_the_hazard_is_real(twin_vanilla, gated_vanilla, prompts, tmp_path):
    """What the compile-cache key protects from: a patched process silently runs the unpatched artifact."""
    sidecar, checkpoint = gated_vanilla
    gated = {**EVERY_ROW, "SLUICE_PATCHES__GATE__SOURCE": str(sidecar)}
    cache = tmp_path / "cache"
    run(tmp_path / "stock", cache, twin_vanilla, {"SLUICE_ENABLED": "false"}, prompts[:1])
    stale = run(tmp_path / "stale", cache, twin_vanilla, gated, prompts[:1], without_key=True)
    with torch.no_grad():
        wanted = reference_model(checkpoint)(torch.tensor(prompts[:1])).logits[0]
    assert stale["loaded"] == 1
    assert (stale["on"][0] - wanted).abs().max() > 0.5
