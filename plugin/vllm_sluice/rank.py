"""All of Sluice that lives in one worker: installed patches and probes, run-time state, and the snapshot.

The step path only marks rows and copies a few indices. Taking the accumulators, combining windows and writing the
snapshot happen once per interval in a thread; a lock keeps it from a forward pass under way.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_sluice import compat
from vllm_sluice.compat import Batch, Load
from vllm_sluice.config import Config
from vllm_sluice.control import per_request
from vllm_sluice.patches.base import InstalledPatch
from vllm_sluice.patches.choices import Choices
from vllm_sluice.patches.installer import patch_kinds
from vllm_sluice.probes.base import Probe
from vllm_sluice.probes.installer import PROBE_KINDS, ProbeSet
from vllm_sluice.probes.requests import RequestLedger, RequestRecords
from vllm_sluice.probes.window import Window
from vllm_sluice.telemetry import rundir
from vllm_sluice.telemetry.baseline import BaselineInForce
from vllm_sluice.telemetry.snapshot import SUFFIX, RankInfo, Series, SnapshotWriter
from vllm_sluice.trial import TrialMeter

_ERRORS_BEFORE_OFF = 10

_Asking = list[tuple[RequestRecords, slice]]
"""Requests of a pass that ask for their own statistics, and their rows."""


class Rank:
    """Runs beside one loaded model, under `compat.RUNTIME_ATTRIBUTE`."""

    def __init__(
        self, config: Config, load: Load, patches: Mapping[str, InstalledPatch], probes: ProbeSet, folder: Path,
        info: RankInfo,
    ) -> None:
        self._patches = patches
        self._choices: Choices | None = None
        self._trial: TrialMeter | None = None
        if config.control.guard.enabled and patches:
            self._trial = TrialMeter(load.device)
        if config.control.chooses_rows and patches:
            self._choices = Choices({per_request.key(kind): patch for kind, patch in patches.items()})
        self._probes = probes.installed
        self._ledger: RequestLedger | None = None
        if config.control.per_request and self._probes:
            self._ledger = RequestLedger(self._probes)
        self._rows = probes.rows
        self._unavailable = probes.unavailable
        self._kinds = [kind.name for kind in patch_kinds(config)]
        self._info = info
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._telemetry = config.telemetry
        self._dtype_max = torch.finfo(load.dtype).max
        self._started = time.time()
        self._forward_seconds = 0.0
        seen = {layer for probe in self._probes for layer in probe.layers}
        self._baseline = BaselineInForce(config.telemetry.baseline, info.model_name, seen, load.layers)
        self._windows = self._new_windows()
        self._passes_since_take = 0
        self._errors = dict.fromkeys(PROBE_KINDS, 0) | dict.fromkeys(self._unavailable, 1)
        self._off_by_errors: set[str] = set()
        self._seconds = dict.fromkeys(PROBE_KINDS, 0.0)
        self._desired = self._applied = 0
        self._changed: dict[str, float] = {}
        self._stream: Any = None
        self._compare()
        series = self._own_series() + self._baseline.series() + [s for probe in self._probes for s in probe.series()]
        rundir.create(folder)
        path = folder / f"dp{info.engine}-{info.rank}{SUFFIX}"
        self._writer = SnapshotWriter(path, info, series)
        weakref.finalize(self, _remove, path)
        self.publish()
        threading.Thread(
            target=_publish_forever,
            args=(weakref.ref(self), config.telemetry.interval_seconds),
            name="sluice-snapshot",
            daemon=True,
        ).start()

    # -------------------------------------------------------------------------------------------- the step path
    def forward(self, describe: Callable[[], Batch], run: Callable[[], Any]) -> Any:
        """Run one real forward pass with the probes around it, under the patches that its requests chose."""
        run = functools.partial(self._timed, run)
        probes = [probe for probe in self._probes if probe.enabled]
        if not probes and self._choices is None:
            return run()
        with self._lock:
            batch = self._describe(probes, describe)
            if batch is None:
                return run()
            arguments = batch.arguments() if self._choices or self._ledger else []
            if self._trial is not None:
                self._trial.look(batch, arguments)
            asking = self._asking(probes, batch, arguments)
            probed = bool(probes) and self._before(probes, batch, asking)
            try:
                with self._choices.acting(batch, arguments) if self._choices else contextlib.nullcontext():
                    return run()
            finally:
                if probed:
                    self._after(probes, batch, asking)

    def _timed(self, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return run()
        finally:
            self._forward_seconds += time.perf_counter() - began

    def sample(self, logits: Any, run: Callable[[], Any]) -> Any:
        """Sample the tokens of the pass before; a guarded trial measures them."""
        return run() if self._trial is None else self._trial.sample(logits, run)

    def _asking(self, probes: list[Probe], batch: Batch, arguments: list[Mapping[str, Any]]) -> _Asking:
        """Return the requests of a pass that ask for their own statistics."""
        if self._ledger is None or not probes:
            return []
        try:
            return self._ledger.look(batch, arguments)
        except Exception:  # no room on the device, say
            for probe in probes:
                self._failed(probe)
            return []

    def _describe(self, probes: list[Probe], describe: Callable[[], Batch]) -> Batch | None:
        try:
            return describe()
        except Exception:
            if self._choices is not None:  # without the rows of each request the answers would be wrong
                raise
            for probe in probes:
                self._failed(probe)
            return None

    def _before(self, probes: list[Probe], batch: Batch, asking: _Asking) -> bool:
        try:
            if self._rows is not None:
                self._rows.mark(batch, [probe.kind for probe in probes])
        except Exception:
            for probe in probes:
                self._failed(probe)
            if self._rows is not None:
                self._rows.clear()
            return False
        rows = [own for _, own in asking]
        for probe in probes:
            self._guarded(probe, probe.before, batch)
            if rows:
                self._guarded(probe, probe.before_requests, batch, rows)
        return True

    def _after(self, probes: list[Probe], batch: Batch, asking: _Asking) -> None:
        if batch.positions.is_cuda:
            self._stream = torch.cuda.current_stream()
        if self._rows is not None:
            self._rows.clear()
        rows = [own for _, own in asking]
        for probe in probes:
            self._guarded(probe, probe.after, batch)
            records = [kept.records[probe.kind] for kept, _ in asking]
            if any(records):
                self._guarded(probe, probe.add_requests, batch, rows, records)
        for kept, own in asking:
            kept.tokens += own.stop - own.start
        self._passes_since_take += 1

    def _guarded(self, probe: Probe, step: Callable[..., None], *arguments: Any) -> None:
        began = time.perf_counter()
        try:
            step(*arguments)
        except Exception:
            self._failed(probe)
        self._seconds[probe.kind] += time.perf_counter() - began

    def _failed(self, probe: Probe) -> None:
        self._errors[probe.kind] += 1
        if self._errors[probe.kind] == 1:
            compat.logger.exception("sluice: error in the %s probe; the server goes on", probe.kind)
        if self._errors[probe.kind] >= _ERRORS_BEFORE_OFF:
            probe.enabled = False
            self._off_by_errors.add(probe.kind)
            compat.logger.error("sluice: the %s probe is off after %d errors", probe.kind, _ERRORS_BEFORE_OFF)

    # -------------------------------------------------------------------------------------------- the snapshot
    def publish(self) -> None:
        """Take the accumulators if there was a forward pass, slide the windows and write the snapshot."""
        with self._publishing:
            taken = self._take()
            now = time.monotonic()
            values = [self._own_values(), self._baseline.values()]
            for probe in self._probes:
                window = self._windows[probe.kind]
                if probe.kind in taken:
                    window.add(taken[probe.kind], now)
                current = window.current(now)
                values.append(probe.values(current, window.total))
                if probe.kind in taken and current is not None:
                    with self._lock:
                        probe.steer(current)
            self._writer.write(np.concatenate(values))

    def forget(self) -> None:
        """Drop what windows, totals and accumulators have seen, so that a recording begins with nothing."""
        with self._publishing:
            self._take()
            self._windows = self._new_windows()

    def _new_windows(self) -> dict[str, Window]:
        return {probe.kind: Window(type(probe), self._telemetry.window_seconds) for probe in self._probes}

    def _take(self) -> dict[str, dict[str, np.ndarray]]:
        with self._lock, torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            if self._passes_since_take == 0:
                return {}
            self._passes_since_take = 0
            tensors = {probe.kind: probe.take() for probe in self._probes}
            hosts = {
                kind: {name: tensor.to("cpu", non_blocking=True) for name, tensor in taken.items()}
                for kind, taken in tensors.items()
            }
            done = None
            if self._stream:
                done = torch.cuda.Event()
                done.record(self._stream)
        if done is not None:
            done.synchronize()
        return {kind: {name: t.numpy() for name, t in host.items()} for kind, host in hosts.items()}

    def _own_series(self) -> list[Series]:
        named = []
        for kind in self._kinds:
            for name in ("installed", "enabled", "last_change_timestamp_seconds"):
                named.append(Series(f"sluice_patch_{name}", (("patch", kind),)))
        for kind, patch in self._patches.items():
            for name in patch.parameters:
                named.append(Series("sluice_patch_parameter", (("patch", kind), ("parameter", name))))
        for kind in ("desired", "applied"):
            named.append(Series("sluice_generation", (("rank", self._info.rank), ("kind", kind))))
        for kind in PROBE_KINDS:
            for name in ("enabled", "failed", "errors_total", "seconds_total"):
                named.append(Series(f"sluice_probe_{name}", (("probe", kind),)))
        for name in ("start_timestamp_seconds", "forward_seconds_total", "serving_dtype_max",
                     "telemetry_interval_seconds", "telemetry_window_seconds"):  # fmt: skip
            named.append(Series(f"sluice_{name}"))
        return named

    def _own_values(self) -> np.ndarray:
        values: list[float] = []
        for kind in self._kinds:
            patch = self._patches.get(kind)
            values += [patch is not None, patch.enabled if patch else np.nan, self._changed.get(kind, np.nan)]
        for installed in self._patches.values():
            values += installed.parameters.values()
        values += [self._desired, self._applied]
        enabled = {probe.kind: float(probe.enabled) for probe in self._probes}
        for kind in PROBE_KINDS:
            failed = float(kind in self._off_by_errors) if kind in enabled else np.nan
            values += [enabled.get(kind, np.nan), failed, self._errors[kind], self._seconds[kind]]
        values += [self._started, self._forward_seconds, self._dtype_max]
        values += [self._telemetry.interval_seconds, self._telemetry.window_seconds]
        return np.array(values, dtype=np.float64)

    # -------------------------------------------------------------------------------------------- control
    def apply(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Apply run-time values as a whole or not at all; return `state()`.

        The caller pauses the engine and resets its prefix cache if a patch changes: cached keys and values hold for
        one state only.

        Parameters
        ----------
        state
            `{"generation": int, "patches": {kind: {key: value}}, "probes": {kind: {key: value}}}`. Probes that this
            rank lacks are passed over.

        Raises
        ------
        KeyError
            If a patch is not installed or has no such value; nothing is changed then.
        """
        wanted = state.get("patches", {})
        missing = [kind for kind in wanted if kind not in self._patches]
        if missing:
            raise KeyError(f"patch {missing[0]!r} is not installed; installed: {sorted(self._patches) or 'none'}")
        probes = {probe.kind: probe for probe in self._probes}
        changes: list[tuple[InstalledPatch | Probe, Mapping[str, Any]]] = [
            *((self._patches[kind], values) for kind, values in wanted.items()),
            *((probes[kind], values) for kind, values in state.get("probes", {}).items() if kind in probes),
        ]
        for part, values in changes:
            if unknown := sorted(values.keys() - part.runtime.keys()):
                raise KeyError(f"{unknown[0]!r} is no run-time value here; there are {sorted(part.runtime)}")
        self._desired = int(state.get("generation", self._applied + 1))
        before = [(part, dict(part.runtime)) for part, _ in changes]
        try:
            for part, values in changes:
                part.set(values)
        except Exception:
            for part, values in before:
                part.set(values)
            raise
        self._applied = self._desired
        for part, values in before:
            if isinstance(part, InstalledPatch) and part.runtime != values:
                self._changed[part.name] = time.time()
            elif not isinstance(part, InstalledPatch):
                self._off_by_errors.discard(part.kind)  # whoever sets a probe has decided anew
        self._compare()
        try:
            self.publish()
        except Exception:
            compat.logger.exception("sluice: the snapshot could not be written; it will be tried again")
        return self.state()

    def _compare(self) -> None:
        """Compare with what the baseline recorded for the patch state and the parameters now in force."""
        acts = {kind: kind in self._patches and self._patches[kind].enabled for kind in self._kinds}
        parameters = {
            f"{kind}.{name}": value
            for kind, patch in self._patches.items()
            for name, value in patch.parameters.items()
        }
        self._baseline.follow(acts, parameters)
        for probe in self._probes:
            probe.calibrate(self._baseline.section)

    def trial(self) -> dict[str, Any]:
        """Return what the guard's trial measured on this rank; see `TrialMeter.measured`."""
        measured = {} if self._trial is None else self._trial.measured()
        return {"rank": self._info.rank, "engine": self._info.engine, **measured}

    def request(self, ticket: str) -> dict[str, Any]:
        """Return what this rank saw of a request that asked (`RequestLedger.close`), and forget it; `{}` if nothing."""
        with self._lock, torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            return self._ledger.close(ticket) if self._ledger else {}

    def state(self) -> dict[str, Any]:
        """Return rank, generation and the state of patches and probes as plain data."""
        return {
            "rank": self._info.rank,
            "engine": self._info.engine,
            "generation": self._applied,
            "patches": {
                kind: {
                    "values": dict(patch.runtime),
                    "layers": list(patch.report.layers),
                    "detail": patch.report.detail,
                }
                for kind, patch in self._patches.items()
            },
            "probes": {probe.kind: {"values": probe.runtime | {"enabled": probe.enabled}} for probe in self._probes},
            "unavailable": dict(self._unavailable),
        }


def worker_method(worker: Any, operation: str, detail: Any = None) -> dict[str, Any]:
    """Answer `collective_rpc("sluice_rpc", args=(operation, detail))` on one worker.

    Operations: `state`, `publish` (write a snapshot now), `forget` (what was measured so far), `apply` (`detail`: the
    state), `guard` (what a trial measured), `request` (`detail`: the ticket). Never raises: an exception here would
    leave the other ranks' replies queued and corrupt vLLM's message queue.
    """
    try:
        rank: Rank = getattr(compat.worker_model(worker), compat.RUNTIME_ATTRIBUTE)
        if operation == "apply":
            return rank.apply(detail or {})
        if operation == "request":
            return rank.request(str(detail))
        if operation == "guard":
            return rank.trial()
        if operation == "publish":
            rank.publish()
        elif operation == "forget":
            rank.forget()
        elif operation != "state":
            return {"error": f"unknown operation {operation!r}; known: apply, forget, guard, publish, request, state"}
        return rank.state()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def rank_info(load: Load, version: str, fingerprint: str) -> RankInfo:
    """Describe this worker."""
    return RankInfo(
        pid=os.getpid(),
        start_ticks=rundir.start_ticks(os.getpid()),
        rank=load.rank(),
        engine=load.engine,
        model_name=load.served_name,
        version=version,
        vllm_version=compat.vllm_version(),
        fingerprint=fingerprint,
    )


def _publish_forever(reference: weakref.ref[Rank], interval: float) -> None:
    while True:
        time.sleep(interval)
        rank = reference()
        if rank is None:
            return
        try:
            rank.publish()
        except Exception:
            compat.logger.exception("sluice: the snapshot could not be written; it will be tried again")
        del rank


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
