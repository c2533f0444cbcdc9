"""Train one twin: `sluice lab train --gate none|head|element`.

Both twins of a pair get the same seed, tokenizer, data order and optimizer; only the gate differs. A run writes
into its folder `tokenizer.json`, `tokens.npy`, `checkpoint.pt`, `log.jsonl` and `loss.svg`, and resumes from the
checkpoint when it is started again with the same settings.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

from vllm_sluice.lab.corpus import Rows, encode, read_text, split_held_out, train_tokenizer
from vllm_sluice.lab.evaluate import Evaluation, evaluate
from vllm_sluice.lab.losscurve import write_loss_curve
from vllm_sluice.lab.twin import Twin, TwinConfig


@dataclass(frozen=True)
class Recipe:
    """How a twin is trained; the same for both twins of a pair.

    The lever for sinks at this scale is the number of steps, then weight decay 0.5 and BOS in every row
    (Gu et al., arXiv 2410.10781).
    """

    steps: int = 12_000
    rows: int = 3
    learning_rate: float = 2e-3
    final_learning_rate_ratio: float = 0.1
    warmup_steps: int = 200
    weight_decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    seed: int = 0
    held_out_bytes: int = 2_000_000
    bfloat16: bool = True

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine down to `final_learning_rate_ratio`."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        floor = self.final_learning_rate_ratio
        return self.learning_rate * warm * (floor + (1 - floor) * cosine)


@dataclass(frozen=True)
class Data:
    """Tokenizer and token streams of one corpus."""

    tokenizer: Tokenizer
    train: Rows
    held_out: Rows


def prepare_data(corpus: Path, cache: Path, config: TwinConfig, recipe: Recipe) -> Data:
    """Tokenize the corpus, or take the result from `cache` if it is there."""
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer_file, tokens_file = cache / "tokenizer.json", cache / "tokens.npz"
    if not tokens_file.exists():
        text, held_out_text = split_held_out(read_text(corpus), recipe.held_out_bytes)
        tokenizer = train_tokenizer(text, config.vocab_size)
        tokenizer.save(str(tokenizer_file))
        np.savez(tokens_file, train=encode(tokenizer, text), held_out=encode(tokenizer, held_out_text))
    with np.load(tokens_file) as stored:
        train, held_out = stored["train"], stored["held_out"]
    return Data(
        tokenizer=Tokenizer.from_file(str(tokenizer_file)),
        train=Rows(train, config.context),
        held_out=Rows(held_out, config.context),
    )


class Run:
    """One training run in one folder, with checkpoints, a JSON log and resume."""

    def __init__(self, folder: Path, config: TwinConfig, recipe: Recipe, data: Data) -> None:
        self.folder, self.config, self.recipe, self.data = folder, config, recipe, data
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.twin = Twin(config)
        self.optimizer = _optimizer(self.twin, recipe)
        self.step = 0
        self.seconds = 0.0
        self._resume()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"

    def _settings(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "recipe": {**asdict(self.recipe), "betas": list(self.recipe.betas)}}

    def _resume(self) -> None:
        if not self._checkpoint.exists():
            self._log.write_text("")
            return
        stored = torch.load(self._checkpoint, weights_only=True)
        if stored["settings"] != self._settings():
            raise ValueError(
                f"{self._checkpoint} was written with other settings: {stored['settings']}, asked for "
                f"{self._settings()}. Use the same settings to resume, or name another folder."
            )
        self.twin.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.step, self.seconds = stored["step"], stored["seconds"]
        kept = [line for line in self._log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
        self._log.write_text("".join(line + "\n" for line in kept))

    def train(self, *, until: int | None = None, evaluate_every: int = 500, checkpoint_every: int = 250) -> None:
        """Train up to step `until` (default: the recipe's last step)."""
        last = min(until or self.recipe.steps, self.recipe.steps)
        losses: list[float] = []
        begin = time.monotonic()
        with tqdm(total=last, initial=self.step, unit="step", desc=self.folder.name, mininterval=5) as bar:
            while self.step < last:
                losses.append(self._train_step())
                self.step += 1
                bar.update()
                if self.step % 50 == 0:
                    record: dict[str, Any] = {"step": self.step, "train_loss": sum(losses) / len(losses)}
                    losses.clear()
                    if self.step % evaluate_every == 0 or self.step == last:
                        now = self._evaluate()
                        record |= now.as_dict()
                        bar.set_postfix(
                            loss=f"{now.loss:.3f}", sink=f"{now.sink_rate:.3f}", f_attn=f"{now.first_token_attention:.3f}",
                            ratio=f"{now.first_token_ratio:.0f}",
                        )
                    record["seconds"] = round(self.seconds + time.monotonic() - begin, 1)
                    with self._log.open("a") as log:
                        log.write(json.dumps(record) + "\n")
                if self.step % checkpoint_every == 0 or self.step == last:
                    self._save(self.seconds + time.monotonic() - begin)
        write_loss_curve(self._log, self.folder / "loss.svg")

    def _train_step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        ids, targets = self.data.train.batch(self.recipe.seed, self.step, self.recipe.rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            loss = F.cross_entropy(self.twin(ids).float().flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.twin.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        return loss.item()

    def _evaluate(self) -> Evaluation:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            return evaluate(self.twin, self.data.held_out, loss_batches=4)

    def _save(self, seconds: float) -> None:
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(
            {
                "settings": self._settings(), "model": self.twin.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": seconds,
            },
            partial,
        )
        os.replace(partial, self._checkpoint)


def _optimizer(twin: Twin, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in twin.parameters() if p.dim() > 1]
    vectors = [p for p in twin.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
