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
"""Requests that are remembered before room is made."""
_ABSENT_PASSES = 1000
"""A request that had no token for so many passes has ended; should it go on, it counts as another one."""


class TrialMeter:
    """Accumulates on the device, for the trial that the latest labelled request belongs to."""

    def __init__(self, device: torch.device) -> None:
        self._number = 0
        self._sums = torch.zeros(len(GROUPS), len(_SUMS), dtype=torch.float64, device=device)
        self._by_request = torch.zeros(_ROOM, 2, dtype=torch.float64, device=device)  # tokens, total
        self._requests: dict[str, tuple[int, int]] = {}  # row of `_by_request`, pass of the last token
        self._free = list(range(_ROOM))
        self._passes = 0
        self._groups: np.ndarray | None = None
        self._rows = np.empty(0, dtype=np.int64)
        self._broken: str | None = None

    def look(self, batch: Batch, arguments: list[Mapping[str, Any]]) -> None:
        """Note the group of every request that generates a token in the coming pass, from its extra arguments."""
        self._groups = None
        if not any(ARGUMENT in of_request for of_request in arguments):  # no trial: the usual pass
            return
        labels = [str(of_request.get(ARGUMENT, "")).split(":", 2) for of_request in arguments]
        if (latest := max(int(label[0]) for label in labels if label[0])) > self._number:
            self._begin(latest)
        if self._broken:
            return
        groups = np.full(len(labels), _NO_GROUP, dtype=np.int64)
        names = []
        for index, label in enumerate(labels):
            if label[0] and batch.generates[index] and int(label[0]) == self._number:
                groups[index] = GROUPS.index(label[1])
                names.append(label[2])
        try:
            self._rows = self._places(names)
            self._groups = groups
        except Exception as error:  # no room on the device, say
            self._fail(error)

    def _begin(self, number: int) -> None:
        self._number = number
        self._sums.zero_()
        self._requests.clear()
        self._free = list(range(len(self._by_request)))
        self._broken = None

    def _places(self, names: list[str]) -> np.ndarray:
        """Return the rows of `_by_request` of the requests of a pass; a new request gets a row of zeros."""
        self._passes += 1
        new = [name for name in dict.fromkeys(names) if name not in self._requests]
        if len(new) > len(self._free):
            self._make_room(len(new))
        rows = [self._free.pop() for _ in new]
        if new:
            self._by_request.index_fill_(0, torch.tensor(rows).to(self._by_request.device, non_blocking=True), 0.0)
            self._requests.update((name, (row, self._passes)) for name, row in zip(new, rows, strict=True))
        for name in names:
            self._requests[name] = (self._requests[name][0], self._passes)
        return np.array([self._requests[name][0] for name in names], dtype=np.int64)

    def _make_room(self, more: int) -> None:
        """Forget the requests that have ended; with room for `more` others, or twice as much room, afterwards."""
        ended = [name for name, (_, seen) in self._requests.items() if self._passes - seen > _ABSENT_PASSES]
        self._free += [self._requests.pop(name)[0] for name in ended]
        if len(self._free) < more:
            before = len(self._by_request)
            grown = self._by_request.new_zeros(2 * before + more, 2)
            grown[:before] = self._by_request
            self._by_request = grown
            self._free += range(before, len(grown))

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
        token = torch.stack([counted.double(), torch.where(counted, values, 0.0), bad.double()], dim=1)
        # Several answers to one prompt are one request: they are alike, and came into their group together.
        places, first, of_row = np.unique(rows, return_index=True, return_inverse=True)
        where, request, group = (
            torch.from_numpy(index).to(token.device, non_blocking=True) for index in (places, of_row, groups[first])
        )
        added = token.new_zeros(len(places), 3).index_add_(0, request, token)
        before = self._by_request.index_select(0, where)
        after = before + added[:, :2]
        self._by_request.index_copy_(0, where, after)
        (n, total), (m, former) = after.unbind(dim=1), before.unbind(dim=1)
        new = (m == 0) & (n > 0)
        squares = [n * n - m * m, n * total - m * former, total * total - former * former]
        row = torch.cat([added, torch.stack([new.double(), *squares], dim=1)], dim=1)
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
