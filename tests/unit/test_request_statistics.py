"""Requests' own statistics: rows, records and the summary that ranks' parts become."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.unit.test_per_request import there
from vllm_sluice.compat import OpenAIRequest
from vllm_sluice.control.per_request import RequestCheck, ask_for_statistics
from vllm_sluice.ops.residual import IGNORED, OTHER, row_maxima
from vllm_sluice.probes import requests
from vllm_sluice.probes.attention import fair_shares
from vllm_sluice.telemetry.request_summary import ARGUMENT, is_ticket, new_ticket, summarise

ASK = {"sluice.stats": True}


def check(probes: tuple[str, ...] = ("residual",)) -> RequestCheck:
    return RequestCheck(True, ["gate"], there("gate", probes=probes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_maxima_against_plain_loops(dtype):
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    hidden = torch.randn(9, 40, generator=generator).to(dtype)
    hidden[2, 7], hidden[3, 5], hidden[4] = torch.nan, torch.inf, torch.nan
    hidden[5, 11] = -50.0
    classes = torch.full((9,), OTHER, dtype=torch.int8)
    classes[6] = IGNORED
    largest, channel = torch.full((12,), -7.0), torch.full((12,), -7, dtype=torch.int64)
    nonfinite = channel.clone()
    row_maxima(hidden, classes, largest, channel, nonfinite)
    for row in range(9):
        magnitudes = [abs(v) if np.isfinite(v) and row != 6 else -1.0 for v in hidden[row].double().tolist()]
        assert largest[row].item() == max(magnitudes)
        assert channel[row].item() == magnitudes.index(max(magnitudes))
        assert nonfinite[row].item() == {2: 1, 3: 1, 4: 40}.get(row, 0)
    assert largest[9:].tolist() == [-7.0] * 3


def test_parts_of_tensor_parallel_ranks_and_pipeline_stages_become_one_summary():
    first = {
        "tokens": 10,
        "probes": {
            "residual": {"0": [3.0, 4, 17, 0], "1": [9.0, 0, 2, 5]},
            "attention": {"0": [6.0, 20, 10], "1": [1.0, 20, 10]},
            "gate": {"0": [2.0, 20]},
        },
    }
    second = {
        "tokens": 10,
        "probes": {"residual": {"0": [3.0, 4, 17, 0], "1": [9.0, 0, 2, 5]}, "attention": {"0": [2.0, 20, 10]},
                   "gate": {"0": [4.0, 20]}},
    }  # fmt: skip
    last_stage = {"tokens": 10, "probes": {"residual": {"10": [-1.0, 0, 0, 400]}, "attention": {"10": [0.0, 20, 10]}}}
    summary = summarise([{"r": first}, {}, {"r": second}, {"r": last_stage}])
    assert summary == {
        "tokens": 10,
        "queries_sampled": 10,
        "nonfinite": 405,
        "max_activation": {"value": 9.0, "layer": 1, "position": 0, "channel": 2},
        "sink_mass": pytest.approx((8 / 40 + 1 / 20 + 0) / 3),
        "gate_mean": pytest.approx(6 / 40),
        "layers": {
            "max_activation": {"0": 3.0, "1": 9.0},
            "nonfinite": {"1": 5, "10": 400},
            "sink_mass": {"0": pytest.approx(0.2), "1": 0.05, "10": 0.0},
            "gate_mean": {"0": pytest.approx(0.15)},
        },
    }


def test_samples_of_one_prompt_add_up():
    rank = {
        "0_r": {"tokens": 10, "probes": {"residual": {"0": [3.0, 4, 17, 1]}, "attention": {"0": [6.0, 20, 10]}}},
        "1_r": {"tokens": 12, "probes": {"residual": {"0": [4.0, 9, 2, 2]}, "attention": {"0": [2.0, 24, 12]}}},
    }
    summary = summarise([rank, rank])  # two tensor-parallel ranks
    assert (summary["tokens"], summary["queries_sampled"], summary["nonfinite"]) == (22, 22, 3)
    assert summary["max_activation"] == {"value": 4.0, "layer": 0, "position": 9, "channel": 2}
    assert summary["sink_mass"] == pytest.approx(8 / 44)


def test_what_is_missing_is_said():
    assert summarise([{}, {}]) == {"error": "no probe has looked at this request; are the probes on?"}
    part = {"r": {"tokens": 1, "probes": {}}}
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


@pytest.mark.parametrize("value", ["yes", 2, 0.5, None, "0" * 48])
def test_the_value_is_true_or_false(value):
    with pytest.raises(Exception, match=r"sluice\.stats: true or false expected, found"):
        check().validate({"sluice.stats": value})


def test_answers_that_cannot_carry_statistics_are_refused():
    validate = check().validate_openai
    validate(OpenAIRequest(ASK))
    validate(OpenAIRequest({"sluice.stats": False}, streamed=True, prompts=3))
    with pytest.raises(Exception, match=r"sluice\.stats: a streamed answer cannot carry them; drop stream"):
        validate(OpenAIRequest(ASK, streamed=True))
    with pytest.raises(Exception, match=r"sluice\.stats: true or false expected"):
        validate(OpenAIRequest({"sluice.stats": new_ticket()}))
    with pytest.raises(Exception, match=r"sluice\.stats: one answer to 3 prompts cannot carry them"):
        validate(OpenAIRequest(ASK, prompts=3))
    with pytest.raises(Exception, match=r"sluice\.stats: vLLM's beam search ignores vllm_xargs"):
        validate(OpenAIRequest(ASK, beam_search=True))
    with pytest.raises(Exception, match=r"sluice\.stats: no probe is on in this server"):
        check(probes=()).validate(ASK)
    with pytest.raises(Exception, match="a streamed input cannot choose"):
        check().admit("r", ASK, None, True)
    with pytest.raises(Exception, match=r"unknown key; known: sluice\.gate, sluice\.stats"):
        check().validate({"sluice.statistics": True})


@pytest.mark.parametrize(
    ("wanted", "most", "shares"),
    [([40, 5], 64, [40, 5]), ([60, 4], 32, [28, 4]), ([9, 9, 9], 8, [2, 3, 3]), ([0, 7], 4, [0, 4]), ([], 8, [])],
)
def test_shares_are_fair_and_nothing_is_left_over(wanted, most, shares):
    assert fair_shares(wanted, most, 0) == shares
    assert sum(shares) == min(most, sum(wanted))


def test_where_there_is_not_enough_for_all_they_take_turns():
    sums = np.sum([fair_shares([1] * 16, 6, turn) for turn in range(16)], axis=0)
    assert sums.tolist() == [6] * 16


def passing(ledger: requests.RequestLedger, ticket: object, name: str = "r", computed: int = 0) -> list[tuple]:
    """Send three rows of a request through a ledger, behind two of one that does not ask."""
    batch = SimpleNamespace(starts=np.array([0, 2, 5]), requests=["other", name], computed=np.array([9, computed]))
    found = ledger.look(batch, [{}, {ARGUMENT: ticket}])
    for records, rows in found:
        assert rows == slice(2, 5)
        records.tokens += rows.stop - rows.start
    return found


def ledger_of_nothing() -> requests.RequestLedger:
    probe = SimpleNamespace(kind="some", request_record=lambda: {"sum": torch.zeros(1)}, request_values=lambda _: {})
    return requests.RequestLedger([probe])


def test_records_of_aborted_requests_make_room(monkeypatch):
    monkeypatch.setattr(requests, "_MOST", 3)
    ledger = ledger_of_nothing()
    tickets = [new_ticket() for _ in range(5)]
    for ticket in tickets[:3]:
        passing(ledger, ticket)
    passing(ledger, tickets[0], computed=3)  # the first is still running
    for ticket in tickets[3:]:
        passing(ledger, ticket)
    assert ledger.close(tickets[0])["r"]["tokens"] == 6
    assert ledger.close(tickets[0]) == {}
    assert [ledger.close(ticket) == {} for ticket in tickets[1:]] == [True, True, False, False]
    assert passing(ledger, True) == []  # without a ticket nobody would ask for it


def test_a_request_that_starts_again_after_a_preemption_is_counted_once():
    ledger, ticket = ledger_of_nothing(), new_ticket()
    for computed in (0, 3, 6, 0, 3):
        passing(ledger, ticket, computed=computed)
    passing(ledger, ticket, name="another sample")
    assert {name: part["tokens"] for name, part in ledger.close(ticket).items()} == {"r": 6, "another sample": 3}


def test_a_pass_that_runs_ahead_of_the_end_opens_no_new_record():
    ledger, ticket = ledger_of_nothing(), new_ticket()
    passing(ledger, ticket)
    assert ledger.close(ticket)["r"]["tokens"] == 3
    assert passing(ledger, ticket, computed=3) == []
    assert ledger.close(ticket) == {}
