"""Requests that choose, through the OpenAI API of one real server."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import passages
from tests.serving.server import Server
from tests.serving.test_control import TOKEN, request
from vllm_sluice.control.guard import GROUPS

pytestmark = pytest.mark.serving

ON, OFF = {"sluice.gate": True}, {"sluice.gate": False}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
GUARD = {
    "enabled": True, "share": 0.3, "window_seconds": 5, "least_tokens": 400, "least_requests": 20, "most_change": 0.5,
}  # fmt: skip
ROUNDING = 1e-5
"""As in tests/engine/test_per_request.py: batches of different size sum in another order."""


@pytest.fixture(scope="module")
def server(twin_gated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    server = Server(
        twin_gated, folder, {"control": {"per_request": True, "watch_seconds": 0.2, "guard": GUARD}},
        ["--dtype", "float32", "--max-num-batched-tokens", "64", "--enforce-eager", "--block-size", "32",
         "--enable-prompt-tokens-details", "--chat-template", str(folder / "chat.jinja")],
        {"SLUICE_ADMIN_TOKEN": TOKEN},
    )  # fmt: skip
    server.wait()
    yield server
    server.stop()


def post(server: Server, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Send a request to the OpenAI API; return status and answer, also of a refusal."""
    common = {"model": str(server.model), "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        server.url + path, json.dumps(common | body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ask(server: Server, api: str, text: str, arguments: dict[str, Any] | None, salt: str) -> tuple[str, list[float]]:
    """Return text and logprobs of one completion; the salt keeps it from the prefix caches of others."""
    body = {"vllm_xargs": arguments, "cache_salt": salt, "ignore_eos": True}
    if api == "chat":
        message = {"role": "user", "content": text}
        status, answer = post(server, "/v1/chat/completions", messages=[message], logprobs=True, **body)
        choice = answer["choices"][0]
        result = choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]
    else:
        status, answer = post(server, "/v1/completions", prompt=text, logprobs=0, **body)
        choice = answer["choices"][0]
        result = choice["text"], choice["logprobs"]["token_logprobs"]
    assert status == 200
    return result


def test_eight_mixed_requests_equal_single_ones(server):
    texts = [text[:420] for text in passages()[20:22]]
    asked = [(api, text, choice) for api in ("completions", "chat") for text in texts for choice in (ON, OFF)]
    single = [ask(server, *request, "single") for request in asked]
    with ThreadPoolExecutor(8) as pool:
        mixed = list(pool.map(lambda request: ask(server, *request, "mixed"), asked))
    for one, other in zip(single, mixed, strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=ROUNDING)
    for on, off in zip(single[::2], single[1::2], strict=True):
        assert max(abs(a - b) for a, b in zip(on[1], off[1], strict=True)) > 1000 * ROUNDING  # a mix-up would show
    unchosen = ask(server, "completions", texts[0], None, "unchosen")
    assert unchosen[1] == pytest.approx(single[0][1], abs=ROUNDING)


def test_choices_share_no_prefix_cache(server):
    def cached(arguments: dict[str, Any] | None) -> int:
        status, answer = post(server, "/v1/completions", prompt=passages()[23][:420], vllm_xargs=arguments)
        assert status == 200
        return int((answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    first = [cached(arguments) for arguments in (None, OFF, ON)]
    again = [cached(arguments) for arguments in (None, OFF, ON)]
    assert first == [0, 0, 0]
    assert min(again) >= 32


BODIES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "The"},
    "chat/completions": {"messages": [{"role": "user", "content": "The"}]},
    "responses": {"input": "The", "max_output_tokens": 6},
}
REFUSALS = [
    ({"sluice.gates": True}, "sluice.gates: unknown key; known: sluice.gate, sluice.stats"),
    ({"sluice.gate": "off"}, "sluice.gate: true or false expected, found 'off'"),
    ({"sluice.gate": [0, 1]}, "sluice.gate: true or false expected, found [0, 1]"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
@pytest.mark.parametrize("api", ["completions", "chat/completions", "responses"])
def test_a_refusal_is_a_400_that_says_what_is_allowed(server, api, arguments, message, stream):
    status, answer = post(server, f"/v1/{api}", stream=stream, vllm_xargs=arguments, **BODIES[api])
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] == "vllm_xargs"


def test_beam_search_cannot_choose(server):
    status, answer = post(server, "/v1/completions", prompt="The", use_beam_search=True, n=2, vllm_xargs=OFF)
    assert (status, answer["error"]["param"]) == (400, "vllm_xargs")
    assert "sluice.gate: vLLM's beam search ignores vllm_xargs" in answer["error"]["message"]
    status, _ = post(server, "/v1/completions", prompt="The", use_beam_search=True, n=2)
    assert status == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_salt_that_imitates_a_choice_is_a_400(server, stream):
    status, answer = post(server, "/v1/completions", prompt="The", cache_salt="sluice:gate=0", stream=stream)
    assert (status, answer["error"]["param"]) == (400, "cache_salt")
    assert "contains 'sluice:'" in answer["error"]["message"]


@pytest.mark.parametrize("api", ["completions", "chat/completions", "responses"])
def test_a_request_gets_its_own_statistics(server, api):
    body = BODIES[api]
    status, plain = post(server, f"/v1/{api}", **body)
    assert status == 200
    assert not plain.get("kv_transfer_params")
    status, answer = post(server, f"/v1/{api}", vllm_xargs={"sluice.stats": True, "sluice.gate": False}, **body)
    assert status == 200
    usage = answer["usage"]
    names = ("input_tokens", "output_tokens") if api == "responses" else ("prompt_tokens", "completion_tokens")
    found = answer["kv_transfer_params"]["sluice"]
    assert found["tokens"] == sum(usage[name] for name in names) - 1
    assert 0 < found["queries_sampled"] <= found["tokens"] - 1
    assert sorted(found["layers"]) == ["gate_mean", "max_activation", "sink_mass"]
    assert found["max_activation"]["value"] == max(found["layers"]["max_activation"].values())
    assert 0 < found["sink_mass"] < 1 > found["gate_mean"] > 0


def test_answers_that_cannot_carry_statistics_are_a_400(server):
    asks = {"vllm_xargs": {"sluice.stats": True}}
    for body, message in (
        ({"prompt": "The", "stream": True}, "a streamed answer cannot carry them; drop stream"),
        ({"prompt": ["The", "A"]}, "one answer to 2 prompts cannot carry them"),
        ({"prompt": [[5, 6], [7]]}, "one answer to 2 prompts cannot carry them"),
        ({"prompt": "The", "use_beam_search": True, "n": 2}, "vLLM's beam search ignores vllm_xargs"),
    ):
        status, answer = post(server, "/v1/completions", **asks, **body)
        assert (status, answer["error"]["param"]) == (400, "vllm_xargs")
        assert message in answer["error"]["message"]
    status, answer = post(server, "/v1/completions", prompt=[5, 6, 7], **asks)
    assert status == 200
    assert answer["kv_transfer_params"]["sluice"]["tokens"] == answer["usage"]["total_tokens"] - 1


def test_arguments_of_others_are_let_through(server):
    status, _ = post(server, "/v1/completions", prompt="The", vllm_xargs={"other": "thing"})
    assert status == 200


def guarded(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """Make a guarded change under traffic; return the last entry of the audit once the trial is over."""
    stop = threading.Event()

    def client(index: int) -> None:
        text = passages()[80 + index][:200]
        while not stop.is_set():
            assert len(server.complete(text, 24)["choices"][0]["token_ids"]) == 24

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, index) for index in range(8)]
        try:
            status, answer = request(server, "PUT", "patches/gate", body)
            assert (status, answer["tried"]) == (202, True), answer
            until = time.monotonic() + 180
            while request(server, "GET", "state")[1]["control"]["guard"] is not None:
                assert time.monotonic() < until, server.tail()
                time.sleep(0.3)
        finally:
            stop.set()
        for one in clients:
            one.result(120)
    change: dict[str, Any] = request(server, "GET", "changes")[1]["changes"][-1]
    return change


def test_a_trial_shows_what_it_measures_until_it_is_ended(server):
    """Too few requests for a verdict, so that the trial goes on until somebody ends it."""
    assert request(server, "PUT", "patches/gate", {"enabled": False})[0] == 202
    try:
        assert request(server, "PUT", "patches/gate", {"floor": 0.5})[0] == 409
        assert server.settled(("guard_running", "gate"), 1.0)["guard_running", "gate"] == 1
        for index in range(8):
            server.complete(passages()[60 + index][:200], 5)
        tokens = [("guard_tokens", group, "gate") for group in GROUPS]
        until = time.monotonic() + 60
        while sum((metrics := server.metrics()).get(key, 0) for key in tokens) != 40:
            assert time.monotonic() < until, server.tail()
            time.sleep(0.3)
        assert all(metrics["guard_nonfinite", group, "gate"] == 0 for group in GROUPS)
        trial = request(server, "GET", "state")[1]["control"]["guard"]
        assert sum(group["requests"] for group in trial["measured"].values()) == 8
        for name, group in trial["measured"].items():
            assert metrics["guard_tokens", name, "gate"] == group["tokens"] == 5 * group["requests"]
            assert metrics.get(("guard_logprob", name, "gate")) == group["mean"]
        assert any(metrics.get(("guard_logprob", group, "gate"), 0) < 0 for group in GROUPS)
    finally:
        ended = request(server, "DELETE", "guard")
    assert ended[0] == 200, ended
    assert request(server, "GET", "state")[1]["control"]["guard"] is None
    assert not [key for key in server.metrics() if key[0].startswith("guard_")]
    assert request(server, "GET", "changes")[1]["changes"][-1]["error"] == "ended by admin"


def test_the_guard_completes_a_harmless_switch_and_rolls_a_harmful_one_back(server):
    """With a floor near 1 the gates are open, so switching them off changes nothing; at 0 it breaks the gated twin."""
    assert request(server, "PUT", "patches/gate", {"floor": 0.9999})[0] == 200
    change = guarded(server, {"enabled": False})
    assert (change["source"], change["result"], change["who"]) == ("guard", "applied", "admin"), change
    assert server.settled(("patch_enabled", "gate"), 0.0)["patch_enabled", "gate"] == 0

    status, answer = request(server, "PUT", "patches/gate?guard=false", {"enabled": True, "floor": None})
    assert (status, answer["tried"]) == (200, False)
    before = server.metrics().get(("switches_total", "rolled_back"), 0)
    change = guarded(server, {"enabled": False})
    assert (change["source"], change["result"]) == ("guard", "rolled back"), change
    assert "a change of 0.5 is allowed" in change["error"]
    assert server.settled(("patch_enabled", "gate"), 1.0)["patch_enabled", "gate"] == 1
    assert server.metrics()["switches_total", "rolled_back"] == before + 1
