"""Switching on a real server: two tensor-parallel ranks behind two API servers, under traffic, with prefix caching."""

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
import torch
from tokenizers import Tokenizer

from tests.conftest import passages
from tests.serving.server import Server, get
from vllm_sluice.lab.export import export
from vllm_sluice.lab.twin import Twin, TwinConfig

pytestmark = pytest.mark.serving

TOKEN = "a-token-for-the-tests"
SETTINGS: dict[str, Any] = {
    "telemetry": {"interval_seconds": 0.5},
    "control": {"changes_per_minute": 100_000, "watch_seconds": 0.2},
}
FORMER: dict[str, Any] = {
    "server": "a former one", "generation": 41, "values": {"patches.gate.enabled": False},
    "admin": {"patches.gate.enabled": False},
    "switching": {"pid": 1, "start_ticks": "", "since": 1.0, "paused": True},
    "guard": {"number": 7, "patch": "gate", "enabled": True, "edits": {}, "share": 0.5, "since": 1.0, "who": "ann",
              "measured": None, "reason": None},
}  # fmt: skip
"""What a server leaves in a folder that outlives it when it is killed in a switch; a process 1 there is always."""
EXACT = 2e-5
"""Log-probabilities of one state differ by no more than float32 rounding between differently composed batches."""


def four_heads(folder: Path, twin_gated: Path) -> Path:
    """A random gated model whose four heads two ranks can share; its gates change its output a lot."""
    torch.manual_seed(5)
    twin = Twin(TwinConfig(hidden_size=128, layers=4, heads=4, intermediate_size=256, gate="head"))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    export(twin, Tokenizer.from_file(str(twin_gated / "tokenizer.json")), folder, "A random model for tests.\n")
    return folder


def request(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Call one of Sluice's routes; return status and JSON."""
    call = urllib.request.Request(
        f"{server.url}/plugins/sluice/{path}", method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | headers,
    )  # fmt: skip
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def switch(server: Server, enabled: bool) -> dict[str, Any]:
    status, done = request(server, "PUT", "patches/gate", {"enabled": enabled})
    assert status == 200, done
    result: dict[str, Any] = done
    return result


def logprobs(server: Server, prompt: Any, tokens: int = 8, **body: Any) -> list[float]:
    choice = server.complete(prompt, tokens, logprobs=1, **body)["choices"][0]
    return list(choice["logprobs"]["token_logprobs"])


def apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def stream(server: Server, prompt: list[int], tokens: int) -> Iterator[tuple[int, float]]:
    """Stream a completion; yield token id and log-probability."""
    call = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps(
            {"model": str(server.model), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1,
             "ignore_eos": True, "stream": True, "return_token_ids": True}
        ).encode(),
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(call, timeout=120) as answer:
        for line in answer:
            text = line.decode().removeprefix("data: ").strip()
            if text.startswith("{"):
                choice = json.loads(text)["choices"][0]
                if choice.get("token_ids"):
                    yield from zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)


@pytest.fixture(scope="module")
def server(twin_gated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("control")
    (folder / "run").mkdir()
    (folder / "run" / "control.json").write_text(json.dumps(FORMER))
    server = Server(
        four_heads(folder / "model", twin_gated), folder, SETTINGS,
        ["--dtype", "float32", "--enforce-eager", "--tensor-parallel-size", "2", "--api-server-count", "2",
         "--enable-prefix-caching"],
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "SLUICE_ADMIN_TOKEN": TOKEN, "SLUICE_RUN_DIR": str(folder / "run")},
    )  # fmt: skip
    server.wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fresh(server: Server) -> dict[bool, list[float]]:
    """What one prompt gives under either state, with nothing in the prefix cache."""
    prompt = passages()[50][:1200]
    found = {}
    for enabled in (True, False):
        switch(server, enabled)
        found[enabled] = logprobs(server, prompt, cache_salt=f"fresh-{enabled}")
    assert apart(found[True], found[False]) > 0.05
    return found


def test_a_former_server_in_the_same_folder_left_nothing_behind(server):
    time.sleep(3)  # the follower looks for late ranks
    state = request(server, "GET", "state")[1]["control"]
    assert (state["generation"], state["switching"], state["guard"]) == (0, False, None)
    assert state["values"]["patches.gate.enabled"] == {"value": True, "origin": "default", "wanted": True}
    assert server.metrics()["engine_paused",] == 0
    assert request(server, "GET", "changes")[1]["changes"] == []


def test_cached_prompts_follow_the_state(server, fresh):
    prompt = passages()[50][:1200]
    for enabled in (True, False, True):
        switch(server, enabled)
        for _ in range(2):  # computed, then from the cache
            assert apart(logprobs(server, prompt), fresh[enabled]) < EXACT


def switched_in_the_middle(server, ids: list[int]) -> tuple[list[int], list[float], int]:
    """Generate 400 tokens, switch the gate off meanwhile, and return them with how many had come when it was done."""
    switch(server, True)
    tokens: list[int] = []
    values: list[float] = []

    def read() -> None:
        for token, value in stream(server, ids, 400):
            tokens.append(token)
            values.append(value)

    reader = threading.Thread(target=read)
    reader.start()
    while len(tokens) < 20:
        time.sleep(0.005)
    switch(server, False)
    come = len(tokens)
    reader.join(120)
    assert len(tokens) == 400
    return tokens, values, come


def test_a_request_in_flight_goes_on_under_the_new_state(server):
    """The last tokens are looked at, which look back at all others: those of the old state may come late."""
    last = 60
    ids = server.complete(passages()[51][:200], 1)["choices"][0]["prompt_token_ids"]
    for _ in range(8):  # on a busy machine the request may be over before the switch is
        tokens, values, come = switched_in_the_middle(server, ids)
        if come < 400 - 2 * last:
            break
    assert come < 400 - 2 * last, "the request was nearly over before the switch, eight times"
    again = list(stream(server, ids + tokens[:-last], last))
    assert [token for token, _ in again] == tokens[-last:]
    assert apart([value for _, value in again], values[-last:]) < EXACT
    old = list(stream(server, ids, 400))
    assert apart([value for _, value in old], values) > 0.05, "the switch made no difference"


def test_two_hundred_switches_under_traffic(server, fresh):
    """No request is lost, no rank is left behind, no cached prompt mixes states."""
    stop = threading.Event()
    texts = [text[:300] for text in passages()[52:60]]

    def client(index: int) -> list[int]:
        counts = []
        while not stop.is_set():
            counts.append(len(server.complete(texts[index], 24)["choices"][0]["token_ids"]))
        return counts

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, index) for index in range(8)]
        try:
            first = request(server, "GET", "state")[1]["control"]["generation"]
            start = first % 2 == 0
            for index in range(200):
                switch(server, (index % 2 == 0) == start)
        finally:
            stop.set()
        counts = [count for done in clients for count in done.result(120)]
    assert set(counts) == {24}
    assert len(counts) > 8
    state = request(server, "GET", "state")[1]
    last = state["control"]["generation"]
    assert last - first >= 199
    assert {rank["generation"]["applied"] for rank in state["engines"][0]["ranks"]} == {last}
    enabled = state["control"]["values"]["patches.gate.enabled"]["value"]
    assert apart(logprobs(server, passages()[50][:1200]), fresh[enabled]) < EXACT
    for text in texts:  # what the traffic left in the cache
        assert apart(logprobs(server, text), logprobs(server, text, cache_salt="fresh")) < EXACT
    metrics = server.metrics()
    assert metrics["switches_total", "applied"] == last
    assert metrics["engine_paused",] == 0
    assert metrics["patch_enabled", "gate"] == float(enabled)


def test_of_several_writers_with_one_generation_one_wins(server):
    state = request(server, "GET", "state")[1]["control"]
    floor = state["values"]["patches.gate.floor"]["value"]
    headers = {"If-Match": str(state["generation"])}

    def write(index: int) -> int:
        return request(server, "PUT", "patches/gate", {"floor": floor + 0.01 * (index + 1)}, **headers)[0]

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(write, range(8)))
    assert sorted(statuses) == [200] + 7 * [412]
    written = floor + 0.01 * (statuses.index(200) + 1)
    metrics = server.settled(("patch_parameter", "floor", "gate"), written)
    assert metrics["patch_parameter", "floor", "gate"] == written
    assert metrics["patch_parameter", "temperature", "gate"] == 1
    assert request(server, "PUT", "patches/gate", {"floor": None})[0] == 200


def test_a_wrong_token_changes_nothing(server):
    before = request(server, "GET", "state")[1]["control"]["generation"]
    status, answer = request(server, "PUT", "patches/gate", {"enabled": True}, Authorization="Bearer wrong")
    assert status == 401
    assert "admin tokens" in answer["error"]
    assert request(server, "GET", "state")[1]["control"]["generation"] == before


def test_an_edited_file_reaches_every_rank(server):
    file = server.log.parent / "sluice.yaml"
    assert request(server, "PUT", "patches/gate", {"enabled": None, "floor": None})[0] == 200
    for enabled in (False, True):
        file.write_text(json.dumps({**SETTINGS, "patches": {"gate": {"enabled": enabled}}}))
        metrics = server.settled(("patch_enabled", "gate"), float(enabled), seconds=45)  # a failure is tried anew in 30
        assert metrics["patch_enabled", "gate"] == float(enabled)
        assert request(server, "GET", "state")[1]["control"]["values"]["patches.gate.enabled"]["origin"] == "file"
    file.write_text("patches: [")
    metrics = server.settled(("config_file_good",), 0.0)
    assert metrics["config_file_good",] == 0
    assert metrics["patch_enabled", "gate"] == 1
    file.write_text(json.dumps(SETTINGS))
    assert server.settled(("config_file_good",), 1.0)["config_file_good",] == 1


def test_the_routes_are_documented(server):
    paths = json.loads(get(f"{server.url}/openapi.json"))["paths"]
    assert {"/plugins/sluice/state", "/plugins/sluice/patches/{name}", "/plugins/sluice/changes"} <= set(paths)


