"""The admin HTTP routes under `/plugins/sluice`: read by everybody, changed with a token of their own."""

from __future__ import annotations

import ipaddress
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Security
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from vllm_sluice.config import Control
from vllm_sluice.control import state, trials
from vllm_sluice.control.controller import Controller, Moved, NotReady, Outcome, TimedOut, TrialUnderWay
from vllm_sluice.control.journal import KEPT_CHANGES, Busy
from vllm_sluice.control.limit import RateLimit
from vllm_sluice.control.state import Refused
from vllm_sluice.control.switch import AlreadyPaused, StillPaused, SwitchFailed
from vllm_sluice.control.tokens import Tokens

logger = logging.getLogger("vllm.sluice.control")

MOST_BYTES = 16_384
_STATUS: dict[type[Exception], int] = {
    Refused: 400, LookupError: 404, AlreadyPaused: 409, TrialUnderWay: 409, Moved: 412, SwitchFailed: 502,
    StillPaused: 502, Busy: 503, NotReady: 503, TimedOut: 504,
}  # fmt: skip
_ANSWERS: dict[int | str, dict[str, Any]] = {
    202: {"description": "The guard tries the change on a share of the requests first; see state and changes."},
    400: {"description": "The body or a value does not fit; nothing was changed."},
    401: {"description": "No token, or a wrong one."},
    403: {"description": "Read-only: the server has no admin token, or the client is not on this machine."},
    404: {"description": "Unknown or not installed."},
    409: {"description": "Somebody else keeps the engine paused, or the guard is trying a change."},
    412: {"description": "If-Match names another generation."},
    413: {"description": f"The body has more than {MOST_BYTES} bytes."},
    429: {"description": "Too many attempts; Retry-After says how long to wait."},
    502: {"description": "A rank refused; `error` says whether all ranks have the old state again."},
    503: {"description": "Another change is under way, or the ranks do not report."},
    504: {"description": "It takes too long; it is carried to its end."},
}
_BEARER = HTTPBearer(auto_error=False, scheme_name="SluiceAdmin", description="An admin token of Sluice.")
"""For the OpenAPI document; `_Gatekeeper` decides."""
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Denied(Exception):
    """A request that may not, or cannot, be served."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


def build_router(
    prefix: str, settings: Control, tokens: Tokens, controller: Callable[[], Controller | None]
) -> APIRouter:
    """Return the routes.

    Parameters
    ----------
    prefix
        Path of the plugin's routes.
    settings, tokens
        Who may change what.
    controller
        Returns the controller, None before the engine is there.
    """
    router = APIRouter(prefix=prefix, tags=["sluice"])
    gatekeeper = _Gatekeeper(settings, tokens)

    def ready() -> Controller:
        found = controller()
        if found is None:
            raise NotReady("the server is still starting; try again")
        return found

    @router.get("/schema", summary="JSON schema of the values that may change while the server runs")
    async def schema() -> Response:
        return _answer(state.schema())

    @router.get("/changes", summary="Audit of changes, oldest first", responses=_only(503))
    async def changes(limit: Annotated[int, Query(ge=1, le=KEPT_CHANGES)] = 50) -> Response:
        async def respond() -> Response:
            return _answer({"changes": ready().journal.changes(limit)})

        return await _guarded(respond)

    @router.post("/dry-run", summary="Say what a change would do", responses=_ANSWERS, openapi_extra=_body(None))
    async def dry_run(request: Request) -> Response:
        async def respond() -> Response:
            body = await _read(request)
            installed = await ready().installed()
            edits: state.Values = {}
            for section, kinds in body.items():
                if section not in state.SECTIONS:
                    raise Refused(f"{section}: unknown key; there are: {', '.join(state.SECTIONS)}")
                for kind, values in _mapping(kinds, section).items():
                    edits |= state.edits(section, kind, _mapping(values, f"{section}.{kind}"), installed)
            found = await ready().preview(edits)
            return _answer({"generation": found.generation, "changed": found.changed, "pauses": found.paused})

        return await _guarded(respond)

    @router.delete("/guard", summary="End the guard's trial; nothing is switched", responses=_ANSWERS)
    async def end_trial(
        request: Request, _documented: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
    ) -> Response:
        async def respond() -> Response:
            who = gatekeeper.admit(request)
            return _answer(_outcome(await trials.end(ready(), who)))

        return await _guarded(respond)

    def add_change(section: str) -> None:
        @router.put(
            f"/{section}/{{name}}", summary=f"Change run-time values of one of the {section}", responses=_ANSWERS,
            openapi_extra=_body(section), name=f"change_{section}",
        )  # fmt: skip
        async def change(
            name: str,
            request: Request,
            _documented: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
            if_match: Annotated[str | None, Header()] = None,
            guard: Annotated[bool, Query(description="false passes the guard by")] = True,
        ) -> Response:
            async def respond() -> Response:
                who = gatekeeper.admit(request)
                edits = state.edits(section, name, await _read(request), await ready().installed())
                done = await ready().change(edits, who=who, if_generation=_generation(if_match), guarded=guard)
                return _answer(_outcome(done), 202 if done.tried else 200, {"ETag": f'"{done.generation}"'})

            return await _guarded(respond)

    for section in state.SECTIONS:
        add_change(section)
    return router


class _Gatekeeper:
    """Decides who may change something, and how often."""

    def __init__(self, settings: Control, tokens: Tokens) -> None:
        self._settings = settings
        self._tokens = tokens
        self._changes = RateLimit(settings.changes_per_minute)
        self._failures = RateLimit(settings.changes_per_minute)

    def admit(self, request: Request) -> str:
        """Return the name of the request's token, and count the attempt.

        Attempts with a wrong token are counted apart, so that they cannot lock the owner of a right one out.
        """
        name = self._name(request)
        self._count(self._changes)
        return name

    def _count(self, limit: RateLimit) -> None:
        if wait := limit.take():
            seconds = math.ceil(wait)
            raise Denied(
                429, f"more than {self._settings.changes_per_minute} attempts in a minute; wait {seconds} s",
                {"Retry-After": str(seconds)},
            )  # fmt: skip

    def _name(self, request: Request) -> str:
        if not self._tokens:
            raise Denied(
                403, "read-only: the server was started without an admin token; set SLUICE_ADMIN_TOKEN or "
                "control.token_file and restart it"
            )  # fmt: skip
        if not self._settings.allow_remote and not _is_local(request):
            raise Denied(
                403, f"changes are taken from this machine only, and the request comes from {request.client.host}; "  # type: ignore[union-attr]
                "set control.allow_remote: true to take others"
            )  # fmt: skip
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            self._count(self._failures)
            raise Denied(401, "send the admin token as Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        name = self._tokens.name(token.strip())
        if name is None:
            self._count(self._failures)
            raise Denied(401, "the token is none of this server's admin tokens", {"WWW-Authenticate": "Bearer"})
        return name


async def _guarded(respond: Callable[[], Awaitable[Response]]) -> Response:
    try:
        return await respond()
    except Denied as error:
        return _answer({"error": str(error)}, error.status, error.headers)
    except tuple(_STATUS) as error:
        status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
        text = str(error.args[0]) if isinstance(error, LookupError) else str(error)
        return _answer({"error": text}, status, {"Retry-After": "1"} if status == 503 else None)
    except Exception as error:
        logger.exception("sluice: an admin request failed")
        return _answer({"error": f"{type(error).__name__}: {error}; the server's log has more"}, 500)


async def _read(request: Request) -> dict[str, Any]:
    """Read a JSON object of bounded size."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            raise Denied(413, f"the body has more than {MOST_BYTES} bytes")
    try:
        body = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON object such as {{\"enabled\": false}}: {error}") from None
    return _mapping(body, "the body")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{where} is {json.dumps(value)[:40]}; an object such as {{\"enabled\": false}} is needed")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _generation(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit()):
        raise Refused(f"If-Match: {if_match[:40]} is no generation; send a number, such as If-Match: \"3\"")
    return int(text)


def _is_local(request: Request) -> bool:
    if request.client is None:  # a Unix socket
        return True
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, of a server that listens on ::
    return (mapped or address).is_loopback


def _outcome(done: Outcome) -> dict[str, Any]:
    return {
        "generation": done.generation, "changed": done.changed, "paused": done.paused, "seconds": done.seconds,
        "ranks": done.ranks, "tried": done.tried,
    }  # fmt: skip


def _answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(content, status, _HEADERS | (headers or {}))


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ANSWERS[status] for status in statuses}


def _body(section: str | None) -> dict[str, Any]:
    """Return the OpenAPI part on a body."""
    kinds = state.schema()
    if section is None:
        objects = {
            name: {"type": "object", "properties": properties, "additionalProperties": False}
            for name, properties in kinds.items()
        }
        schema: dict[str, Any] = {"type": "object", "properties": objects, "additionalProperties": False}
    else:
        schema = {"anyOf": list(kinds[section].values())}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
