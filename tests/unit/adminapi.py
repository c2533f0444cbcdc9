"""A small server that answers like Sluice's admin API, for tests of its client; it holds one gate and two probes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKENS = {"alice": "alice-0123456789abcdef", "bob": "bob-0123456789abcdef"}
DEFAULTS: dict[str, Any] = {
    "patches.gate.enabled": True,
    "patches.gate.temperature": 1.0,
    "probes.attention.enabled": True,
    "probes.attention.interval_seconds": 0.25,
}
PREFIX = "/plugins/sluice/"


class Failure(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class AdminApi:
    """The state of the server; tests change its fields."""

    def __init__(self) -> None:
        self.generation = 3
        self.admin: dict[str, Any] = {}
        self.file: dict[str, Any] = {"probes.attention.interval_seconds": 0.5}
        self.changes: list[dict[str, Any]] = []
        self.ranks = {"pp0-tp0": 3, "pp0-tp1": 3}  # rank to the generation that it applies
        self.tokens = dict(TOKENS)
        self.control = True
        self.paused_seconds: float | None = None
        self.switching = False
        self.file_state: dict[str, Any] | None = {"path": "/etc/sluice.yaml", "good": True, "error": None}
        self.live: dict[str, Any] | str | None = None
        self.fail: dict[str, Failure] = {}  # kind to how its change fails
        self.raw: dict[str, tuple[int, str, bytes]] = {}  # path to an answer that is not the API's
        self.delay = 0.0
        self.requests: list[tuple[str, str, Any, dict[str, str]]] = []

    # -------------------------------------------------------------------------------------- state
    def values(self) -> dict[str, Any]:
        return {**DEFAULTS, **self.file, **self.admin}

    def state(self) -> dict[str, Any]:
        now = time.time()
        patch = {"installed": True, "enabled": self.values()["patches.gate.enabled"], "last_change": now - 65}
        ranks = [
            {
                "rank": rank,
                "version": "0.1.0",
                "vllm_version": "0.32.0",
                "fingerprint": "3f9ac01be5d27714",
                "generation": {"desired": self.generation, "applied": applied},
                "snapshot_age_seconds": 0.4,
            }
            for rank, applied in self.ranks.items()
        ]
        engine = {"engine": "0", "model_name": "sluice/twin-32", "patches": {"gate": patch}, "ranks": ranks}
        control = {
            "generation": self.generation,
            "values": {key: {"value": value, "origin": self.origin(key)} for key, value in self.values().items()},
            "switching": self.switching,
            "paused_seconds": self.paused_seconds,
            "file": self.file_state,
            "writable": bool(self.tokens),
        }
        return {"time": now, "engines": [engine], "control": control if self.control else None}

    def origin(self, key: str) -> str:
        return "admin" if key in self.admin else "file" if key in self.file else "default"

    # -------------------------------------------------------------------------------------- changes
    def edit(self, section: str, kind: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the admin's values after a change, and the differences."""
        if f"{section}.{kind}" not in ("patches.gate", "probes.attention"):
            raise Failure(404, f"there is no {section} {kind!r}; there are: gate")
        admin = dict(self.admin)
        for name, value in body.items():
            key = f"{section}.{kind}.{name}"
            if key not in DEFAULTS:
                raise Failure(400, f"{key}: unknown key;\nat run time enabled may change")
            if value is None:
                admin.pop(key, None)
            elif type(value) is not type(DEFAULTS[key]):
                raise Failure(400, f"{key}: Input should be a valid {type(DEFAULTS[key]).__name__}; found {value!r}")
            else:
                admin[key] = value
        before, after = self.values(), {**DEFAULTS, **self.file, **admin}
        return admin, {key: {"from": before[key], "to": after[key]} for key in after if before[key] != after[key]}

    def put(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        who = self.authorize(headers)
        section, kind = path.split("/")
        admin, changed = self.edit(section, kind, body)
        expected = headers.get("if-match")
        if expected is not None and expected != f'"{self.generation}"':
            raise Failure(412, f"the generation is {self.generation}, not {expected}; look at the state again")
        if kind in self.fail:
            raise self.fail[kind]
        if changed:
            self.generation += 1
            self.ranks = dict.fromkeys(self.ranks, self.generation)
            self.record(changed, who)
        self.admin = admin
        pauses = any(key.startswith("patches.") for key in changed)
        answer = {"generation": self.generation, "changed": changed, "paused": pauses, "seconds": 0.043}
        return {**answer, "ranks": len(self.ranks)}

    def record(self, changed: dict[str, Any], who: str = "alice", result: str = "applied", error: Any = None) -> None:
        self.changes.append(
            {"generation": self.generation, "time": time.time(), "who": who, "source": "admin", "changed": changed,
             "result": result, "error": error, "seconds": 0.043}
        )  # fmt: skip

    def dry_run(self, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        self.authorize(headers)
        found: dict[str, Any] = {}
        for section, kinds in body.items():
            for kind, values in kinds.items():
                found |= self.edit(section, kind, values)[1]
        pauses = any(key.startswith("patches.") for key in found)
        return {"generation": self.generation, "changed": found, "pauses": pauses}

    def authorize(self, headers: dict[str, str]) -> str:
        if not self.tokens:
            raise Failure(403, "this server takes no changes, because it has no admin token; set control.token_file")
        given = headers.get("authorization", "").removeprefix("Bearer ")
        for name, token in self.tokens.items():
            if token == given:
                return name
        raise Failure(401, "the admin token is wrong or missing")

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, headers: dict[str, str]) -> Any:
        if method == "GET" and path == "state":
            return self.state()
        if method == "GET" and path == "live.json":
            return self.live
        if not self.control:
            raise Failure(-404, "Not Found")
        if method == "GET" and path == "changes":
            return {"changes": self.changes[-int(query.get("limit", ["50"])[0]) :]}
        if method == "PUT" and path.startswith(("patches/", "probes/")):
            return self.put(path, body, headers)
        if method == "POST" and path == "dry-run":
            return self.dry_run(body, headers)
        raise Failure(-404, "Not Found")


@contextmanager
def served(api: AdminApi) -> Iterator[str]:
    """Serve on a free port of the loopback interface; yields the base address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path = parts.path.removeprefix(PREFIX)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            headers = {key.lower(): value for key, value in self.headers.items()}
            api.requests.append((self.command, path, body, headers))
            time.sleep(api.delay)
            if path in api.raw:
                status, content_type, content = api.raw[path]
                self._send(status, content_type, content)
                return
            try:
                found = api.answer(self.command, path, parse_qs(parts.query), body, headers)
            except Failure as failure:
                # FastAPI's own answer to an unknown path has another form.
                member = "detail" if failure.status < 0 else "error"
                self._send(abs(failure.status), "application/json", json.dumps({member: str(failure)}).encode())
                return
            if isinstance(found, str):
                self._send(404, "text/plain; charset=utf-8", found.encode())
            else:
                self._send(200, "application/json", json.dumps(found).encode())

        do_PUT = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

        def _send(self, status: int, content_type: str, content: bytes) -> None:
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", content.decode())
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # a client that did not wait
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
