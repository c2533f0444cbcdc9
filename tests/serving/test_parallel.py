"""Several processes: tensor-parallel ranks, data-parallel engines, several API servers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.conftest import passages
from tests.engine.expected import expected
from tests.engine.test_request_statistics import check as check_request
from tests.engine.test_statistics import FLOAT32, check
from tests.serving.server import Server, eventually, get
from tests.serving.test_control import EXACT, TOKEN, apart, logprobs, request, switch
from tests.serving.test_server import SETTINGS
from vllm_sluice.lab.export import export
from vllm_sluice.lab.reference import reference_model, reference_trace
from vllm_sluice.lab.twin import Twin, TwinConfig

pytestmark = pytest.mark.serving

CONTROLLED = {**SETTINGS, "control": {"changes_per_minute": 100_000, "per_request": True}}
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "64", "--no-enable-prefix-caching"]


@pytest.fixture(scope="module", params=["head", "element"])
def four_heads(request: pytest.FixtureRequest, twin_gated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random gated model whose four heads two ranks can share, with gates that are neither open nor closed."""
    torch.manual_seed(5)
    twin = Twin(TwinConfig(hidden_size=128, layers=3, heads=4, intermediate_size=256, gate=request.param))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    folder = tmp_path_factory.mktemp("four-heads") / "model"
    export(twin, Tokenizer.from_file(str(twin_gated / "tokenizer.json")), folder, "A random model for tests.\n")
    return folder


@pytest.fixture
def two_ranks(four_heads: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(
        four_heads, tmp_path, {**SETTINGS, "control": {"per_request": True}},
        [*OPTIONS, "--tensor-parallel-size", "2", "--api-server-count", "2"],
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )  # fmt: skip
    server.wait()
    yield server
    server.stop()


def requests_get_their_own_statistics(server: Server, model: Path) -> None:
    """Four requests at once that ask, through whichever API server and engine, against the Hugging Face model."""
    reference = reference_model(model, dtype=torch.float32)
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(server.complete, text[:300], 8, vllm_xargs={"sluice.stats": True}) for text in passages()[40:44]
        ]
        answers = [one.result(120) for one in asked]
    for answer in answers:
        choice = answer["choices"][0]
        ids = [*choice["prompt_token_ids"], *choice["token_ids"][:-1]]
        check_request(answer["kv_transfer_params"]["sluice"], reference_trace(reference, ids), len(ids))


def test_two_ranks_and_two_api_servers_report_as_one_model(two_ranks, four_heads):
    answers = [two_ranks.complete(text[:300], 4)["choices"][0] for text in passages()[60:64]]
    sent = [[*choice["prompt_token_ids"], *choice["token_ids"][:-1]] for choice in answers]
    prompts = sum(len(ids) for ids in sent) - 3 * 4
    statistics = expected(four_heads, sent)

    def both_ranks() -> dict[tuple[str, ...], float]:
        metrics = two_ranks.metrics()
        assert metrics["tokens_observed_total", "decode"] == 3 * 4
        assert metrics["tokens_observed_total", "prefill"] == prompts
        check(metrics, statistics, {"default": FLOAT32})
        return metrics

    for _ in range(4):  # whichever API server answers
        metrics = eventually(both_ranks)
        assert metrics["attention_heads", "000"] == 4
        assert {key[1] for key in metrics if key[0] == "snapshot_age_seconds"} == {"pp0-tp0", "pp0-tp1"}
        assert metrics["patch_enabled", "gate"] == 1
    requests_get_their_own_statistics(two_ranks, four_heads)


def both_follow_a_switch(server: Server, ranks: int) -> None:
    """Switch a few times under traffic; every rank of every engine applies every change, no request is lost."""
    texts = [text[:200] for text in passages()[80:84]]
    with ThreadPoolExecutor(4) as pool:
        traffic = [pool.submit(server.complete, texts[i % 4], 40) for i in range(12)]
        for enabled in (False, True, False):
            assert switch(server, enabled)["ranks"] == ranks
        lengths = [len(one.result(120)["choices"][0]["token_ids"]) for one in traffic]
    assert lengths == 12 * [40]
    state = request(server, "GET", "state")[1]
    generations = [rank["generation"] for engine in state["engines"] for rank in engine["ranks"]]
    assert generations == ranks * [{"desired": 3, "applied": 3}]
    assert not any(engine["patches"]["gate"]["enabled"] for engine in state["engines"])
    off = [logprobs(server, texts[0], cache_salt=str(salt)) for salt in range(4)]  # whichever engine answers
    switch(server, True)
    on = [logprobs(server, texts[0]) for _ in range(4)]
    assert max(apart(off[0], other) for other in off) < EXACT
    assert max(apart(on[0], other) for other in on) < EXACT
    assert apart(off[0], on[0]) > 0.01


def test_two_pipeline_stages_and_two_api_servers(twin_gated, tmp_path):
    """Compiled: vLLM 0.32 cannot serve pipeline stages eagerly on the CPU (v1/worker/cpu_worker.py skips warm-up)."""
    server = Server(
        twin_gated, tmp_path, CONTROLLED,
        ["--dtype", "float32", "--max-num-batched-tokens", "64", "--no-enable-prefix-caching",
         "--pipeline-parallel-size", "2", "--api-server-count", "2"],
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "SLUICE_ADMIN_TOKEN": TOKEN},
    )  # fmt: skip
    try:
        server.wait()
        choices = [server.complete(text[:300], 4)["choices"][0] for text in passages()[64:67]]
        sent = [[*choice["prompt_token_ids"], *choice["token_ids"][:-1]] for choice in choices]
        statistics = expected(twin_gated, sent)

        def both_stages() -> dict[tuple[str, ...], float]:
            metrics = server.metrics()
            assert metrics["tokens_observed_total", "decode"] == 3 * 3
            check(metrics, statistics, {"default": FLOAT32})
            return metrics

        metrics = eventually(both_stages)
        assert {key[1] for key in metrics if key[0] == "snapshot_age_seconds"} == {"pp0-tp0", "pp1-tp0"}
        requests_get_their_own_statistics(server, twin_gated)
        both_follow_a_switch(server, ranks=2)
    finally:
        server.stop()


def test_two_engines_are_told_apart(twin_gated, tmp_path):
    from prometheus_client.parser import text_string_to_metric_families

    server = Server(
        twin_gated, tmp_path, CONTROLLED, [*OPTIONS, "--data-parallel-size", "2"], {"SLUICE_ADMIN_TOKEN": TOKEN}
    )
    try:
        server.wait()
        for text in passages()[70:78]:
            server.complete(text[:200], 2)

        def both_engines() -> dict[str, float]:
            found = {
                sample.labels["engine"]: sample.value
                for family in text_string_to_metric_families(get(f"{server.url}/metrics"))
                for sample in family.samples
                if sample.name == "sluice_tokens_observed_total" and sample.labels["phase"] == "decode"
            }
            assert set(found) == {"0", "1"}
            assert sum(found.values()) == 8
            return found

        found = eventually(both_engines)
        assert all(found.values()), "the load balancer gave one engine nothing"
        requests_get_their_own_statistics(server, twin_gated)
        both_follow_a_switch(server, ranks=2)
    finally:
        server.stop()
