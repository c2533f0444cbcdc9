"""What the two groups of a guarded trial generate: log-probabilities of their tokens, and non-finite logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from vllm_sluice.compat import Batch, logger
from vllm_sluice.control.guard import ARGUMENT, GROUPS

_NO_GROUP = -1


class TrialMeter:
    """Accumulates on the device, for the trial that the latest labelled request belongs to."""

    def __init__(self, device: torch.device) -> None:
        self._number = 0
        self._sums = torch.zeros(len(GROUPS), 4, dtype=torch.float64, device=device)
        self._groups: np.ndarray | None = None
        self._broken: str | None = None

    def look(self, batch: Batch, arguments: list[Mapping[str, Any]]) -> None:
        """Note the group of every request that generates a token in the coming pass, from its extra arguments."""
        self._groups = None
        labels = [of_request.get(ARGUMENT) for of_request in arguments]
        if not any(labels):
            return
        groups = np.full(len(labels), _NO_GROUP, dtype=np.int64)
        for index, label in enumerate(labels):
            if label is None or not batch.generates[index]:
                continue
            number, _, group = str(label).partition(":")
            if int(number) > self._number:
                self._number = int(number)
                self._sums.zero_()
                self._broken = None
            if int(number) == self._number:
                groups[index] = GROUPS.index(group)
        self._groups = groups

    def sample(self, logits: torch.Tensor | None, run: Callable[[], Any]) -> Any:
        """Run the sampler and add what it chose; `logits`, [requests, vocabulary], are those of the model.

        The result of `run` holds `sampled_token_ids`, [requests, 1]. Nothing waits for the device.
        """
        groups, self._groups = self._groups, None
        if groups is None or logits is None or len(groups) != len(logits) or self._broken:
            return run()
        try:
            rows = torch.from_numpy(np.flatnonzero(groups != _NO_GROUP)).to(logits.device, non_blocking=True)
            kept = logits.index_select(0, rows)  # a copy: the sampler may change logits in place
        except Exception as error:
            self._fail(error)
            return run()
        output = run()
        try:
            self._add(kept, output.sampled_token_ids[:, 0].long()[rows], groups[groups != _NO_GROUP])
        except Exception as error:
            self._fail(error)
        return output

    def _add(self, logits: torch.Tensor, tokens: torch.Tensor, groups: np.ndarray) -> None:
        chosen = logits.gather(1, tokens.clamp_min(0).unsqueeze(1))[:, 0].double()
        values = chosen - torch.cat([torch.logsumexp(part.float(), dim=-1) for part in logits.split(64)]).double()
        counted = torch.isfinite(values) & (tokens >= 0)
        values = torch.where(counted, values, 0.0)
        bad = ~counted & (tokens >= 0)
        row = torch.stack([counted.double(), values, values * values, bad.double()], dim=1)
        group = torch.from_numpy(groups).to(row.device, non_blocking=True)
        for index in range(len(GROUPS)):
            self._sums[index] += (row * (group == index).unsqueeze(1)).sum(dim=0)

    def _fail(self, error: Exception) -> None:
        """Measure no more in this trial; the server goes on, and the guard is told."""
        self._broken = f"{type(error).__name__}: {error}"
        logger.exception("sluice: the guard's trial cannot be measured")

    def measured(self) -> dict[str, Any]:
        """Return the trial's number and, by group, tokens, sum and sum of squares of log-probabilities, bad rows.

        `broken` says why it could not be measured, if so.
        """
        sums = self._sums.tolist()
        groups = {
            name: [int(tokens), total, squares, int(bad)]
            for name, (tokens, total, squares, bad) in zip(GROUPS, sums, strict=True)
        }
        return {"number": self._number, "groups": groups, "broken": self._broken}
