"""Text to token rows: the corpus file, the tokenizer trained on it, and the batches drawn from it.

Every row starts with the BOS token, so that position 0 holds the same token in every row. That is by far the
largest single lever on attention sinks (Gu et al., arXiv 2410.10781, figure on a fixed token at position 1: sink
rate 74 % instead of 18 %).
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
BOS_ID = 0
EOS_ID = 1

_TOKENIZER_SAMPLE_CHARS = 12_000_000
_ENCODE_CHUNK_CHARS = 200_000


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, plain or packed with xz.

    Raises
    ------
    ValueError
        If the file is not UTF-8, or is empty.
    """
    raw = path.read_bytes()
    if path.suffix == ".xz":
        raw = lzma.decompress(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Convert it to UTF-8 first.") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text; name a file with the text to train on.")
    return text


def split_held_out(text: str, held_out_bytes: int) -> tuple[str, str]:
    """Split `text` into a training part and its last `held_out_bytes` bytes (UTF-8), kept out of training."""
    raw = text.encode("utf-8")
    if held_out_bytes <= 0 or held_out_bytes >= len(raw) // 2:
        raise ValueError(
            f"held-out size {held_out_bytes} bytes does not fit a corpus of {len(raw)} bytes; "
            "it has to be above 0 and below half of the corpus."
        )
    return (
        raw[:-held_out_bytes].decode("utf-8", errors="ignore"),
        raw[-held_out_bytes:].decode("utf-8", errors="ignore"),
    )


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts BOS in front of every encoded text.

    Parameters
    ----------
    text
        Training text; its first 12 million characters are used.
    vocab_size
        Number of tokens, the 256 bytes and the two special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = text[:_TOKENIZER_SAMPLE_CHARS]
    tokenizer.train_from_iterator(_chunks(sample), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, BOS_ID)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode `text` without BOS.

    Returns
    -------
    numpy.ndarray
        Token ids, shape [tokens], dtype uint16.
    """
    parts = [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(_chunks(text), add_special_tokens=False)]
    return np.concatenate(parts)


def _chunks(text: str) -> list[str]:
    return [text[i : i + _ENCODE_CHUNK_CHARS] for i in range(0, len(text), _ENCODE_CHUNK_CHARS)]


@dataclass(frozen=True)
class Rows:
    """Draws batches of rows `[BOS, t_1 ... t_{context-1}]` with their next-token targets from one token stream."""

    tokens: np.ndarray
    context: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.context + 1:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, which is too short for rows of {self.context}; "
                "name a longer text or a shorter context."
            )

    def batch(self, seed: int, step: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the batch of one step; a pure function of `(seed, step)`, so a resumed run sees the same data.

        Returns
        -------
        tuple of torch.Tensor
            Inputs and targets, each of shape [rows, context], dtype int64.
        """
        generator = np.random.default_rng((seed, step))
        starts = generator.integers(0, len(self.tokens) - self.context, size=rows)
        body = np.stack([self.tokens[s : s + self.context] for s in starts]).astype(np.int64)
        targets = torch.from_numpy(body)
        bos = torch.full((rows, 1), BOS_ID, dtype=torch.int64)
        return torch.cat([bos, targets[:, :-1]], dim=1), targets
