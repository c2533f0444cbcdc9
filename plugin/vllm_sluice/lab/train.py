"""Train one twin: `sluice lab train --gate none|head|element`.

Both twins of a pair get the same seed, tokenizer, data order and optimizer; only the gate differs. A run writes
`checkpoint.pt`, `log.jsonl` and `loss.svg` into its folder, and resumes from the checkpoint when it is started again
with the same settings. The tokenizer and the tokens lie in a folder of their own, which both twins share.
"""

from __future__ import annotations

import hashlib
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
    (Gu et al., arXiv 2410.10781). `short_share` of the steps, spread evenly over the training, may use shorter rows of
    `short_context` tokens, more of them, so that a step has as many tokens, more BOS and costs less attention. Spread
    evenly because a late switch to long rows makes both twins, the gated one too, grow sinks at once.
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
    short_context: int = 256
    short_share: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine down to `final_learning_rate_ratio`."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        floor = self.final_learning_rate_ratio
        return self.learning_rate * warm * (floor + (1 - floor) * cosine)

    def shape(self, step: int, context: int) -> tuple[int, int]:
        """Rows and tokens a row of a step's batch."""
        long_share = 1 - self.short_share
        if math.floor((step + 1) * long_share) > math.floor(step * long_share):
            return self.rows, context
        return self.rows * context // self.short_context, self.short_context


@dataclass(frozen=True)
class Data:
    """Tokenizer and token streams of one corpus."""

    tokenizer: Tokenizer
    train: Rows
    held_out: Rows


@dataclass(frozen=True)
class Trained:
    """What a training run has come to: the twin in float32, its recipe, the steps done and the seconds they took."""

    twin: Twin
    recipe: Recipe
    step: int
    seconds: float


def prepare_data(corpus: Path, cache: Path, config: TwinConfig, recipe: Recipe) -> Data:
    """Tokenize the corpus, or take the result from `cache` if it is there.

    Raises
    ------
    ValueError
        If `cache` holds the tokens of another corpus, vocabulary size or held-out size.
    """
    cache.mkdir(parents=True, exist_ok=True)
    tokens_file, source_file = cache / "tokens.npz", cache / "source.json"
    source = {
        "corpus_sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
        "vocab_size": config.vocab_size,
        "held_out_bytes": recipe.held_out_bytes,
    }
    if not tokens_file.exists():
        text, held_out_text = split_held_out(read_text(corpus), recipe.held_out_bytes)
        tokenizer = train_tokenizer(text, config.vocab_size)
        train, held_out = encode(tokenizer, text), encode(tokenizer, held_out_text)
        # Both twins may be started at once on one cache: whoever comes second has to see whole files or none.
        partial = cache / f"{os.getpid()}.partial.npz"
        tokenizer.save(str(partial))
        partial.replace(cache / "tokenizer.json")
        partial.write_text(json.dumps(source))
        partial.replace(source_file)
        np.savez(partial, train=train, held_out=held_out)
        partial.replace(tokens_file)
    elif source_file.exists() and (found := json.loads(source_file.read_text())) != source:
        raise ValueError(
            f"{cache} holds the tokens of another corpus or split: {found}, asked for {source}. "
            "Name another cache folder, or delete this one."
        )
    return read_data(cache, config.context)


def read_data(cache: Path, context: int) -> Data:
    """Read what `prepare_data` left in `cache`, as rows of `context` tokens."""
    tokenizer_file, tokens_file = cache / "tokenizer.json", cache / "tokens.npz"
    missing = [file.name for file in (tokenizer_file, tokens_file) if not file.exists()]
    if missing:
        raise ValueError(
            f"{cache} lacks {' and '.join(missing)}; name the cache folder that the twins were trained from."
        )
    with np.load(tokens_file) as stored:
        train, held_out = stored["train"], stored["held_out"]
    return Data(
        tokenizer=Tokenizer.from_file(str(tokenizer_file)), train=Rows(train, context), held_out=Rows(held_out, context)
    )


def read_run(folder: Path) -> Trained:
    """Read the latest checkpoint of the training run in `folder`."""
    checkpoint = folder / "checkpoint.pt"
    if not checkpoint.exists():
        raise ValueError(f"{folder} holds no checkpoint.pt; name the folder of a training run that has saved one.")
    stored = torch.load(checkpoint, weights_only=True)
    config, recipe = _settings_of(stored, checkpoint)
    twin = Twin(config)
    twin.load_state_dict(stored["model"])
    return Trained(twin, recipe, stored["step"], stored["seconds"])


def _settings_of(stored: dict[str, Any], checkpoint: Path) -> tuple[TwinConfig, Recipe]:
    config, recipe = stored["settings"]["config"], stored["settings"]["recipe"]
    try:
        return TwinConfig(**config), Recipe(**{**recipe, "betas": tuple(recipe["betas"])})
    except TypeError as error:
        raise ValueError(f"{checkpoint} has settings that this version of Sluice does not know: {error}") from None


class Run:
    """One training run in one folder, with checkpoints, a JSON log and resume."""

    def __init__(
        self, folder: Path, config: TwinConfig, recipe: Recipe, data: Data, *, compiled: bool = False
    ) -> None:
        self.folder, self.config, self.recipe, self.data = folder, config, recipe, data
        self._loss = torch.compile(self._eager_loss, dynamic=False) if compiled else self._eager_loss
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
        if _settings_of(stored, self._checkpoint) != (self.config, self.recipe):
            raise ValueError(
                f"{self._checkpoint} was written with other settings: {stored['settings']}, asked for "
                f"{self._settings()}. Use the same settings to resume, or name another folder."
            )
        self.twin.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.step, self.seconds = stored["step"], stored["seconds"]
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        self._log.write_text("".join(line + "\n" for line in kept))

    def train(self, *, until: int | None = None, evaluate_every: int = 500, checkpoint_every: int = 250) -> None:
        """Train up to step `until` (default: the recipe's last step)."""
        last = self.recipe.steps if until is None else min(until, self.recipe.steps)
        losses: list[float] = []
        begin = time.monotonic()
        with tqdm(total=last, initial=self.step, unit="step", desc=self.folder.name, mininterval=5) as bar:
            while self.step < last:
                losses.append(self._train_step())
                self.step += 1
                bar.update()
                if self.step % 50 == 0 or self.step == last:
                    record: dict[str, Any] = {"step": self.step, "train_loss": sum(losses) / len(losses)}
                    losses.clear()
                    if self.step % evaluate_every == 0 or self.step == last:
                        now = self._evaluate()
                        record |= now.as_dict()
                        bar.set_postfix(
                            loss=f"{now.loss:.3f}",
                            sink=f"{now.sink_rate:.3f}",
                            f_attn=f"{now.first_token_attention:.3f}",
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
        rows, context = self.recipe.shape(self.step, self.config.context)
        ids, targets = Rows(self.data.train.tokens, context).batch(self.recipe.seed, self.step, rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            loss = self._loss(ids, targets)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.twin.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        return loss.item()

    def _eager_loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.twin(ids).float().flatten(0, 1), targets.flatten())

    def _evaluate(self) -> Evaluation:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            return evaluate(self.twin, self.data.held_out, loss_batches=4)

    def _save(self, seconds: float) -> None:
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(
            {
                "settings": self._settings(),
                "model": self.twin.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": seconds,
            },
            partial,
        )
        partial.replace(self._checkpoint)


def _optimizer(twin: Twin, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in twin.parameters() if p.dim() > 1]
    vectors = [p for p in twin.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
