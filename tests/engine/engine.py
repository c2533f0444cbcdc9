"""A real vLLM engine in this process, with what the tests ask of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes, with whole GiB
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch

from vllm_sluice.config import RUN_DIR_VARIABLE, SERVER_VARIABLE
from vllm_sluice.telemetry import rundir
from vllm_sluice.telemetry.collector import SnapshotCollector

EVERY_ROW = {
    "SLUICE_PROBES__RESIDUAL__SAMPLE_ROWS": "64",
    "SLUICE_PROBES__RESIDUAL__INTERVAL_SECONDS": "0",
    "SLUICE_PROBES__ATTENTION__QUERIES": "64",
    "SLUICE_PROBES__ATTENTION__INTERVAL_SECONDS": "0",
    "SLUICE_TELEMETRY__INTERVAL_SECONDS": "60",
    "SLUICE_TELEMETRY__WINDOW_SECONDS": "3600",
}
"""Look at every token and query (with at most 64 tokens a pass), and only when the test asks."""

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
}


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for a while, and no other SLUICE_ ones."""
    before = {k: v for k, v in os.environ.items() if k.startswith("SLUICE_") or k in variables}
    for name in before:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in [n for n in os.environ if n.startswith("SLUICE_") or n in variables]:
            del os.environ[name]
        os.environ.update(before)


class Engine:
    """One in-process engine on one model.

    Parameters
    ----------
    model
        Checkpoint folder.
    run_dir
        Folder of this engine's snapshots.
    variables
        Environment while the engine is built.
    settings
        Arguments of `vllm.LLM` besides or instead of `SETTINGS`.
    """

    def __init__(self, model: Path, run_dir: Path, variables: dict[str, str] | None = None, **settings: Any) -> None:
        from vllm import LLM

        from vllm_sluice import entrypoints

        with environment():
            entrypoints.register()  # vLLM loads plugins once a process; the first engine here may have Sluice off
        self.identity = f"{run_dir.name}-{os.getpid()}-{rundir.start_ticks(os.getpid())}"  # this process begins it
        own = {RUN_DIR_VARIABLE: str(run_dir), SERVER_VARIABLE: self.identity}
        self._environment = {**own, **(EVERY_ROW if variables is None else variables)}
        self.run_dir = run_dir
        with environment(**self._environment):
            self.llm = LLM(str(model), **{**SETTINGS, **settings})
        self.runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.model = self.runner.get_model()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.llm.get_tokenizer().encode(text)
        return ids

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Compute the logits at every position of one prompt, [tokens, vocabulary]."""
        from vllm import SamplingParams

        rows: list[torch.Tensor] = []
        original = self.model.compute_logits

        def keep(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = original(hidden, *args, **kwargs)
            rows.append(out.float().clone())
            return out

        self.model.compute_logits = keep
        try:
            parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
            with environment(**self._environment):
                self.llm.generate({"prompt_token_ids": list(ids)}, parameters, use_tqdm=False)
        finally:
            del self.model.compute_logits
        # Each chunk of the prompt first gives the logits of its last row (for sampling), then those of the prompt
        # positions whose successor is known; the sampled row of the last chunk is the last position's.
        by_size = [r for r in rows if len(r) != 1] or rows
        last = next(r for r in reversed(rows) if len(r) == 1)
        prompt = torch.cat(by_size)
        logits: torch.Tensor = torch.cat([prompt[: len(ids) - 1], last])
        return logits

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int = 1, **sampling: Any) -> list[list[int]]:
        """Generate greedily for several prompts at once; return the generated token ids."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **sampling)
        with environment(**self._environment):
            outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def rpc(self, operation: str, state: dict[str, Any] | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = self.llm.collective_rpc("sluice_rpc", args=(operation, state))[0]
        return answer

    def fresh_windows(self) -> None:
        """Forget what the windows and totals have seen."""
        answer = self.rpc("forget")
        assert "error" not in answer, answer

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Write and read a snapshot: `(metric without prefix, label values...)` to value."""
        answer = self.rpc("publish")
        assert "error" not in answer, answer
        samples = SnapshotCollector(self.run_dir).samples()
        return {
            (s.metric.removeprefix("sluice_"), *[v for k, v in s.labels if k not in ("model_name", "engine")]): s.value
            for s in samples
        }
