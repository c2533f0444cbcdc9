"""What patches and probes cost against stock vLLM, in one process and one run.

Builds the same random gated model under several configurations, times prefill and decode in turns (A B C D, A B C D,
...), and prints the median over rounds of each round's ratio to stock. Stock is the same checkpoint without gates.

    python bench/bench_overhead.py [--rounds 15] [--eager]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tokenizers import Tokenizer

from tests.engine.engine import Engine
from vllm_sluice.lab.export import export
from vllm_sluice.lab.twin import Twin, TwinConfig

ROOT = Path(__file__).resolve().parent.parent
NO_PROBES = {f"SLUICE_PROBES__{kind}__INSTALL": "false" for kind in ("RESIDUAL", "ATTENTION", "GATE")}
SHAPE = {"hidden_size": 512, "layers": 8, "heads": 8, "intermediate_size": 1408}
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "stock vLLM": ("none", {"SLUICE_ENABLED": "false"}),
    "gate, head-wise": ("head", NO_PROBES),
    "gate, element-wise": ("element", NO_PROBES),
    "probes": ("none", {}),
    "gate, head-wise, and probes": ("head", {}),
    "gate, head-wise, probes, and per request": ("head", {"SLUICE_CONTROL__PER_REQUEST": "true"}),
    "probes and quantization": ("none", {"SLUICE_PROBES__QUANTIZATION__INSTALL": "true"}),
}


def build(folder: Path, gate: str) -> Path:
    """Write a random model of the bench's shape."""
    torch.manual_seed(0)
    target = folder / gate
    if not target.exists():
        tokenizer = Tokenizer.from_file(str(ROOT / "models/twin-gated/tokenizer.json"))
        export(Twin(TwinConfig(**SHAPE, gate=gate)), tokenizer, target, "random model\n")  # type: ignore[arg-type]
    return target


def seconds(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Time one batch."""
    began = time.perf_counter()
    engine.generate(prompts, tokens)
    return time.perf_counter() - began


def main() -> None:
    """Run the bench and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(2, 4096, (8, 256), generator=generator).tolist()
    short = torch.randint(2, 4096, (8, 16), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engines = {
            name: Engine(
                build(folder, gate), folder / f"run{index}", variables, dtype="bfloat16",
                enforce_eager=options.eager, max_num_batched_tokens=512,
            )
            for index, (name, (gate, variables)) in enumerate(CASES.items())
        }  # fmt: skip
        times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in CASES}
        for turn in range(options.rounds + 2):
            for name, engine in engines.items():
                prefill, decode = seconds(engine, long, 1), seconds(engine, short, 48)
                if turn >= 2:  # two rounds of warm-up
                    times[name]["prefill"].append(prefill)
                    times[name]["decode"].append(decode)
    stock = times["stock vLLM"]
    print("| configuration | prefill 8 x 256, time / stock | decode 8 x 48, time / stock |\n|---|---|---|")
    for name, kinds in times.items():
        cells = []
        for kind in ("prefill", "decode"):
            ratios = [a / b for a, b in zip(kinds[kind], stock[kind], strict=True)]
            quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            middle = statistics.median(ratios)
            cells.append(f"{middle:.3f} ({quarters[0]:.2f}..{quarters[2]:.2f}), {statistics.median(kinds[kind]):.3f} s")
        print(f"| {name} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
