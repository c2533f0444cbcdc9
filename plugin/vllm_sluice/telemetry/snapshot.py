"""One memory-mapped file per rank, through which a worker's numbers reach the API processes.

Layout (little endian): 8 bytes magic, u64 sequence number (odd while a write is under way), f64 time of the last
write (seconds since the epoch), u32 length of the JSON header, the JSON header, and from byte `_BODY` on one f64
per series. The header names the series once; a write only replaces the numbers, so it costs microseconds and never
blocks on a reader. NaN means that there is nothing to report.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = ".snapshot"
_MAGIC = b"SLUICE01"
_FIXED = struct.Struct("<8sQdI")
_QUICK_ATTEMPTS = 10
_TIME_SLICE = 0.001
"""Seconds that a reader waits for a writer that lost its processor."""


@dataclass(frozen=True)
class Series:
    """One series of a rank: a metric of the catalogue and the labels besides the common ones."""

    metric: str
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RankInfo:
    """Who writes a snapshot.

    Attributes
    ----------
    rank
        Place in the engine, such as `pp0-tp1`.
    engine
        Data-parallel index as text.
    start_ticks
        When the process started, in clock ticks since boot: a later process may get its number. Empty if unknown.
    """

    pid: int
    rank: str
    engine: str
    model_name: str
    version: str
    vllm_version: str
    fingerprint: str
    start_ticks: str = ""


class SnapshotWriter:
    """Writes the snapshot of one rank."""

    def __init__(self, path: Path, info: RankInfo, series: Sequence[Series]) -> None:
        header = json.dumps(
            {"info": info.__dict__, "series": [[s.metric, list(s.labels)] for s in series]}
        ).encode()
        self._body = _align(_FIXED.size + len(header))
        size = self._body + 8 * max(len(series), 1)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.truncate(size)
        with partial.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._map[_FIXED.size : _FIXED.size + len(header)] = header
        self._map[: _FIXED.size] = _FIXED.pack(_MAGIC, 0, 0.0, len(header))
        self._sequence = np.frombuffer(self._map, np.uint64, 1, 8)
        self._time = np.frombuffer(self._map, np.float64, 1, 16)
        self._values = np.frombuffer(self._map, np.float64, len(series), self._body)
        self._values[:] = np.nan
        partial.replace(path)

    def write(self, values: np.ndarray) -> None:
        """Replace all numbers; `values` is f64 of shape [series]."""
        self._sequence[0] += np.uint64(1)
        self._values[:] = values
        self._time[0] = time.time()
        self._sequence[0] += np.uint64(1)


@dataclass(frozen=True)
class Snapshot:
    """A consistent reading of one rank: `values` is f64 of shape [series]; `time` 0 means never written."""

    info: RankInfo
    series: tuple[Series, ...]
    values: np.ndarray
    time: float


class SnapshotReader:
    """Reads the snapshot of one rank, which may be of another version of Sluice.

    Parameters
    ----------
    path
        The file.
    is_known
        Tells which series to read; default: all.

    Attributes
    ----------
    unknown
        What the file has besides: fields that this version does not know, and the metrics of series left out.

    Raises
    ------
    ValueError
        If the file is not a snapshot of this layout, or does not say all that this version needs.
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: Path, is_known: Callable[[Series], bool] = lambda series: True) -> None:
        with path.open("rb") as file:
            self.inode = os.fstat(file.fileno()).st_ino
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        if len(self._map) < _FIXED.size or self._map[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{path} is not a Sluice snapshot")
        _, _, _, length = _FIXED.unpack(self._map[: _FIXED.size])
        header = json.loads(self._map[_FIXED.size : _FIXED.size + length])
        try:
            self.info = _rank_info(header["info"], path)
            written = [Series(m, tuple((k, v) for k, v in labels)) for m, labels in header["series"]]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has a header of another form: {type(error).__name__}: {error}") from None
        known = [is_known(series) for series in written]
        self.series = tuple(series for series, kept in zip(written, known, strict=True) if kept)
        more = header["info"].keys() - {field.name for field in fields(RankInfo)}
        self.unknown = sorted(more) + sorted({s.metric for s, kept in zip(written, known, strict=True) if not kept})
        self._places = np.flatnonzero(known)
        self._size = 8 * len(written)
        self._body = _align(_FIXED.size + length)

    def read(self, attempts: int = 50) -> Snapshot | None:
        """Return a consistent snapshot, or None if a writer was in the way `attempts` times.

        A writer is done in microseconds, unless it loses its processor in the middle: the later attempts wait for that.
        """
        for attempt in range(attempts):
            _, before, written, _ = _FIXED.unpack(self._map[: _FIXED.size])
            body = self._map[self._body : self._body + self._size]
            _, after, _, _ = _FIXED.unpack(self._map[: _FIXED.size])
            if before == after and before % 2 == 0:
                values = np.frombuffer(body, np.float64)[self._places]
                return Snapshot(self.info, self.series, values, written)
            time.sleep(0 if attempt < _QUICK_ATTEMPTS else _TIME_SLICE)
        return None


def _rank_info(said: Mapping[str, Any], path: Path) -> RankInfo:
    """Return what a snapshot says of its rank, as far as this version knows it."""
    missing = [field.name for field in fields(RankInfo) if field.default is MISSING and field.name not in said]
    if missing:
        raise ValueError(
            f"{path}, written by Sluice {said.get('version', 'of an unknown version')}, lacks {', '.join(missing)}"
        )
    known = {field.name: said[field.name] for field in fields(RankInfo) if field.name in said}
    if not all(isinstance(value, int if name == "pid" else str) for name, value in known.items()):
        raise ValueError(f"{path} says of its rank {known}, where pid is a number and the rest is text")
    return RankInfo(**known)


def _align(offset: int) -> int:
    return -(-offset // 8) * 8
