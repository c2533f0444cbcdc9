"""What is installed, what acts and how far every rank is: the numbers behind `/plugins/sluice/state`."""

from __future__ import annotations

import math
import time
from typing import Any

from vllm_sluice.telemetry.collector import Sample, SnapshotCollector
from vllm_sluice.telemetry.snapshot import Snapshot

_PATCH_METRICS = {
    "sluice_patch_installed": "installed",
    "sluice_patch_enabled": "enabled",
    "sluice_patch_last_change_timestamp_seconds": "last_change",
}


def describe(collector: SnapshotCollector) -> dict[str, Any]:
    """Return the state of every engine and rank as plain JSON data.

    Times are seconds since the epoch. What no rank has reported is None: `last_change` before the first switch,
    `snapshot_age_seconds` before a rank's first snapshot.
    """
    engines: dict[str, dict[str, Any]] = {}
    for snapshot in collector.snapshots():
        info = snapshot.info
        engine = engines.setdefault(info.engine, _engine(info.engine, info.model_name))
        engine["ranks"].append(_rank(snapshot))
    for sample in collector.samples():
        labels = dict(sample.labels)
        if labels["engine"] in engines and sample.metric in _PATCH_METRICS:
            _note_patch(engines[labels["engine"]]["patches"], labels["patch"], sample)
    return {
        "time": round(time.time(), 3),
        "engines": [engines[name] for name in sorted(engines, key=lambda n: (len(n), n))],
    }


def _engine(name: str, model_name: str) -> dict[str, Any]:
    return {"engine": name, "model_name": model_name, "patches": {}, "ranks": []}


def _rank(snapshot: Snapshot) -> dict[str, Any]:
    generation: dict[str, int | None] = {"desired": None, "applied": None}
    for series, value in zip(snapshot.series, snapshot.values.tolist(), strict=True):
        if series.metric == "sluice_generation" and not math.isnan(value):
            generation[dict(series.labels)["kind"]] = int(value)
    info = snapshot.info
    return {
        "rank": info.rank,
        "version": info.version,
        "vllm_version": info.vllm_version,
        "fingerprint": info.fingerprint,
        "generation": generation,
        "snapshot_age_seconds": round(max(0.0, time.time() - snapshot.time), 3) if snapshot.time > 0 else None,
    }


def _note_patch(patches: dict[str, dict[str, Any]], patch: str, sample: Sample) -> None:
    noted = patches.setdefault(patch, {"installed": None, "enabled": None, "last_change": None})
    key = _PATCH_METRICS[sample.metric]
    noted[key] = round(sample.value, 3) if key == "last_change" else bool(sample.value)
