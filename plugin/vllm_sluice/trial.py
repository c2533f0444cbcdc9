"""What the two groups of a guarded trial generate: log-probabilities of their tokens, and non-finite logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from vllm_sluice.compat import Batch, logger
from vllm_sluice.control.guard import ARGUMENT, GROUPS

_NO_GROUP = -1
_SUMS = ("tokens", "total", "nonfinite", "requests", "tokens_squared", "tokens_total", "total_squared")
"""What is added up for each group; see `control.guard.Measured`."""
_ROOM = 1024
"""Requests of a trial that are remembered before those that have left the batch are forgotten."""


class TrialMeter:
    """Accumulates on the device, for the trial that the latest labelled request belongs to."""

    def __init__(self, device: torch.device) -> None:
        self._number = 0
        self._sums = torch.zeros(len(GROUPS), len(_SUMS), dtype=torch.float64, device=device)
        self._requests: dict[str, int] = {}
        self._by_request = torch.zeros(_ROOM, 2, dtype=torch.float64, device=device)  # tokens, total
        self._groups: np.ndarray | None = None
        self._rows = np.empty(0, dtype=np.int64)
        self._broken: str | None = None

    def look(self, batch: Batch, arguments: list[Mapping[str, Any]]) -> None:
        """Note the group of every request that generates a token in the coming pass, from its extra arguments."""
        self._groups = None
        labels = [str(of_request.get(ARGUMENT, "")).partition(":") for of_request in arguments]
        latest = max((int(number) for number, _, _ in labels if number), default=0)
        if latest == 0:
            return
        if latest > self._number:
            self._begin(latest)
        groups = np.full(len(labels), _NO_GROUP, dtype=np.int64)
        for index, (number, _, group) in enumerate(labels):
            if number and batch.generates[index] and int(number) == self._number:
                groups[index] = GROUPS.index(group)
        kept = [batch.requests[index] for index in np.flatnonzero(groups != _NO_GROUP)]
        self._rows = np.array(self._places(kept, batch.requests), dtype=np.int64)
        self._groups = groups

    def _begin(self, number: int) -> None:
        self._number = number
        self._sums.zero_()
        self._requests.clear()
        self._broken = None

    def _places(self, names: list[str], batch: list[str]) -> list[int]:
        """Return the rows of `_by_request` of some requests of a batch; a new request gets a row of zeros.

        A request that comes back after it was forgotten counts as another one.
        """
        new = [name for name in names if name not in self._requests]
        if new and len(self._requests) + len(new) > len(self._by_request):
            present = set(batch)
            self._requests = {name: row for name, row in self._requests.items() if name in present}
            if (more := len(self._requests) + len(new) - len(self._by_request)) > 0:
                grown = self._by_request.new_zeros(len(self._by_request) + max(more, _ROOM), 2)
                grown[: len(self._by_request)] = self._by_request
                self._by_request = grown
        if new:
            taken = set(self._requests.values())
            free = [row for row in range(len(self._by_request)) if row not in taken][: len(new)]
            self._requests.update(zip(new, free, strict=True))
            self._by_request.index_fill_(0, torch.tensor(free).to(self._by_request.device, non_blocking=True), 0.0)
        return [self._requests[name] for name in names]

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
            self._add(kept, output.sampled_token_ids[:, 0].long()[rows], groups[groups != _NO_GROUP], self._rows)
        except Exception as error:
            self._fail(error)
        return output

    def _add(self, logits: torch.Tensor, tokens: torch.Tensor, groups: np.ndarray, rows: np.ndarray) -> None:
        chosen = logits.gather(1, tokens.clamp_min(0).unsqueeze(1))[:, 0].double()
        values = chosen - torch.cat([torch.logsumexp(part.float(), dim=-1) for part in logits.split(64)]).double()
        counted = torch.isfinite(values) & (tokens >= 0)
        bad = ~counted & (tokens >= 0)
        token = torch.stack([counted.double(), torch.where(counted, values, 0.0)], dim=1)
        where = torch.from_numpy(rows).to(token.device, non_blocking=True)
        before = self._by_request.index_select(0, where)
        after = before + token
        self._by_request.index_copy_(0, where, after)
        (n, total), (m, former) = after.unbind(dim=1), before.unbind(dim=1)
        first = (m == 0) & (n == 1)
        squares = [n * n - m * m, n * total - m * former, total * total - former * former]
        row = torch.cat([token, torch.stack([bad.double(), first.double(), *squares], dim=1)], dim=1)
        group = torch.from_numpy(groups).to(row.device, non_blocking=True)
        for index in range(len(GROUPS)):
            self._sums[index] += (row * (group == index).unsqueeze(1)).sum(dim=0)

    def _fail(self, error: Exception) -> None:
        """Measure no more in this trial; the server goes on, and the guard is told."""
        self._broken = f"{type(error).__name__}: {error}"
        logger.exception("sluice: the guard's trial cannot be measured")

    def measured(self) -> dict[str, Any]:
        """Return the trial's number, and the fields of `control.guard.Measured` by group.

        `broken` says why it could not be measured, if so.
        """
        groups = {
            group: dict(zip(_SUMS, sums, strict=True))
            for group, sums in zip(GROUPS, self._sums.tolist(), strict=True)
        }
        return {"number": self._number, "groups": groups, "broken": self._broken}
