"""Engines shared by the tests of this folder: an in-process eager engine costs 3 seconds, a compiled one 30."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MODELS, passages
from tests.engine.engine import Engine

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeEngine]:
    """Build an engine, or return the one built before with the same arguments."""
    built: dict[str, Engine] = {}

    def make(model: Path, variables: dict[str, str] | None = None, **settings: Any) -> Engine:
        key = repr((str(model), variables, sorted(settings.items())))
        if key not in built:
            built[key] = Engine(model, tmp_path_factory.mktemp("run"), variables, **settings)
        return built[key]

    # Engines are never torn down one by one: that would destroy the process groups which the others share.
    yield make


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Return token ids of eight stretches of a book, 40 to 150 tokens, BOS first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "twin-gated")
    lengths = (150, 97, 64, 65, 40, 128, 77, 111)
    texts = ["\n\n".join(passages()[start : start + 6]) for start in range(3, 3 + 5 * len(lengths), 5)]
    ids = [tokenizer(text)["input_ids"][:n] for text, n in zip(texts, lengths, strict=True)]
    assert [len(i) for i in ids] == list(lengths)
    return ids
