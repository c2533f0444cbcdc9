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


def batch(generates: list[bool]) -> Batch:
    names = [f"row {index}" for index in range(len(generates))]
    count = np.arange(len(generates) + 1)
    rows = torch.arange(len(generates))
    return Batch(len(names), names, count, count[:-1], count[:-1], np.array(generates), rows, None, {}, list)


def generate(meter: TrialMeter, requests: list[tuple[str | None, bool]], logits: torch.Tensor) -> list[int]:
    """Run a pass of requests, each with its label and whether it generates; return the tokens."""
    arguments: list[dict[str, Any]] = [{} if label is None else {trial.ARGUMENT: label} for label, _ in requests]
    meter.look(batch([generates for _, generates in requests]), arguments)
    tokens = torch.distributions.Categorical(logits=torch.nan_to_num(logits)).sample()[:, None]
    assert meter.sample(logits, lambda: SimpleNamespace(sampled_token_ids=tokens)).sampled_token_ids is tokens
    return tokens[:, 0].tolist()


def groups(meter: TrialMeter) -> dict[str, Measured]:
    return {group: Measured(**sums) for group, sums in meter.measured()["groups"].items()}


class Expected:
    """The same sums over lists of tokens, in float64."""

    def __init__(self) -> None:
        self.requests: dict[str, dict[str, list[float]]] = {group: {} for group in GROUPS}

    def generate(self, meter: TrialMeter, requests: list[tuple[str | None, bool]]) -> None:
        logits = torch.randn(len(requests), 30) * 3
        tokens = generate(meter, requests, logits)
        for (label, generates), token, row in zip(requests, tokens, logits.double(), strict=True):
            if label is not None and generates:
                _, group, name = label.split(":", 2)
                values = self.requests[group].setdefault(name, [])
                values.append(float(torch.log_softmax(row, dim=-1)[token]))

    def check(self, meter: TrialMeter) -> None:
        assert meter.measured()["broken"] is None
        for group, found in groups(meter).items():
            reference = measured(list(self.requests[group].values()))
            # logsumexp of float32 logits: up to 1e-6 for a token, however likely it is.
            assert vars(found) == pytest.approx(vars(reference), rel=1e-5, abs=1e-4)
            assert found.error == pytest.approx(reference.error, rel=1e-3, abs=1e-3)


def test_sums_over_requests_that_come_and_go(monkeypatch):
    """More requests than there is room for, in rows that move; some have up to three answers."""
    monkeypatch.setattr(trial, "_ROOM", 4)
    monkeypatch.setattr(trial, "_ABSENT_PASSES", 30)
    random = np.random.default_rng()
    meter, expected = TrialMeter(torch.device("cpu")), Expected()
    running: list[str | None] = []
    for step in range(120):
        running = [label for label in running if random.random() < 0.85]
        for index in range(random.integers(0, 4)):
            group = (*GROUPS, None)[random.integers(3)]
            running += random.integers(1, 4) * [group and f"5:{group}:cmpl-{step}:{index}"]
        random.shuffle(running)  # type: ignore[arg-type]
        if running:
            expected.generate(meter, [(label, bool(random.random() < 0.8)) for label in running])
    assert meter.measured()["number"] == 5
    expected.check(meter)
    labels = {name for requests in expected.requests.values() for name in requests}
    assert len(meter._by_request) < len(labels)  # the room of those that ended was used again


def test_requests_of_a_batch_that_is_not_in_this_pass_are_remembered(monkeypatch):
    """As with pipeline stages, where batches take turns."""
    monkeypatch.setattr(trial, "_ROOM", 4)
    meter, expected = TrialMeter(torch.device("cpu")), Expected()
    for step in range(40):
        turn = "ab"[step % 2]
        expected.generate(meter, [(f"1:{group}:{group}-{turn}-{i}", True) for group in GROUPS for i in range(5)])
    expected.check(meter)
    assert {group: found.requests for group, found in groups(meter).items()} == {"rest": 10, "canary": 10}


def test_a_row_that_is_not_finite_is_no_token():
    meter = TrialMeter(torch.device("cpu"))
    logits = torch.randn(3, 20)
    logits[1, 4] = torch.nan
    logits[2] = torch.inf
    asked: list[tuple[str | None, bool]] = [("1:rest:a", True), ("1:canary:b", True), ("1:canary:c", True)]
    generate(meter, asked, logits)
    found = groups(meter)
    assert (found["rest"].tokens, found["rest"].requests, found["rest"].nonfinite) == (1, 1, 0)
    assert vars(found["canary"]) == vars(Measured(nonfinite=2))
    generate(meter, asked, torch.randn(3, 20))
    after = groups(meter)["canary"]
    assert (after.tokens, after.requests, after.nonfinite) == (2, 2, 2)


def test_a_newer_trial_begins_with_nothing_and_an_older_one_adds_nothing():
    meter = TrialMeter(torch.device("cpu"))
    generate(meter, [("1:rest:a", True), ("1:canary:b", True)], torch.randn(2, 20))
    generate(meter, [("1:rest:a", True), ("2:canary:c", True)], torch.randn(2, 20))
    generate(meter, [("1:rest:a", True), ("2:canary:c", True)], torch.randn(2, 20))
    found = groups(meter)
    assert meter.measured()["number"] == 2
    assert (found["rest"].tokens, found["canary"].tokens, found["canary"].requests) == (0, 2, 1)
    assert found["canary"].tokens_squared == 4


def test_what_cannot_be_measured_costs_no_pass_and_ends_with_the_trial(monkeypatch):
    meter, expected = TrialMeter(torch.device("cpu")), Expected()
    with monkeypatch.context() as broken:
        broken.setattr(torch, "tensor", lambda *_: 1 / 0)
        generate(meter, [("1:rest:a", True)], torch.randn(1, 20))
    generate(meter, [("1:rest:a", True)], torch.randn(1, 20))
    assert meter.measured()["broken"] == "ZeroDivisionError: division by zero"
    assert groups(meter)["rest"].tokens == 0
    expected.generate(meter, [("2:rest:a", True)])
    expected.check(meter)
