"""Requests that choose their patches: each gets what a server in that state would give, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.engine import EVERY_ROW, Engine, environment
from tests.engine.test_gate import NO_PROBES

PER_REQUEST = {"SLUICE_CONTROL__PER_REQUEST": "true"}
CACHED = {"enable_prefix_caching": True, "block_size": 32}
ON, OFF = {"sluice.gate": True}, {"sluice.gate": False}
TOKENS = 9
ROUNDING = 1e-5
"""Largest difference of a logprob between batches of different size: CPU kernels then sum in another order (2e-6)."""

Arguments = dict[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """What came back for one request; `cached` is the number of prompt tokens found in the prefix cache."""

    ids: list[int]
    logprobs: list[float]
    cached: int


def ask(
    engine: Engine, prompts: Sequence[Sequence[int]], arguments: Sequence[Arguments],
    salts: Sequence[str | None] | None = None,
) -> list[Answer]:
    """Send requests at once, each with its own extra arguments."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=0, extra_args=a) for a in arguments
    ]
    inputs = [
        {"prompt_token_ids": list(prompt), **({"cache_salt": salt} if salt else {})}
        for prompt, salt in zip(prompts, salts or [None] * len(prompts), strict=True)
    ]
    with environment(**engine._environment):
        outputs = engine.llm.generate(inputs, parameters, use_tqdm=False)
    answers = []
    for output in outputs:
        completion = output.outputs[0]
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        logprobs = [candidates[token].logprob for token, candidates in chosen]
        answers.append(Answer(list(completion.token_ids), logprobs, output.num_cached_tokens))
    return answers


def switched(engine: Engine, enabled: bool) -> None:
    """Set the whole server's gate, as the switch does: with an empty prefix cache."""
    engine.rpc("apply", {"patches": {"gate": {"enabled": enabled}}})
    assert engine.llm.reset_prefix_cache()


def alone(engine: Engine, prompt: Sequence[int], arguments: Arguments) -> Answer:
    """Send one request to an engine whose prefix cache is empty."""
    assert engine.llm.reset_prefix_cache()
    answer = ask(engine, [prompt], [arguments])[0]
    assert answer.cached == 0
    return answer


def close(first: Answer, second: Answer) -> bool:
    """Tell whether two answers are the same but for the sums' order, which depends on the batch's size."""
    return first.ids == second.ids and first.logprobs == pytest.approx(second.logprobs, abs=ROUNDING)


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the largest difference of two sequences of logprobs."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.fixture(params=[True, False], ids=["eager", "compiled"])
def engine(request, make_engine, twin_gated) -> Engine:
    return make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, enforce_eager=request.param, **CACHED)


def test_eight_mixed_requests_equal_servers_in_one_state_and_single_requests(engine, prompts):
    """Four prompts with and without gate at once: chunks of 64 tokens, prefill and decode mixed, cold and cached.

    Bit for bit as in a server whose gate is on, or off, for all (the same batches); and as each request alone.
    """
    from torch._dynamo.utils import counters

    pairs = [(prompt, arguments) for prompt in prompts[:4] for arguments in (ON, OFF)]
    all_prompts, arguments = [prompt for prompt, _ in pairs], [a for _, a in pairs]
    whole = {}
    for enabled in (False, True):  # salts keep the two copies of a prompt apart, as the choices do
        switched(engine, enabled)
        whole[enabled] = [ask(engine, all_prompts, [None] * 8, ["a", "b"] * 4) for _ in range(2)]
    single = [alone(engine, *pair) for pair in pairs]
    compiled = counters["stats"]["unique_graphs"]
    assert engine.llm.reset_prefix_cache()
    cold, warm = (ask(engine, all_prompts, arguments) for _ in range(2))
    assert counters["stats"]["unique_graphs"] == compiled
    assert [answer.cached for answer in cold] == [0] * 8
    assert [answer.cached for answer in warm] == [(len(prompt) - 1) // 32 * 32 for prompt in all_prompts]
    for index, answer in enumerate(single):
        enabled = arguments[index] is ON
        assert cold[index] == whole[enabled][0][index]
        assert warm[index] == whole[enabled][1][index]
        assert close(cold[index], answer)
        assert close(warm[index], answer)
    for on, off in zip(cold[::2], cold[1::2], strict=True):
        assert largest_difference(on.logprobs, off.logprobs) > 1000 * ROUNDING  # so that a mix-up would show


@pytest.mark.parametrize("enabled", [True, False], ids=["server on", "server off"])
def test_a_choice_counts_whatever_the_server_is_set_to_and_shares_no_cache(engine, prompts, enabled):
    prompt = prompts[0]
    try:
        switched(engine, True)
        on = alone(engine, prompt, None)
        switched(engine, False)
        off = alone(engine, prompt, None)
        switched(engine, enabled)
        own, other = (on, off) if enabled else (off, on)
        arguments = {True: ON, False: OFF}
        assert ask(engine, [prompt], [None])[0] == own
        for choice, expected in ((not enabled, other), (enabled, own)):  # the cache of `own` is warm now
            assert ask(engine, [prompt], [arguments[choice]])[0] == expected
        assert engine.llm.reset_prefix_cache()
        assert ask(engine, [prompt], [arguments[not enabled]])[0] == other
        assert ask(engine, [prompt], [None])[0] == own
        again = ask(engine, [prompt] * 3, [arguments[not enabled], None, arguments[enabled]])
        assert [answer.cached for answer in again] == [128, 128, 0]
        assert all(close(a, b) for a, b in zip(again, (other, own, own), strict=True))
    finally:
        switched(engine, True)


def test_requests_that_do_not_choose_leave_everything_as_it_was(engine, make_engine, twin_gated, prompts):
    eager = engine.llm.llm_engine.vllm_config.model_config.enforce_eager
    without = make_engine(twin_gated, EVERY_ROW, enforce_eager=eager, **CACHED)
    plain = [ask(e, prompts, [None] * 8) for e in (engine, without) if e.llm.reset_prefix_cache()]
    assert plain[0] == plain[1]
    acts = engine.model.sluice_runtime._patches["gate"]._acts
    ask(engine, prompts, [OFF, None] * 4)
    assert acts.all()
    again = [ask(e, prompts, [None] * 8) for e in (engine, without)]
    assert [a.ids for a in again[0]] == [a.ids for a in again[1]]


def test_zero_and_one_are_what_the_openai_api_makes_of_false_and_true(make_engine, twin_gated, prompts):
    engine = make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    assert alone(engine, prompts[0], {"sluice.gate": 0}) == alone(engine, prompts[0], OFF)
    assert alone(engine, prompts[0], {"sluice.gate": 1}) == alone(engine, prompts[0], ON)


def test_without_probes_and_with_a_preempted_request(make_engine, twin_gated, prompts):
    """The switch preempts running requests, which are computed again: each keeps its own choice."""
    engine = make_engine(twin_gated, {**NO_PROBES, **PER_REQUEST}, **CACHED)
    expected = [alone(engine, prompts[0], arguments) for arguments in (ON, OFF)]
    assert expected[0].logprobs != expected[1].logprobs
    runner, passes = engine.runner, 0
    original = runner._model_forward

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return original(*args, **kwargs)

    runner._model_forward = disturbed
    core = engine.llm.llm_engine.engine_core.engine_core
    step = core.step_fn

    def stepping() -> Any:
        if passes == 8:  # in the midst of decoding
            assert core.scheduler.reset_prefix_cache(reset_running_requests=True)
        return step()

    core.step_fn = stepping
    try:
        assert engine.llm.reset_prefix_cache()
        answers = ask(engine, [prompts[0]] * 2, [ON, OFF])
    finally:
        core.step_fn = step
        del runner._model_forward
    assert passes > 8
    assert all(close(a, b) for a, b in zip(answers, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ({"sluice.gates": True}, PER_REQUEST, "sluice.gates: unknown key; known: sluice.gate, sluice.stats"),
        ({"sluice.gate": "off"}, PER_REQUEST, "sluice.gate: true or false expected, found 'off'"),
        ({"sluice.gate": 2}, PER_REQUEST, "sluice.gate: true or false expected, found 2"),
        ({"sluice.gate": False}, {}, "sluice.gate: this server does not let requests choose; it needs control.per_req"),
    ],
)
def test_refusals_name_what_is_allowed(make_engine, twin_gated, prompts, arguments, variables, message):
    from vllm.exceptions import VLLMClientError

    engine = make_engine(twin_gated, {**EVERY_ROW, **variables}, **CACHED)
    with pytest.raises(VLLMClientError, match=re.escape(message)):
        ask(engine, [prompts[0]], [arguments])
    assert ask(engine, [prompts[0]], [{"other.key": "anything"}])  # not ours


def test_a_patch_that_is_not_installed_cannot_be_chosen(make_engine, twin_vanilla, prompts):
    from vllm.exceptions import VLLMClientError

    engine = make_engine(twin_vanilla, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    message = "sluice.gate: the patch gate is not installed in this server; installed: none"
    with pytest.raises(VLLMClientError, match=re.escape(message)):
        ask(engine, [prompts[0]], [ON])


def test_a_salt_cannot_imitate_a_choice(make_engine, twin_gated, prompts):
    from vllm.exceptions import VLLMClientError

    engine = make_engine(twin_gated, {**EVERY_ROW, **PER_REQUEST}, **CACHED)
    with pytest.raises(VLLMClientError, match="cache_salt 'sluice:gate=0' contains 'sluice:'"):
        ask(engine, [prompts[0]], [None], ["sluice:gate=0"])
    assert engine.llm.reset_prefix_cache()
    answers = [ask(engine, [prompts[0]], [a], [s])[0] for a in (ON, OFF) for s in ("me", "you", "me")]
    assert [answer.cached for answer in answers] == [0, 0, 128] * 2


def test_a_guarded_trial_measures_what_its_groups_generate(make_engine, twin_gated, prompts):
    """Counts and sums of log-probabilities equal those that vLLM returns; the canary runs under the tried state."""
    from vllm import SamplingParams

    from vllm_sluice.control.guard import GROUPS, Measured
    from vllm_sluice.control.journal import Journal, Record

    engine = make_engine(twin_gated, {**EVERY_ROW, "SLUICE_CONTROL__GUARD__ENABLED": "true"})
    trial = {"number": 7, "patch": "gate", "enabled": False, "share": 0.5}
    sizes = [1 + 2 * (index % 3 == 0) for index in range(2 * len(prompts))]  # answers to a request: 3, 1, 1, 3, ...
    parameters = [SamplingParams(max_tokens=6, n=n, top_k=1, ignore_eos=True, logprobs=0) for n in sizes]

    def generate() -> list[list[float]]:
        """Return the log-probabilities of all tokens of each request."""
        batch = [{"prompt_token_ids": ids} for ids in prompts for _ in range(2)]
        with environment(**engine._environment):
            outputs = engine.llm.generate(batch, parameters, use_tqdm=False)
        return [[next(iter(t.values())).logprob for one in o.outputs for t in one.logprobs] for o in outputs]

    alone = generate()
    assert engine.rpc("guard")["groups"] == {group: vars(Measured()) for group in GROUPS}
    journal = Journal(engine.run_dir, engine.identity)
    journal.write(Record(guard=trial))
    try:
        found = generate()
    finally:
        journal.write(Record())
    measured = engine.rpc("guard")
    assert measured["number"] == 7
    differ = [max(abs(a - b) for a, b in zip(x, y, strict=True)) > 1e-3 for x, y in zip(alone, found, strict=True)]
    groups = {"rest": [one for one, changed in zip(found, differ, strict=True) if not changed],
              "canary": [one for one, changed in zip(found, differ, strict=True) if changed]}  # fmt: skip
    for group, requests in groups.items():
        totals = [sum(values) for values in requests]
        assert len(requests) > 0  # missed once in 2**(number of requests - 1) runs
        assert measured["groups"][group] == pytest.approx(
            {
                "tokens": sum(map(len, requests)), "total": sum(totals), "nonfinite": 0, "requests": len(requests),
                "tokens_squared": sum(len(values) ** 2 for values in requests),
                "tokens_total": sum(len(values) * total for values, total in zip(requests, totals, strict=True)),
                "total_squared": sum(total**2 for total in totals),
            }, rel=1e-4,
        )  # fmt: skip
