"""Reads every rank's snapshot and turns it into samples, for `/metrics` and for the live page."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from vllm_sluice import __version__
from vllm_sluice.telemetry import rundir
from vllm_sluice.telemetry.catalogue import BY_NAME, CATALOGUE, COMMON_LABELS, Detail, is_exported
from vllm_sluice.telemetry.snapshot import SUFFIX, Series, Snapshot, SnapshotReader


@dataclass(frozen=True)
class Sample:
    """One exported value; `labels` includes the common labels."""

    metric: str
    labels: tuple[tuple[str, str], ...]
    value: float


ServerValues = Callable[[], Iterable[tuple[str, tuple[tuple[str, str], ...], float]]]
"""Returns metric, labels besides the common ones, and value of what holds for the server as a whole."""

Presence = Callable[[Snapshot], bool]
"""Tells whether the rank behind a snapshot is still there."""

logger = logging.getLogger("vllm.sluice")


def process_lives(snapshot: Snapshot) -> bool:
    """Tell whether the process that wrote a snapshot exists; another one may have got its number since."""
    return rundir.alive(snapshot.info.pid, snapshot.info.start_ticks)


class SnapshotCollector(Collector):
    """Collects the snapshots in one folder.

    Snapshots of ranks that are gone are left out, so their series end at the next scrape. Of ranks that run another
    version of Sluice, what this version does not know is left out, and the log says so once.

    Parameters
    ----------
    folder
        Where the ranks write.
    detail
        What `collect` yields.
    server
        Values of the server as a whole; every engine reports them.
    present
        Which ranks are still there; default: those whose process exists.
    """

    def __init__(
        self,
        folder: Path,
        detail: Detail = "standard",
        server: ServerValues = lambda: (),
        present: Presence = process_lives,
    ) -> None:
        self._folder = folder
        self._server = server
        self._present = present
        self._detail: Detail = detail
        self._readers: dict[Path, SnapshotReader] = {}
        self._told: set[str] = set()

    def snapshots(self) -> list[Snapshot]:
        """Read all ranks that are alive, in the order of their file names."""
        found = []
        paths = sorted(self._folder.glob(f"*{SUFFIX}"))
        for gone in set(self._readers) - set(paths):
            self._readers.pop(gone, None)  # several threads collect
        for path in paths:
            try:
                reader = self._readers.get(path)
                if reader is None or reader.inode != path.stat().st_ino:
                    reader = self._readers[path] = SnapshotReader(path, _is_known)
                    self._tell_unknown(reader)
            except OSError:
                continue
            except ValueError as error:
                self._tell(f"a rank is left out: {error}")
                continue
            snapshot = reader.read()
            if snapshot is not None and self._present(snapshot):
                found.append(snapshot)
        return found

    def _tell_unknown(self, reader: SnapshotReader) -> None:
        if reader.unknown:
            self._tell(
                f"ranks run Sluice {reader.info.version} and this is {__version__}, so what it does not know is left "
                f"out: {', '.join(reader.unknown)}"
            )

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("sluice: %s", text)

    def samples(self) -> list[Sample]:
        """Return all samples at full detail, the ranks of one engine combined as the catalogue says."""
        grouped: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
        server = list(self._server())
        for snapshot in self.snapshots():
            common = (("model_name", snapshot.info.model_name), ("engine", snapshot.info.engine))
            for metric, labels, value in server:
                grouped.setdefault((metric, common + labels), []).append(value)
            for series, value in zip(snapshot.series, snapshot.values.tolist(), strict=True):
                if not math.isnan(value):
                    grouped.setdefault((series.metric, common + series.labels), []).append(value)
            for metric, labels, value in _about(snapshot):
                grouped.setdefault((metric, common + labels), []).append(value)
        return [Sample(metric, labels, _combine(metric, values)) for (metric, labels), values in grouped.items()]

    def collect(self) -> Iterator[Family]:
        """Yield Prometheus metric families in the order of the catalogue, at the configured level of detail."""
        exported = [s for s in self.samples() if is_exported(BY_NAME[s.metric], dict(s.labels), self._detail)]
        by_metric: dict[str, list[Sample]] = {}
        for sample in exported + _series_counts(exported):
            by_metric.setdefault(sample.metric, []).append(sample)
        for metric in CATALOGUE:
            labels = [*COMMON_LABELS, *metric.labels]
            family: Family
            if metric.kind == "counter":
                family = CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=labels)
            else:
                family = GaugeMetricFamily(metric.name, metric.help, labels=labels)
            for sample in by_metric.get(metric.name, ()):
                values = dict(sample.labels)
                family.add_metric([values[label] for label in labels], sample.value)
            if family.samples:
                yield family

    def describe(self) -> Iterable[Family]:
        """Return nothing: the registry must not collect at registration."""
        return ()


def _is_known(series: Series) -> bool:
    metric = BY_NAME.get(series.metric)
    # Without a label that tells them apart, several series would be exported as one, and Prometheus refuses that.
    return metric is not None and {name for name, _ in series.labels} == set(metric.labels)


def _about(snapshot: Snapshot) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
    info = snapshot.info
    labels = (("version", info.version), ("vllm_version", info.vllm_version), ("fingerprint", info.fingerprint))
    yield "sluice_info", labels, 1.0
    if snapshot.time > 0:
        yield "sluice_snapshot_age_seconds", (("rank", info.rank),), max(0.0, time.time() - snapshot.time)


def _combine(metric: str, values: list[float]) -> float:
    how = BY_NAME[metric].combine
    if how in ("max", "min"):
        return max(values) if how == "max" else min(values)
    return sum(values) if how == "sum" else sum(values) / len(values)


def _series_counts(samples: list[Sample]) -> list[Sample]:
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for sample in samples:
        common = tuple(pair for pair in sample.labels if pair[0] in COMMON_LABELS)
        counts[common] = counts.get(common, 0) + 1
    return [Sample("sluice_exported_series", common, float(count + 1)) for common, count in counts.items()]
