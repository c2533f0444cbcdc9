"""Snapshots of a made-up model, written the way a worker writes them, for tests of the live page."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

from vllm_sluice.config import Live
from vllm_sluice.live.history import History
from vllm_sluice.live.routes import build_router
from vllm_sluice.telemetry.catalogue import layer_label
from vllm_sluice.telemetry.collector import SnapshotCollector
from vllm_sluice.telemetry.snapshot import RankInfo, Series, SnapshotWriter

Values = Mapping[Series, float]


def info(rank: str = "pp0-tp0", engine: str = "0", model: str = "sluice/twin-32", pid: int | None = None) -> RankInfo:
    return RankInfo(pid or os.getpid(), rank, engine, model, "0.1.0", "0.32.0", "3f9ac01be5d27714")


def write(folder: Path, about: RankInfo, values: Values) -> SnapshotWriter:
    """Write one snapshot file, once."""
    name = re.sub(r"[^\w-]", "_", f"{about.engine}-{about.rank}")
    writer = SnapshotWriter(folder / f"{name}.snapshot", about, list(values))
    writer.write(np.array(list(values.values())))
    return writer


def series(metric: str, **labels: str) -> Series:
    return Series(f"sluice_{metric}", tuple(labels.items()))


@dataclass
class Model:
    """A model whose statistics vary over layers and time; `step` counts points."""

    layers: int = 32
    heads: int = 16
    gate: bool = True
    switch_steps: tuple[int, ...] = ()
    quiet: range = range(0)
    engine: str = "0"
    ranks: int = 1
    name: str = "sluice/twin-32"
    nonfinite_layer: int | None = None
    quantization: bool = False
    baseline: bool = False
    period: float = 2.0
    started: float = 0.0
    _writers: dict[str, SnapshotWriter] = field(default_factory=dict)

    def values(self, step: int, time_: float = 0.0, rank: int = 0) -> dict[Series, float]:
        noise = np.random.default_rng(1000 * step + rank)
        enabled = self._enabled(step)
        found: dict[Series, float] = {}
        for layer in range(self.layers):
            found.update(self._layer(layer, step, enabled, noise))
        if step in self.quiet:
            found = {key: math.nan if not key.metric.endswith("_total") else v for key, v in found.items()}
        busy = step - sum(q < step for q in self.quiet)
        found[series("tokens_observed_total", phase="prefill")] = 120.0 * busy + 7
        found[series("tokens_observed_total", phase="decode")] = 36.0 * busy + 3
        found[series("start_tokens_observed_total")] = 2.0 * busy
        found[series("queries_sampled_total", phase="decode")] = 8.0 * busy
        found[series("patch_installed", patch="gate")] = float(self.gate)
        if self.gate:
            found[series("patch_enabled", patch="gate")] = float(enabled)
            past = [s for s in self.switch_steps if s <= step]
            if past:
                changed = self.started + self.period * past[-1] - 0.7
                found[series("patch_last_change_timestamp_seconds", patch="gate")] = changed
        name = f"pp0-tp{rank}"
        for kind in ("desired", "applied"):
            found[series("generation", rank=name, kind=kind)] = float(sum(s <= step for s in self.switch_steps))
        for probe in ("residual", "attention"):
            found[series("probe_errors_total", probe=probe)] = 0.0
        found[series("telemetry_interval_seconds")] = 1.0
        return found

    def write(self, folder: Path, step: int) -> None:
        for rank in range(self.ranks):
            values = self.values(step, rank=rank)
            about = info(f"pp0-tp{rank}", self.engine, self.name)
            key = about.rank
            if key not in self._writers:
                path = folder / f"{self.engine}-{about.rank}.snapshot"
                known = {**self.values(10**6, rank=rank), **values}
                self._writers[key] = SnapshotWriter(path, about, list(known))
                self._series = list(known)
            self._writers[key].write(np.array([values.get(s, math.nan) for s in self._series]))

    def _enabled(self, step: int) -> bool:
        return self.gate and sum(s <= step for s in self.switch_steps) % 2 == 0

    def _massive(self, step: int) -> int:
        """Count the steps so far, the first one aside, in which the gate did not act."""
        if not self.gate:
            return step
        edges = [s for s in self.switch_steps if s <= step]
        return sum([*edges, step + 1][i + 1] - edge for i, edge in enumerate(edges) if i % 2 == 0)

    def _layer(self, layer: int, step: int, enabled: bool, noise: np.random.Generator) -> dict[Series, float]:
        label = {"layer": layer_label(layer)}
        depth = layer / max(1, self.layers - 1)
        jitter = 1 + 0.08 * noise.standard_normal()
        median = 0.08 + 0.9 * depth**1.5
        massive = 0.0 if enabled else 1.0
        wave = 1 + 0.3 * math.sin(step / 23 + depth * 3)
        plateau = (900 * massive + 40) * (1 / (1 + math.exp(-40 * (depth - 0.12)))) * (1 if depth < 0.97 else 0.35)
        peak = max((6 + 10 * depth + plateau * wave) * jitter, 1.1 * median)
        sink = (0.04 + 0.05 * depth) if enabled else 0.08 + 0.75 * math.sin(math.pi * depth) ** 0.6 * (0.9 + 0.1 * wave)
        sink = min(0.98, max(0.0, sink * jitter))
        gate = 0.1 + 0.12 * math.sin(2.5 * math.pi * depth) ** 2 + 0.02 * noise.standard_normal()
        found = {
            series("activation_abs_max", **label): peak,
            series("activation_median", **label): median,
            series("activation_max_to_median_ratio", **label): peak / median,
            series("activation_rms", **label): 1.4 * median,
            series("activation_kurtosis", **label): 3 + (peak / median) ** 1.2 / 4,
            series("activation_top_abs", **label, rank="1"): peak,
            series("activation_top_channel", **label, rank="1"): float(1415 if massive else 100 + 37 * layer % 900),
            series("activation_top_abs", **label, rank="2"): peak / 2,
            series("activation_top_channel", **label, rank="2"): 7.0,
            series("massive_activations_total", **label, position="start"): float(self._massive(step)),
            series("massive_activations_total", **label, position="delimiter"): step // 5 * float(layer % 4 == 2),
            series("massive_activations_total", **label, position="other"): 0.0,
            series("nonfinite_total", **label): 3.0 if layer == self.nonfinite_layer else 0.0,
            series("attention_sink_mass", **label): sink,
            series("attention_sink_heads", **label): float(round(self.heads * sink)),
            series("attention_heads", **label): float(self.heads),
            series("attention_entropy_ratio", **label): min(1.0, (0.75 - 0.6 * sink) * jitter),
        }
        if self.quantization:
            found.update(_quantization(label, peak))
        if self.baseline:
            found[series("baseline_activation_abs_max", **label)] = 900 * wave + 20
            found[series("baseline_activation_max_to_median_ratio", **label)] = (900 * wave + 20) / median
            found[series("baseline_attention_sink_mass", **label)] = 0.5
        if self.gate:
            found[series("gate_mean", **label)] = min(1.0, max(0.01, gate))
            found[series("gate_closed_ratio", **label)] = min(1.0, max(0.0, 0.9 - 2.5 * gate))
        return found


FORMATS = {("serving", "none"): 65504.0, ("fp8_e4m3", "none"): 448.0, ("int8", "static"): 1200.0}
"""Largest value that a format holds, by format and scale."""
SITES = {"hidden": 1.0, "attention_input": 0.4, "mlp_input": 0.25}
"""Size of the values at a site, in parts of the hidden state's."""


def _quantization(label: dict[str, str], peak: float) -> dict[Series, float]:
    found = {}
    for site, part in SITES.items():
        for (form, scale), most in FORMATS.items():
            name = "quantization_headroom_ratio"
            found[series(name, **label, site=site, format=form, scale=scale)] = most / (part * peak)
        for form, scale in (("int8", "per_token"), ("int8", "per_tensor"), ("fp8_e4m3", "per_tensor")):
            decibels = 60 - 12 * math.log10(1 + part * peak) - 4 * (scale == "per_tensor")
            found[series("quantization_snr_decibels", **label, site=site, format=form, scale=scale)] = decibels
        found[series("quantization_elements_total", **label, site=site)] = 1e6
        found[series("quantization_clipped_total", **label, site=site)] = 20.0
    return found


def record(
    history: History, folder: Path, models: list[Model], steps: int, now: list[float], period: float = 2.0
) -> None:
    """Record `steps` points `period` seconds apart that end now; `now` is the history's clock."""
    begin = time.time() - period * (steps - 1)
    for model in models:
        model.started, model.period = begin, period
    for step in range(steps):
        now[0] = begin + period * step
        for model in models:
            model.write(folder, step)
        history.record()


Hindrance = Callable[[Request], Awaitable[Response | None]]
"""Answers in place of the server, or lets it answer."""


@contextlib.contextmanager
def served(
    collector: SnapshotCollector, settings: Live, history: History, hindrance: Hindrance | None = None
) -> Iterator[str]:
    """Serve the page on a free loopback port; yields its address."""
    app = FastAPI()
    if hindrance is not None:

        @app.middleware("http")
        async def hinder(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
            return await hindrance(request) or await go_on(request)

    app.include_router(build_router(collector, settings, history))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/plugins/sluice/"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listening.close()
