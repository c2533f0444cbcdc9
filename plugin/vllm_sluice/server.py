"""The API server's side: the series on `/metrics`, and the routes under `/plugins/sluice/`."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder

from vllm_sluice import compat, config
from vllm_sluice.live import routes
from vllm_sluice.live.history import History
from vllm_sluice.telemetry import rundir
from vllm_sluice.telemetry.collector import SnapshotCollector


class SluiceEndpoint:
    """vLLM endpoint plugin (plugins/endpoint_plugins/interface.py)."""

    name = "sluice"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(self) -> None:
        settings = config.load().config
        self._enabled = settings.enabled
        self._live = settings.live
        self._collector = SnapshotCollector(rundir.announce(settings.telemetry), settings.telemetry.detail)
        self._history = History(self._collector, settings.live, settings.telemetry.interval_seconds)
        self._recording: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the series to `/metrics`; there is no engine yet."""
        if not self._enabled:
            return
        app.include_router(routes.build_router(self._collector, self._live, self._history))
        if compat.multiprocess_metrics():
            # With several API servers /metrics is answered from files of plain counters and gauges, where a custom
            # collector does not appear; a plugin's route replaces the server's own of the same path.
            _replace_metrics(app, self._collector)
        else:
            REGISTRY.register(self._collector)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start recording the live page's history."""
        if self._enabled and self._live.enabled:
            self._recording = routes.start(self._history)


def _replace_metrics(app: FastAPI, collector: SnapshotCollector) -> None:
    own = CollectorRegistry()
    own.register(collector)

    @app.get("/metrics", include_in_schema=False)
    def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body = b"".join(encode(registry) for registry in (compat.server_registry(), own))
        # OpenMetrics ends with one EOF marker; two encoded registries would carry two.
        return Response(_one_end(body), headers={"Content-Type": content_type})


def _one_end(body: bytes) -> bytes:
    end = b"# EOF\n"
    return body.replace(end, b"") + end if end in body else body
