"""A child process of the stack or the demo: its log, its last useful line, and an end without leftovers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL)\s[\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception|Refused)\b|^sluice: |error: |level=error")
_CONSEQUENCE = (
    "See root cause above", "Engine core initialization failed", "EngineDeadError", "WorkerProc init",
    "previous rule set restored", "errors occurred while applying the new configuration",
)  # fmt: skip
_POLITE_SECONDS = 20.0
_FIRM_SECONDS = 5.0


class Child:
    """A command in a process group of its own, so that Ctrl-C reaches it only through `stop`."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(environ),
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def why(self) -> str:
        """Return what the log says about the end: its last error with what belongs to it, else its last line."""
        return last_useful_line(self.log.read_text(encoding="utf-8", errors="replace"))

    def stop(self) -> None:
        """End the process and everything that it started: first politely, then firmly."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_POLITE_SECONDS)
        for how in (signal.SIGTERM, signal.SIGKILL):
            if not self._signal_group(how):
                return
            self._wait_for_group()

    def kill(self) -> None:
        """End the process and everything that it started at once."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def _signal_group(self, how: signal.Signals) -> bool:
        """Signal what is left of the group; tell whether there was anything."""
        try:
            os.killpg(self.pid, how)
        except ProcessLookupError:
            return False
        return True

    def _wait_for_group(self) -> None:
        end = time.monotonic() + _FIRM_SECONDS
        while time.monotonic() < end and (self.exit_status is None or _anything_runs(self.pid)):
            time.sleep(0.05)


def _anything_runs(group: int) -> bool:
    """Tell whether a process group has members that are no zombies; those stay where nobody collects orphans."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member_of = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(member_of) == group and state != "Z":
            return True
    return False


def last_useful_line(log: str) -> str:
    """Return the line of a server's log that says why it ended.

    That is the last error that is no mere consequence of one in another process, with the list items below it, if it
    has any; without an error the last line.
    """
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    errors = [i for i, line in enumerate(lines) if _ERROR.search(line) and not any(c in line for c in _CONSEQUENCE)]
    if not errors:
        return next((line for line in reversed(lines) if line.strip()), "its log is empty")
    found = [lines[errors[-1]]]
    for line in lines[errors[-1] + 1 :]:
        if not line.startswith("  - "):
            break
        found.append(line)
    return "\n".join(found)
