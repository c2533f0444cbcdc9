"""Requests' own statistics: rows, records and the summary that ranks' parts become."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_sluice.compat import OpenAIRequest
from vllm_sluice.control.per_request import RequestCheck, ask_for_statistics
from vllm_sluice.ops.residual import IGNORED, OTHER, row_maxima
from vllm_sluice.probes import requests
from vllm_sluice.telemetry.request_summary import ARGUMENT, is_ticket, new_ticket, summarise

ASK = {"sluice.stats": True}


def check(**settings: object) -> RequestCheck:
    return RequestCheck(True, ["gate"], lambda: {"gate"}, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_maxima_against_plain_loops(dtype):
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    hidden = torch.randn(9, 40, generator=generator).to(dtype)
    hidden[2, 7], hidden[3, 5], hidden[4] = torch.nan, torch.inf, torch.nan
    hidden[5, 11] = -50.0
    classes = torch.full((9,), OTHER, dtype=torch.int8)
    classes[6] = IGNORED
    largest, channel = torch.full((12,), -1.0), torch.full((12,), -1, dtype=torch.int64)
    row_maxima(hidden, classes, largest, channel)
    for row in range(9):
        magnitudes = [abs(v) if np.isfinite(v) and row != 6 else 0.0 for v in hidden[row].double().tolist()]
        assert largest[row].item() == max(magnitudes)
        assert channel[row].item() == magnitudes.index(max(magnitudes))
    assert largest[9:].tolist() == [-1.0] * 3


def test_parts_of_tensor_parallel_ranks_and_pipeline_stages_become_one_summary():
    first = {
        "tokens": 10,
        "probes": {
            "residual": {"0": [3.0, 4, 17], "1": [9.0, 0, 2]},
            "attention": {"0": [6.0, 20, 10], "1": [1.0, 20, 10]},
            "gate": {"0": [2.0, 20]},
        },
    }
    second = {
        "tokens": 10,
        "probes": {"residual": {"0": [3.0, 4, 17], "1": [9.0, 0, 2]}, "attention": {"0": [2.0, 20, 10]},
                   "gate": {"0": [4.0, 20]}},
    }  # fmt: skip
    last_stage = {"tokens": 10, "probes": {"residual": {"10": [8.0, 1, 1]}, "attention": {"10": [0.0, 20, 10]}}}
    summary = summarise([first, {}, second, last_stage])
    assert summary == {
        "tokens": 10,
        "queries_sampled": 10,
        "max_activation": {"value": 9.0, "layer": 1, "position": 0, "channel": 2},
        "sink_mass": pytest.approx((8 / 40 + 1 / 20 + 0) / 3),
        "gate_mean": pytest.approx(6 / 40),
        "layers": {
            "max_activation": {"0": 3.0, "1": 9.0, "10": 8.0},
            "sink_mass": {"0": pytest.approx(0.2), "1": 0.05, "10": 0.0},
            "gate_mean": {"0": pytest.approx(0.15)},
        },
    }


def test_what_is_missing_is_said():
    assert summarise([{}, {}]) == {"error": "no probe has looked at this request; are the probes on?"}
    part = {"tokens": 1, "probes": {}}
    assert summarise([part, {"error": "AttributeError: no runtime"}]) == {"error": "AttributeError: no runtime"}
    assert summarise([part]) == {"tokens": 1, "layers": {}}


def test_asking_gives_a_ticket_of_its_own_and_keeps_the_other_arguments():
    assert ask_for_statistics({}) is None
    assert ask_for_statistics({"sluice.stats": False, "sluice.gate": True}) is None
    first, second = (ask_for_statistics({**ASK, "other": 1}) for _ in range(2))
    assert first[1] != second[1]
    assert first[0] == {"sluice.stats": first[1], "other": 1}
    assert ask_for_statistics(first[0]) is None  # once is enough
    assert is_ticket(first[1])
    assert check().admit("r", first[0], None) == (first[0], None)  # no cache of its own


@pytest.mark.parametrize("value", ["yes", 2, 0.5, None, "0" * 31])
def test_the_value_is_true_or_false(value):
    with pytest.raises(Exception, match=r"sluice\.stats: true or false expected, found"):
        check().validate({"sluice.stats": value})


def test_answers_that_cannot_carry_statistics_are_refused():
    validate = check().validate_openai
    validate(OpenAIRequest(ASK))
    validate(OpenAIRequest({"sluice.stats": False}, streamed=True, prompts=3))
    with pytest.raises(Exception, match=r"sluice\.stats: a streamed answer cannot carry them; drop stream"):
        validate(OpenAIRequest(ASK, streamed=True))
    with pytest.raises(Exception, match=r"sluice\.stats: one answer to 3 prompts cannot carry them"):
        validate(OpenAIRequest(ASK, prompts=3))
    with pytest.raises(Exception, match=r"sluice\.stats: vLLM's beam search ignores vllm_xargs"):
        validate(OpenAIRequest(ASK, beam_search=True))
    with pytest.raises(Exception, match=r"sluice\.stats: no probe is configured"):
        check(probes=False).validate(ASK)
    with pytest.raises(Exception, match="a streamed input cannot choose"):
        check().admit("r", ASK, None, True)
    with pytest.raises(Exception, match=r"unknown key; known: sluice\.gate, sluice\.stats"):
        check().validate({"sluice.statistics": True})


def test_records_of_aborted_requests_make_room(monkeypatch):
    monkeypatch.setattr(requests, "_MOST", 3)
    probe = SimpleNamespace(kind="some", request_record=lambda: {"sum": torch.zeros(1)}, request_values=dict)
    ledger = requests.RequestLedger([probe])
    batch = SimpleNamespace(starts=np.array([0, 2, 5]))
    tickets = [new_ticket() for _ in range(5)]
    for ticket in (*tickets[:3], tickets[0], *tickets[3:]):  # the first is still running
        ((records, rows),) = ledger.look(batch, [{}, {ARGUMENT: ticket}])
        records.tokens += rows.stop - rows.start
    assert rows == slice(2, 5)
    assert ledger.close(tickets[0])["tokens"] == 6
    assert ledger.close(tickets[0]) is None
    assert [ledger.close(ticket) is None for ticket in tickets[1:]] == [True, True, False, False]
    assert ledger.look(batch, [ASK, {"sluice.stats": 1}]) == []  # without a ticket nobody would ask for it
