"""Requests that ask for their own statistics, against hooks on the Hugging Face model for the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine import EVERY_ROW, Engine, environment
from tests.engine.test_per_request import CACHED, PER_REQUEST
from vllm_sluice.lab.reference import ReferenceTrace, reference_model, reference_trace

ASK = {"sluice.stats": True}
TOKENS = 6
CLOSE = 1e-4
"""Relative; as for the server's own statistics in float32 (tests/engine/test_statistics.py)."""


def ask(
    engine: Engine, prompts: Sequence[Sequence[int]], arguments: Sequence[dict[str, Any] | None], **sampling: Any
) -> list[tuple[list[int], dict[str, Any] | None]]:
    """Return for each request the tokens that were computed and its summary; prompt and all but the last token."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, extra_args=a, **sampling) for a in arguments
    ]
    with environment(**engine._environment):
        outputs = engine.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters, use_tqdm=False)
    return [
        ([*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]], (output.kv_transfer_params or {}).get("sluice"))
        for output in outputs
    ]


def check(found: dict[str, Any], trace: ReferenceTrace, tokens: int) -> None:
    """Compare a summary with a trace of the same tokens, [1, tokens, ...] in every layer."""
    assert found["tokens"] == tokens
    assert found["queries_sampled"] == tokens - 1  # position 0 has no other key
    largest = torch.stack([hidden[0].double().abs() for hidden in trace.hidden])  # [layers, tokens, hidden]
    layer, position, channel = torch.unravel_index(largest.argmax(), largest.shape)
    where = found["max_activation"]
    assert (where["layer"], where["position"], where["channel"]) == (int(layer), int(position), int(channel))
    assert where["value"] == pytest.approx(largest.max().item(), rel=CLOSE)
    sinks = [attention[0][:, 1:, 0].double().mean().item() for attention in trace.attention]
    gates = [gate[0].double().mean().item() for gate in trace.gate]
    layers = found["layers"]
    assert list(layers["max_activation"].values()) == pytest.approx(largest.amax((1, 2)).tolist(), rel=CLOSE)
    assert list(layers["sink_mass"].values()) == pytest.approx(sinks, rel=CLOSE)
    assert list(layers["gate_mean"].values()) == pytest.approx(gates, rel=CLOSE)
    assert found["sink_mass"] == pytest.approx(sum(sinks) / len(sinks), rel=CLOSE)
    assert found["gate_mean"] == pytest.approx(sum(gates) / len(gates), rel=CLOSE)


@pytest.fixture(params=[True, False], ids=["eager", "compiled"])
def engine(request, make_engine, twin_gated) -> Engine:
    return make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, enforce_eager=request.param, **CACHED)


def test_eight_mixed_requests_get_their_own_statistics(engine, prompts, twin_gated):
    """Chunked prefill and decode in one batch, warm cache or cold; every second request does not ask."""
    model = reference_model(twin_gated, dtype=torch.float32)
    for _ in range(2):  # the second time the prompts are in the prefix cache, and computed all the same
        found = ask(engine, prompts, [ASK, None] * 4)
        for index, (ids, summary) in enumerate(found):
            if index % 2:
                assert summary is None
            else:
                check(summary, reference_trace(model, ids), len(ids))


def test_what_others_ask_changes_neither_answers_nor_the_servers_statistics(engine, prompts):
    measured = []
    for arguments in (None, ASK):
        assert engine.llm.reset_prefix_cache()
        engine.fresh_windows()
        answers = ask(engine, prompts, [arguments] * 8)
        measured.append(([ids for ids, _ in answers], engine.metrics()))
    (plain_ids, plain), (ids, asked) = measured
    assert ids == plain_ids
    for key in plain:
        if key[0].startswith(("activation", "attention", "gate", "queries", "tokens")):
            assert asked[key] == pytest.approx(plain[key], rel=1e-6), key
    assert plain["queries_sampled_total", "prefill"] > 0


def test_samples_of_one_request_are_summed_up(engine, prompts, twin_gated):
    from vllm import SamplingParams

    engine_prompt = prompts[4]
    parameters = SamplingParams(n=3, max_tokens=TOKENS, temperature=1, ignore_eos=True, extra_args=ASK)
    with environment(**engine._environment):
        (output,) = engine.llm.generate([{"prompt_token_ids": engine_prompt}], parameters, use_tqdm=False)
    summary = output.kv_transfer_params["sluice"]
    assert summary["tokens"] == 3 * (len(engine_prompt) + TOKENS - 1)
    model = reference_model(twin_gated, dtype=torch.float32)
    traces = [reference_trace(model, [*engine_prompt, *one.token_ids[:-1]]) for one in output.outputs]
    expected = max(hidden.abs().max().item() for trace in traces for hidden in trace.hidden)
    assert summary["max_activation"]["value"] == pytest.approx(expected, rel=CLOSE)


def test_a_probe_that_is_off_leaves_its_part_out(make_engine, twin_gated, prompts):
    engine = make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    try:
        engine.rpc("apply", {"probes": {"attention": {"enabled": False}}})
        ((_, summary),) = ask(engine, prompts[:1], [ASK])
    finally:
        engine.rpc("apply", {"probes": {"attention": {"enabled": True}}})
    assert "sink_mass" not in summary
    assert "queries_sampled" not in summary
    assert summary["max_activation"]["value"] > 0


def test_records_are_forgotten_once_told_and_an_unknown_ticket_is_nothing(make_engine, twin_gated, prompts):
    engine = make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    ask(engine, prompts, [ASK] * 8)
    assert not engine.model.sluice_runtime._ledger._open
    assert engine.rpc("request", "0" * 48) == {}


def test_a_failing_collection_does_not_cost_the_answer(make_engine, twin_gated, prompts, monkeypatch):
    engine = make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, **CACHED)

    def broken(self: object, ticket: str) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("vllm_sluice.probes.requests.RequestLedger.close", broken)
    ((ids, summary),) = ask(engine, prompts[:1], [ASK])
    assert len(ids) == len(prompts[0]) + TOKENS - 1
    assert summary == {"error": "RuntimeError: broken on purpose"}


def test_the_vanilla_twins_sink_shows_in_a_single_request(make_engine, twin_vanilla: Path, prompts):
    """No patch is installed: the statistics need probes only."""
    engine = make_engine(twin_vanilla, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    ((ids, summary),) = ask(engine, prompts[:1], [ASK])
    model = reference_model(twin_vanilla, dtype=torch.float32)
    trace = reference_trace(model, ids)
    largest = torch.stack([hidden[0].abs() for hidden in trace.hidden])
    assert summary["max_activation"]["value"] == pytest.approx(largest.max().item(), rel=CLOSE)
    assert summary["max_activation"]["position"] == 0
    assert summary["sink_mass"] > 0.2
    assert "gate_mean" not in summary


def test_more_asking_requests_than_queries_in_a_pass_and_every_one_gets_its_share(make_engine, twin_gated, prompts):
    """Two queries a pass: prompts, and then decoding in which three requests of four have to wait for their turn."""
    variables = {**EVERY_ROW, **PER_REQUEST, "SLUICE_PROBES__ATTENTION__QUERIES": "2"}
    engine = make_engine(twin_gated, variables, **CACHED)
    model = reference_model(twin_gated, dtype=torch.float32)
    apart = []
    for ids, summary in ask(engine, prompts, [ASK] * 8):
        assert 1 <= summary["queries_sampled"] < len(ids) - 1
        attention = reference_trace(model, ids).attention
        sinks = [layer[0][:, 1:, 0].double().mean().item() for layer in attention]
        apart.append(summary["sink_mass"] - sum(sinks) / len(sinks))
    assert abs(sum(apart) / len(apart)) < 0.05  # a sample of a few queries each


def test_a_request_that_is_preempted_is_told_of_once_and_of_one_state(make_engine, twin_gated, prompts):
    """The gate changes in the midst of decoding, with the preemption that every switch brings."""
    engine = make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    core = engine.llm.llm_engine.engine_core.engine_core
    step, steps = core.step_fn, 0

    def stepping() -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            engine.rpc("apply", {"patches": {"gate": {"floor": 0.99}}})
            assert core.scheduler.reset_prefix_cache(reset_running_requests=True)
        return step()

    core.step_fn = stepping
    try:
        ((ids, summary),) = ask(engine, prompts[4:5], [ASK])
    finally:
        core.step_fn = step
        engine.rpc("apply", {"patches": {"gate": {"floor": 0.0}}})
    assert steps > 5
    assert summary["tokens"] == len(ids)
    assert summary["gate_mean"] > 0.99


def test_a_request_with_nan_gets_its_answer_and_the_nan_is_counted(make_engine, twin_gated, prompts):
    import json

    engine = make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    weight = engine.model.model.layers[3].post_attention_layernorm.weight
    kept = weight.data.clone()
    try:
        weight.data[5] = torch.nan
        ((ids, summary),) = ask(engine, prompts[4:5], [ASK])
    finally:
        weight.data.copy_(kept)
    json.dumps(summary, allow_nan=False)
    assert summary["layers"]["nonfinite"] == dict.fromkeys("345", len(ids) * len(kept))
    assert summary["nonfinite"] == 3 * len(ids) * len(kept)
    assert list(summary["layers"]["max_activation"]) == ["0", "1", "2"]
    assert list(summary["layers"]["sink_mass"]) == list(summary["layers"]["gate_mean"]) == ["0", "1", "2", "3"]
