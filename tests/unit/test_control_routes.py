"""The admin HTTP routes: who may change what, what is refused, and what a fuzzer finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import settings

from tests.unit.control import MemoryEngines
from vllm_sluice import config
from vllm_sluice.config import Control
from vllm_sluice.control.controller import Controller
from vllm_sluice.control.journal import Journal
from vllm_sluice.control.routes import MOST_BYTES, build_router
from vllm_sluice.control.tokens import Tokens

PREFIX = "/plugins/sluice"
TOKENS = Tokens({"ann": "ann-has-this-token", "bob": "bob-has-this-token"})
ANN = {"Authorization": "Bearer ann-has-this-token"}
BOB = {"Authorization": "Bearer bob-has-this-token"}
LOCAL = ("127.0.0.1", 50000)
Make = Callable[..., TestClient]


@pytest.fixture
def engines() -> MemoryEngines:
    return MemoryEngines()


@pytest.fixture
def make(engines: MemoryEngines, tmp_path: Path) -> Make:
    def client(
        tokens: Tokens = TOKENS, client: tuple[str, int] = LOCAL, per_minute: int = 10_000, **control_keys: Any
    ) -> TestClient:
        controller = Controller(Journal(tmp_path, "a"), engines, config.load(environ={}), engines.reports)
        control = Control(changes_per_minute=per_minute, **control_keys)
        app = FastAPI()
        app.include_router(build_router(PREFIX, control, tokens, lambda: controller))
        return TestClient(app, client=client)

    return client


def put(client: TestClient, path: str = "patches/gate", body: Any = None, **headers: str) -> Any:
    return client.put(f"{PREFIX}/{path}", json={"enabled": False} if body is None else body, headers=headers or ANN)


def test_a_change_answers_when_all_ranks_have_it(make, engines):
    answer = put(make())
    assert answer.status_code == 200
    assert [rank.values["gate"]["enabled"] for rank in engines.ranks] == [False, False]
    body = answer.json()
    assert body.pop("seconds") >= 0
    assert body == {
        "generation": 1, "paused": True, "ranks": 2, "tried": False,
        "changed": {"patches.gate.enabled": {"from": True, "to": False}},
    }  # fmt: skip
    assert answer.headers["etag"] == '"1"'


def test_the_audit_names_the_token(make):
    client = make()
    put(client)
    put(client, body={"enabled": True, "floor": 0.5}, **BOB)
    changes = client.get(f"{PREFIX}/changes").json()["changes"]
    assert [(change["who"], change["result"], change["generation"]) for change in changes] == [
        ("ann", "applied", 1), ("bob", "applied", 2),
    ]  # fmt: skip
    assert changes[1]["changed"]["patches.gate.floor"] == {"from": 0.0, "to": 0.5}
    assert "token" not in json.dumps(changes)
    assert len(client.get(f"{PREFIX}/changes?limit=1").json()["changes"]) == 1


def test_dry_run_changes_nothing_and_needs_no_token(make, engines):
    body = {"patches": {"gate": {"temperature": 2}}, "probes": {"attention": {"enabled": False}}}
    answer = make(tokens=Tokens({})).post(f"{PREFIX}/dry-run", json=body)
    assert answer.json() == {
        "generation": 0,
        "pauses": True,
        "changed": {
            "patches.gate.temperature": {"from": 1.0, "to": 2.0},
            "probes.attention.enabled": {"from": True, "to": False},
        },
    }
    assert engines.log == []


def test_the_schema_holds_run_time_keys_only(make):
    schema = make().get(f"{PREFIX}/schema").json()
    assert set(schema["patches"]["gate"]["properties"]) == {"enabled", "temperature", "floor"}
    assert set(schema["probes"]["attention"]["properties"]) == {"enabled", "interval_seconds", "layers"}
    assert "Divides the gate's logits" in schema["patches"]["gate"]["properties"]["temperature"]["description"]


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"X-Nothing": "1"}, 401, "Authorization: Bearer TOKEN"),
        ({"Authorization": "Bearer"}, 401, "Authorization: Bearer TOKEN"),
        ({"Authorization": "Basic YW5uOmFubi1oYXMtdGhpcy10b2tlbg=="}, 401, "Authorization: Bearer TOKEN"),
        ({"Authorization": "Bearer ann-has-this-toke"}, 401, "none of this server's admin tokens"),
        ({"Authorization": "Bearer \u00e4"}, 401, "none of this server's admin tokens"),
    ],
)
def test_wrong_tokens_change_nothing(make, engines, headers, status, message):
    encoded = {key: value.encode("latin-1") for key, value in headers.items()}
    answer = make().put(f"{PREFIX}/patches/gate", json={"enabled": False}, headers=encoded)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert engines.log == []


def test_without_a_token_the_server_is_read_only(make):
    answer = put(make(tokens=Tokens({})))
    assert answer.status_code == 403
    assert "SLUICE_ADMIN_TOKEN" in answer.json()["error"]


def test_other_machines_need_an_explicit_setting(make):
    answer = put(make(client=("10.1.2.3", 1234)))
    assert answer.status_code == 403
    assert "10.1.2.3" in answer.json()["error"]
    assert "control.allow_remote" in answer.json()["error"]
    assert put(make(client=("10.1.2.3", 1234), allow_remote=True)).status_code == 200
    for address in ("::1", "127.0.0.2", "::ffff:127.0.0.1"):
        assert put(make(client=(address, 1234)), body={"enabled": True}).status_code == 200


def test_attempts_are_limited_wrong_ones_too(make):
    client = make(per_minute=3)
    statuses = [put(client, Authorization="Bearer wrong").status_code for _ in range(4)]
    assert statuses == [401, 401, 401, 429]
    assert [put(client).status_code for _ in range(3)] == [200, 200, 200]  # wrong tokens do not lock the right one out
    answer = put(client)
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert client.get(f"{PREFIX}/changes").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("patches/gates", {}, 404, "there is no patch 'gates'; there are: gate"),
        ("probes/gate", {}, 404, "the probe 'gate' is not installed"),
        ("patches/gate", {"enable": True}, 400, "patches.gate.enable: unknown key; at run time enabled, "),
        ("patches/gate", {"source": "none"}, 400, "patches.gate.source shapes the compiled model"),
        ("patches/gate", {"enabled": 1}, 400, "patches.gate.enabled: Input should be a valid boolean; found 1"),
        ("patches/gate", {"temperature": "hot"}, 400, "patches.gate.temperature: Input should be a valid number"),
        ("probes/attention", {"interval_seconds": -1}, 400, "greater than or equal to 0"),
        ("patches/gate", [], 400, "the body is []"),
    ],
)
def test_what_does_not_fit_is_explained(make, engines, path, body, status, message):
    answer = put(make(), path, body)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert engines.log == []


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400), (b"{", 400), (b"\xff\xfe", 400), (b'{"temperature": NaN}', 400), (b"[" * 10_000, 400),
        (b'{"enabled": true, "enabled": false}', 400), (b'{"floor": 1e999}', 400),
        (b'{"enabled": ' + b" " * MOST_BYTES + b"false}", 413),
    ],
)  # fmt: skip
def test_malformed_and_huge_bodies(make, engines, content, status):
    answer = make().put(f"{PREFIX}/patches/gate", content=content, headers=ANN)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert engines.log == []


def test_if_match_guards_against_a_lost_update(make):
    client = make()
    assert put(client, **ANN, **{"If-Match": '"0"'}).status_code == 200
    late = put(client, body={"enabled": True}, **BOB, **{"If-Match": '"0"'})
    assert late.status_code == 412
    assert "generation 1, not 0" in late.json()["error"]
    assert put(client, **ANN, **{"If-Match": "one"}).status_code == 400
    assert put(client, body={"enabled": True}, **BOB, **{"If-Match": "*"}).status_code == 200


def test_errors_of_the_switch_have_their_status(make, engines):
    client = make()
    engines.ranks[0].refuses = {1}
    assert put(client).status_code == 502
    engines.refuses_pause = True
    assert put(client).status_code == 502
    assert "could not be paused" in put(client).json()["error"]
    engines.paused = True
    assert put(client).status_code == 409
    assert "paused by someone else" in put(client).json()["error"]


def test_before_the_engine_is_there_the_answer_is_503(tmp_path):
    app = FastAPI()
    app.include_router(build_router(PREFIX, Control(), TOKENS, lambda: None))
    answer = put(TestClient(app, client=LOCAL))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def fuzzed() -> FastAPI:
    import tempfile

    engines = MemoryEngines()
    journal = Journal(Path(tempfile.mkdtemp(prefix="sluice-fuzz-")), "a")
    controller = Controller(journal, engines, config.load(environ={}), engines.reports)
    asyncio.run(controller.installed())
    app = FastAPI()
    control = Control(changes_per_minute=1_000_000, allow_remote=True)
    app.include_router(build_router(PREFIX, control, TOKENS, lambda: controller))
    return app


schema = schemathesis.openapi.from_asgi("/openapi.json", fuzzed())


@schema.parametrize()
@settings(max_examples=100)
def test_schemathesis(case):
    """Statuses, content types and bodies are as documented, and no input makes a server error."""
    case.call_and_validate(headers=ANN)
