"""Which rows of the coming forward pass are real tokens, and of what kind; shared by all probes of a rank.

The compiled graph reads `classes(probe)[:n]`. It says `IGNORED` everywhere except during a real forward pass, so that
padding, warm-up, profiling and graph capture leave no trace in any statistic.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_sluice.compat import Batch
from vllm_sluice.ops.residual import DELIMITER, IGNORED, OTHER, START


class Rows:
    """Position classes of the rows of a batch, int8 on the device, [max_tokens]; a copy for every probe."""

    def __init__(self, max_tokens: int, delimiter_ids: list[int], vocabulary: int, device: torch.device) -> None:
        self.max_tokens = self._marked = max_tokens
        self._classes: dict[str, torch.Tensor] = {}
        self._class_of = torch.full((vocabulary,), OTHER, dtype=torch.int8, device=device)
        self._class_of[torch.tensor(delimiter_ids, dtype=torch.int64, device=device)] = DELIMITER

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._class_of.device

    def classes(self, probe: str) -> torch.Tensor:
        """Return the position classes that a probe reads in the graph; the same tensor for the same probe."""
        if probe not in self._classes:
            ignored = torch.full((self.max_tokens,), IGNORED, dtype=torch.int8, device=self.device)
            self._classes[probe] = ignored
        return self._classes[probe]

    def mark(self, batch: Batch, probes: list[str]) -> None:
        """Classify the real rows of a batch, for the named probes only."""
        n = self._marked = batch.tokens
        if batch.ids is None:
            found = torch.full((n,), OTHER, dtype=torch.int8, device=self.device)
        else:
            found = self._class_of.index_select(0, batch.ids[:n].clamp(0, len(self._class_of) - 1))
        found.masked_fill_(batch.positions[:n] == 0, START)
        for probe in probes:
            if probe in self._classes:
                self._classes[probe][:n] = found

    def clear(self) -> None:
        """Ignore all rows again."""
        for classes in self._classes.values():
            classes[: self._marked].fill_(IGNORED)


def delimiter_ids(texts: list[str], delimiters: tuple[str, ...]) -> list[int]:
    """Return the ids whose text, blanks stripped, is one of `delimiters`."""
    wanted = set(delimiters)
    return [index for index, text in enumerate(texts) if text.strip(" ") in wanted]


def spread(tokens: int, sample: torch.Tensor, chosen: torch.Tensor) -> None:
    """Choose rows of a batch to sample, evenly spread; without a host synchronisation.

    Parameters
    ----------
    tokens
        Real rows of the batch.
    sample
        Filled with the rows, int64, [size]; rows beyond the batch become 0.
    chosen
        Filled with whether each of them counts: 1 or True for the first min(size, tokens), [size].
    """
    size = len(sample)
    count = min(size, tokens)
    rows = np.zeros(size, dtype=np.int64)
    rows[:count] = ((np.arange(count) + 0.5) * tokens / count).astype(np.int64)
    sample.copy_(torch.from_numpy(rows), non_blocking=True)
    chosen.copy_(torch.from_numpy(np.arange(size) < count), non_blocking=True)
