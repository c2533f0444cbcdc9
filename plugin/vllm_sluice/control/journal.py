"""What all API servers of one server share about the run-time state: one JSON file, one lock, an audit of changes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vllm_sluice.telemetry import rundir

Result = Literal["applied", "rolled back", "failed", "tried"]
KEPT_CHANGES = 500


class Busy(RuntimeError):
    """Another change is under way and did not end in time."""


@dataclass(frozen=True)
class Change:
    """One entry of the audit.

    Attributes
    ----------
    generation
        Generation that the change made, or would have made.
    time
        When it began, seconds since the epoch.
    who
        Name of the token, the file, or `start`.
    source
        `admin`, `file`, `guard`, or `start` for what a restart brings back.
    changed
        `{key: {"from": value, "to": value}}`.
    result, error
        How it ended, and why not well. `tried`: the guard has begun a trial, whose end is an entry of its own.
    seconds
        How long it took.
    """

    generation: int
    time: float
    who: str
    source: str
    changed: dict[str, dict[str, Any]]
    result: Result
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Record:
    """The shared state.

    Attributes
    ----------
    generation
        Number of the state that all ranks have applied.
    values
        That state, by dotted key; None before the ranks were asked.
    admin
        What was set over HTTP, by dotted key.
    switching
        `{"pid", "start_ticks", "since", "paused"}` of a change under way; `"abandoned": true` if its process lives but
        gave up.
    paused_since
        Since when somebody else keeps the engine paused, seconds since the epoch.
    file
        `{"path", "good", "error", "restart_needed"}` of the configuration file, if there is one.
    layers
        `{"config", "origins"}` that file, environment and defaults gave when the file was last good.
    results
        Changes so far by result, and `seconds` that they took in all.
    guard
        A trial under way: `{"number", "patch", "enabled", "edits", "share", "since", "who", "measured", "reason"}`.
    """

    generation: int = 0
    values: dict[str, Any] | None = None
    admin: dict[str, Any] = field(default_factory=dict)
    switching: dict[str, Any] | None = None
    paused_since: float | None = None
    file: dict[str, Any] | None = None
    layers: dict[str, Any] | None = None
    results: dict[str, float] = field(default_factory=dict)
    guard: dict[str, Any] | None = None


class Journal:
    """Reads and writes the shared state in a server's run folder.

    Parameters
    ----------
    folder
        The run folder. It may outlive a server: then the shared state begins afresh, and the audit goes on.
    server
        Identity of the server (`rundir.server`).
    """

    def __init__(self, folder: Path, server: str) -> None:
        self._folder = folder
        self._server = server
        self._state = folder / "control.json"
        self._changes = folder / "changes.jsonl"
        self._lock = folder / "control.lock"
        self._inside = asyncio.Lock()
        self._trial: tuple[tuple[int, ...], dict[str, Any] | None] = ((), None)

    def read(self) -> Record:
        """Return the shared state; that of a fresh server if there is none yet, or only a former server's."""
        try:
            found = json.loads(self._state.read_text())
        except FileNotFoundError:
            return Record()
        # The ranks of a new server run what the settings say, whatever those of the former one had last.
        return Record(**found) if found.pop("server", None) == self._server else Record()

    def trial(self) -> dict[str, Any] | None:
        """Return the guard's trial under way; reads the file only when it has changed."""
        seen = stamp(self._state)
        if seen != self._trial[0]:
            self._trial = (seen, self.read().guard)
        return self._trial[1]

    def write(self, record: Record) -> None:
        """Replace the shared state; for the holder of the lock."""
        rundir.create(self._folder)
        write_whole(self._state, json.dumps({"server": self._server, **asdict(record)}))

    def update(self, **values: Any) -> Record:
        """Replace some fields of the shared state; for the holder of the lock."""
        record = replace(self.read(), **values)
        self.write(record)
        return record

    def add(self, change: Change) -> None:
        """Append to the audit, and count; for the holder of the lock."""
        record = self.read()
        results = dict(record.results)
        results[change.result] = results.get(change.result, 0) + 1
        results["seconds"] = results.get("seconds", 0.0) + change.seconds
        self.write(replace(record, results=results))
        kept = [*self._lines()[-KEPT_CHANGES + 1 :], json.dumps(asdict(change))]
        write_whole(self._changes, "\n".join(kept) + "\n")

    def changes(self, limit: int) -> list[dict[str, Any]]:
        """Return the latest changes, oldest first."""
        return [json.loads(line) for line in self._lines()[-limit:]]

    def _lines(self) -> list[str]:
        try:
            return self._changes.read_text().splitlines()
        except FileNotFoundError:
            return []

    @contextlib.asynccontextmanager
    async def locked(self, seconds: float) -> AsyncIterator[None]:
        """Keep all other changes, those of other API servers too, out.

        Raises
        ------
        Busy
            If another change does not end within `seconds`.
        """
        until = time.monotonic() + seconds
        try:
            await asyncio.wait_for(self._inside.acquire(), seconds)
        except TimeoutError:
            raise Busy(f"another change has been under way for more than {seconds:g} s; try again") from None
        try:
            rundir.create(self._folder)
            with self._lock.open("a") as file:  # the kernel drops the lock with the process that holds it
                while not _try_lock(file.fileno()):
                    if time.monotonic() > until:
                        raise Busy(f"another API server has been changing the state for more than {seconds:g} s")
                    await asyncio.sleep(0.01)
                yield
        finally:
            self._inside.release()


def stamp(path: Path) -> tuple[int, ...]:
    """Return what differs whenever a file is replaced or written; empty if there is none.

    Of the file behind a link: Kubernetes mounts a ConfigMap as links, and swaps a link to their folder.
    """
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new text."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.chmod(0o600)
    partial.replace(path)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
