"""What a guarded trial adds up, against sums over lists of tokens, on random batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_guard import measured
from vllm_sluice import trial
from vllm_sluice.compat import Batch
from vllm_sluice.control.guard import GROUPS, Measured
from vllm_sluice.trial import TrialMeter


def batch(requests: list[str], generates: list[bool]) -> Batch:
    count = np.arange(len(requests) + 1)
    rows = torch.arange(len(requests))
    return Batch(len(requests), requests, count, count[:-1], count[:-1], np.array(generates), rows, None, {}, list)


def generate(meter: TrialMeter, requests: list[tuple[str, str | None, bool]], logits: torch.Tensor) -> list[int]:
    """Run a pass of requests, each with a name, its label and whether it generates; return the tokens."""
    arguments: list[dict[str, Any]] = [{} if label is None else {trial.ARGUMENT: label} for _, label, _ in requests]
    meter.look(batch([name for name, _, _ in requests], [generates for _, _, generates in requests]), arguments)
    tokens = torch.distributions.Categorical(logits=torch.nan_to_num(logits)).sample()[:, None]
    assert meter.sample(logits, lambda: SimpleNamespace(sampled_token_ids=tokens)).sampled_token_ids is tokens
    return tokens[:, 0].tolist()


def groups(meter: TrialMeter) -> dict[str, Measured]:
    return {group: Measured(**sums) for group, sums in meter.measured()["groups"].items()}


def test_sums_over_requests_that_come_and_go(monkeypatch):
    """More requests than there is room for, in rows that move; a request that ended does not come back."""
    monkeypatch.setattr(trial, "_ROOM", 4)
    random = np.random.default_rng()
    meter = TrialMeter(torch.device("cpu"))
    expected: dict[str, dict[str, list[float]]] = {group: {} for group in GROUPS}
    running: list[tuple[str, str | None]] = []
    for step in range(60):
        running = [request for request in running if random.random() < 0.85]
        for index in range(random.integers(0, 4)):
            group = (*GROUPS, None)[random.integers(3)]
            running.append((f"{step}-{index}", group and f"5:{group}"))
        random.shuffle(running)
        if not running:
            continue
        asked = [(name, label, bool(random.random() < 0.8)) for name, label in running]
        logits = torch.randn(len(asked), 30) * 3
        tokens = generate(meter, asked, logits)
        for (name, label, generates), token, row in zip(asked, tokens, logits.double(), strict=True):
            if label is not None and generates:
                values = expected[label.partition(":")[2]].setdefault(name, [])
                values.append(float(torch.log_softmax(row, dim=-1)[token]))
    assert meter.measured()["number"] == 5
    assert meter.measured()["broken"] is None
    for group, found in groups(meter).items():
        reference = measured(list(expected[group].values()))
        assert vars(found) == pytest.approx(vars(reference), rel=1e-5)
        assert found.error == pytest.approx(reference.error, rel=1e-3)


def test_a_row_that_is_not_finite_is_no_token():
    meter = TrialMeter(torch.device("cpu"))
    logits = torch.randn(3, 20)
    logits[1, 4] = torch.nan
    logits[2] = torch.inf
    asked = [("a", "1:rest", True), ("b", "1:canary", True), ("c", "1:canary", True)]
    generate(meter, asked, logits)
    found = groups(meter)
    assert (found["rest"].tokens, found["rest"].requests, found["rest"].nonfinite) == (1, 1, 0)
    assert vars(found["canary"]) == vars(Measured(nonfinite=2))
    logits = torch.randn(3, 20)
    generate(meter, asked, logits)
    found = groups(meter)["canary"]
    assert (found.tokens, found.requests, found.nonfinite) == (2, 2, 2)


def test_a_newer_trial_begins_with_nothing_and_an_older_one_adds_nothing():
    meter = TrialMeter(torch.device("cpu"))
    generate(meter, [("a", "1:rest", True), ("b", "1:canary", True)], torch.randn(2, 20))
    generate(meter, [("a", "1:rest", True), ("c", "2:canary", True)], torch.randn(2, 20))
    generate(meter, [("a", "1:rest", True), ("c", "2:canary", True)], torch.randn(2, 20))
    found = groups(meter)
    assert meter.measured()["number"] == 2
    assert (found["rest"].tokens, found["canary"].tokens, found["canary"].requests) == (0, 2, 1)
    assert found["canary"].tokens_squared == 4
