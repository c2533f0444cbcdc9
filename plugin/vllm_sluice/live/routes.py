"""The page's HTTP routes, read-only, and the task that feeds its history."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import RedirectResponse, Response

from vllm_sluice.config import Live
from vllm_sluice.live.history import History
from vllm_sluice.live.point import LAYER_METRICS
from vllm_sluice.live.state import describe
from vllm_sluice.telemetry.collector import SnapshotCollector

logger = logging.getLogger(__name__)

PREFIX = "/plugins/sluice"

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_MODULES = ("page", "dom", "heat", "metrics", "past", "status", "tables", "timeline")
_SCRIPT = "text/javascript; charset=utf-8"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    **{f"/{name}.js": (f"{name}.js", _SCRIPT) for name in _MODULES},
}
_WORTH_COMPRESSING = 16_384
_DISABLED = (
    "The live page is switched off: the setting live.enabled is false. "
    "Set it to true (or SLUICE_LIVE__ENABLED=true) and restart the server.\n"
)


Control = Callable[[], Awaitable[dict[str, Any] | None]]
"""Returns the run-time state, or None if there is no control over it."""


async def no_control() -> None:
    """Say that there is no control over the run-time state."""


def build_router(
    collector: SnapshotCollector, settings: Live, history: History, control: Control = no_control
) -> APIRouter:
    """Return the routes under `/plugins/sluice`.

    With `settings.enabled` false the page and its data answer 404; the state stays readable.

    Parameters
    ----------
    collector
        Answers `state`.
    settings
        Whether there is a page.
    history
        Answers `live.json`; `start` keeps it fed.
    control
        Adds the run-time state to `state`.
    """
    router = APIRouter(prefix=PREFIX)

    @router.get(
        "/state", tags=["sluice"], summary="What is installed, what acts, how far every rank is"
    )
    async def state() -> Response:
        found = await asyncio.to_thread(describe, collector)
        return _answer(json.dumps({**found, "control": await control()}), "application/json")

    if settings.enabled:
        _add_page(router, history)
    else:
        for path in ("", *_FILES, "/live.json"):
            router.add_api_route(path, _switched_off, include_in_schema=False)
    return router


def start(history: History) -> asyncio.Task[None]:
    """Start to record a point every `period_seconds`; the caller keeps the task and cancels it at shutdown.

    Errors are logged once per kind and never end the task. With the page switched off it has nothing to do and ends.
    """
    return asyncio.create_task(_record_forever(history), name="sluice-live-history")


def _add_page(router: APIRouter, history: History) -> None:
    for path, (name, media_type) in _FILES.items():
        router.add_api_route(path, _file_endpoint(name, media_type), include_in_schema=False)

    @router.get("", include_in_schema=False)
    def without_slash() -> Response:
        # Relative, so that it also holds behind a proxy that adds a path of its own.
        return RedirectResponse("sluice/", status_code=307, headers=_HEADERS)

    @router.get("/live.json", include_in_schema=False)
    def live(
        since: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        points: Annotated[int | None, Query(ge=1)] = None,
        engine: str | None = None,
        metrics: str | None = None,
        step: Annotated[int, Query(ge=1, le=100_000)] = 1,
        span: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
        accept_encoding: Annotated[str, Header()] = "",
    ) -> Response:
        wanted = LAYER_METRICS if metrics is None else metrics.split(",")
        content = history.as_json(since, points, engine, wanted, step, span)
        return _compressed(_answer(content, "application/json"), accept_encoding)


def _file_endpoint(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = Path(__file__).with_name(name).read_text(encoding="utf-8")

    async def answer() -> Response:
        return _answer(content, media_type)

    return answer


async def _switched_off() -> Response:
    return _answer(_DISABLED, "text/plain; charset=utf-8", 404)


def _answer(content: str, media_type: str, status_code: int = 200) -> Response:
    return Response(content, status_code, _HEADERS, media_type)


def _compressed(answer: Response, accepted: str) -> Response:
    """Compress a long answer: hours of many layers are megabytes, and the page is often read through a tunnel."""
    offers = {offer.strip().lower() for offer in accepted.split(",")}
    if "gzip" not in offers or len(answer.body) < _WORTH_COMPRESSING:
        return answer
    content = gzip.compress(answer.body, compresslevel=1)  # lets other threads run meanwhile
    headers = {**_HEADERS, "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    return Response(content, answer.status_code, headers, answer.media_type)


async def _record_forever(history: History) -> None:
    reported: set[type[Exception]] = set()
    while history.settings.enabled:
        try:
            await asyncio.to_thread(history.record)
        except Exception as error:
            if type(error) not in reported:
                reported.add(type(error))
                logger.warning(
                    "The live page missed a point of its history; further errors of this kind are not logged.",
                    exc_info=error,
                )
        await asyncio.sleep(history.settings.period_seconds)
