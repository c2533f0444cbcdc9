"""Run in a process of its own: one engine under vLLM's piecewise compile mode, the GPU's, forced on the CPU.

    python -m tests.engine.piecewise REQUEST.json ANSWER.json

The CPU platform downgrades mode 3 (VLLM_COMPILE) to one flat graph. `force_piecewise` puts it back, which exercises
vLLM's real backend: split graphs, its compile cache, AOT artifacts saved and loaded. Without it the stale-cache
hazards of a GPU cannot be seen on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def force_piecewise() -> Any:
    """Make the CPU platform keep mode 3; return what must stay alive."""
    import torch
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.import_kernels()
    stubs = torch.library.Library("_C", "FRAGMENT")
    # Named by compilation/passes/utility/fix_functionalization.py; they exist in CUDA builds only.
    for operator in (
        "fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant", "rms_norm",
        "rms_norm_static_fp8_quant", "silu_and_mul", "silu_and_mul_quant", "silu_and_mul_nvfp4_quant",
        "fused_qk_norm_rope", "fused_add_rms_norm", "rotary_embedding",
    ):  # fmt: skip
        if not hasattr(torch.ops._C, operator):
            stubs.define(f"{operator}() -> ()")
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        wanted = compilation.mode
        original(cls, vllm_config)
        if wanted == CompilationMode.VLLM_COMPILE:
            compilation.mode = wanted
            compilation.backend = "inductor"
            compilation.compile_sizes = compilation.compile_sizes or []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    return stubs


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = Path(sys.argv[2])
    os.environ["VLLM_CACHE_ROOT"] = request["cache"]
    from tests.engine.engine import Engine

    stubs = force_piecewise()
    if request.get("without_key"):
        from vllm_sluice import compat

        compat.on_compile_hash = lambda fingerprint: None  # the fault that the key protects from

    import torch
    from vllm.compilation.counter import compilation_counter

    engine = Engine(
        Path(request["model"]), answer.parent / "run", request["variables"], enforce_eager=False,
        compilation_config={"mode": 3},
    )  # fmt: skip
    result: dict[str, Any] = {"mode": int(engine.llm.llm_engine.vllm_config.compilation_config.mode)}
    result["on"] = [engine.logits(ids) for ids in request["prompts"]]
    if hasattr(engine.model, "sluice_runtime"):
        result["metrics"] = [[list(key), value] for key, value in engine.metrics().items()]
        if "gate" in engine.rpc("state")["patches"]:
            before = compilation_counter.clone()
            engine.rpc("apply", {"patches": {"gate": {"enabled": False}}})
            result["off"] = [engine.logits(ids) for ids in request["prompts"]]
            after = compilation_counter.num_backend_compilations
            result["compiled_by_switch"] = after - before.num_backend_compilations
    result["loaded"] = compilation_counter.num_aot_artifacts_loaded
    result["saved"] = compilation_counter.num_aot_artifacts_saved
    result["pieces"] = compilation_counter.num_piecewise_graphs_seen
    torch.save(result, answer)
    del stubs


if __name__ == "__main__":
    main()
