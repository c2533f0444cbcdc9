"""The API server's side: the series on `/metrics`, and the routes under `/plugins/sluice/`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder

from vllm_sluice import compat, config
from vllm_sluice.control import routes as control_routes
from vllm_sluice.control.controller import Controller, NotReady, RankReport
from vllm_sluice.control.follower import Follower
from vllm_sluice.control.journal import Journal
from vllm_sluice.control.measured import server_values
from vllm_sluice.control.tokens import read_tokens
from vllm_sluice.live import routes
from vllm_sluice.live.history import History
from vllm_sluice.telemetry import rundir
from vllm_sluice.telemetry.collector import SnapshotCollector


class SluiceEndpoint:
    """vLLM endpoint plugin (plugins/endpoint_plugins/interface.py)."""

    name = "sluice"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._loaded = config.load()
        settings = self._loaded.config
        self._enabled = settings.enabled
        self._live = settings.live
        self._control = settings.control
        self._tokens = read_tokens(settings.control.token_file)
        folder = rundir.announce(settings.telemetry)
        self._journal = Journal(folder, rundir.server())
        self._collector = SnapshotCollector(folder, settings.telemetry.detail, lambda: server_values(self._journal))
        self._history = History(self._collector, settings.live, settings.telemetry.interval_seconds)
        self._controller: Controller | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the series to `/metrics`; there is no engine yet."""
        if not self._enabled:
            return
        app.include_router(routes.build_router(self._collector, self._live, self._history, self._describe))
        if self._control.enabled:
            app.include_router(
                control_routes.build_router(routes.PREFIX, self._control, self._tokens, lambda: self._controller)
            )
        if compat.multiprocess_metrics():
            # With several API servers /metrics is answered from files of plain counters and gauges, where a custom
            # collector does not appear; a plugin's route replaces the server's own of the same path.
            _replace_metrics(app, self._collector)
        else:
            REGISTRY.register(self._collector)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start to record the live page's history, and to follow the configuration file."""
        if not self._enabled:
            return
        if self._live.enabled:
            self._tasks.append(routes.start(self._history))
        if self._control.enabled:
            engines = compat.EngineClients(engine_client)
            self._controller = Controller(self._journal, engines, self._loaded, lambda: self._reports(engines.ranks))
            if engines.index == 0:
                self._tasks.append(asyncio.create_task(Follower(self._controller).follow(), name="sluice-follow"))

    async def _describe(self) -> dict[str, Any] | None:
        if self._controller is None:
            return None
        try:
            return {**await self._controller.describe(), "writable": bool(self._tokens)}
        except NotReady as error:
            return {"error": str(error), "writable": False}

    def _reports(self, expected: int) -> Mapping[str, RankReport]:
        """Return what every rank reports; an RPC to a worker without the plugin would corrupt vLLM's queue."""
        found = {}
        for snapshot in self._collector.snapshots():
            generations: dict[str, int] = {}
            failed = set()
            for series, value in zip(snapshot.series, snapshot.values.tolist(), strict=True):
                if series.metric == "sluice_generation":
                    generations[dict(series.labels)["kind"]] = int(value)
                elif series.metric == "sluice_probe_failed" and value == 1:
                    failed.add(dict(series.labels)["probe"])
            if generations:
                rank = f"dp{snapshot.info.engine}-{snapshot.info.rank}"
                found[rank] = RankReport(generations["desired"], generations["applied"], frozenset(failed))
        if len(found) < expected:
            raise NotReady(
                f"{len(found)} of {expected} ranks report on this machine; ranks on other machines, or without the "
                "plugin, cannot be switched from here"
            )
        if len(found) > expected:
            raise NotReady(
                f"{len(found)} ranks report in the run folder, and this server has {expected}: several servers share "
                "the folder; start each by itself, with a SLUICE_RUN_DIR of its own or none"
            )
        return found


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
