"""The folder of one server, found by all its processes through `SLUICE_RUN_DIR`, and the server's identity."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from vllm_sluice.config import RUN_DIR_VARIABLE, SERVER_VARIABLE, Telemetry

_NAME = "sluice-"


def announce(telemetry: Telemetry) -> Path:
    """Choose folder and identity in the server's first process; its children inherit the choice. Creates nothing.

    The folder is removed when the first process ends, or by the next server's `create`; one that the user named stays.
    """
    _choose_identity()
    chosen = os.environ.get(RUN_DIR_VARIABLE)
    if not chosen:
        base = Path(telemetry.run_dir) if telemetry.run_dir else _base()
        chosen = str(base / f"{_NAME}{os.getuid()}-{os.getpid()}-{start_ticks(os.getpid())}")
        atexit.register(_remove_at_exit, Path(chosen), os.getpid())
        os.environ[RUN_DIR_VARIABLE] = chosen
    return Path(chosen)


def _choose_identity() -> None:
    """Draw the identity, unless this process or the one that made it with `multiprocessing` has done so.

    A process that was started otherwise begins a server, even where a notebook or launcher, which was one itself, left
    its own identity in the environment.
    """
    own = f"-{os.getpid()}-{start_ticks(os.getpid())}"
    inherited = os.environ.get(SERVER_VARIABLE, "")
    begins = multiprocessing.parent_process() is None
    if not inherited or (begins and not inherited.endswith(own)):
        os.environ[SERVER_VARIABLE] = uuid.uuid4().hex + own


def server() -> str:
    """Return the identity of the server that this process belongs to, as `announce` chose it.

    A folder that the user named outlives a server, and in a container the next one has the same process numbers, so
    the identity is a random one.
    """
    return os.environ[SERVER_VARIABLE]


def create(folder: Path) -> None:
    """Create the folder, for the user only, and sweep the folders of servers that are gone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for other in folder.parent.glob(f"{_NAME}{os.getuid()}-*"):
        pid, _, ticks = other.name.removeprefix(f"{_NAME}{os.getuid()}-").partition("-")
        if other != folder and pid.isdigit() and start_ticks(int(pid)) != ticks:
            shutil.rmtree(other, ignore_errors=True)


def of_running_servers() -> list[Path]:
    """Return this user's run folders in the default place whose first process is running."""
    return [folder for folder in sorted(_base().glob(f"{_NAME}{os.getuid()}-*")) if _is_served(folder)]


def _is_served(folder: Path) -> bool:
    pid, _, ticks = folder.name.removeprefix(f"{_NAME}{os.getuid()}-").partition("-")
    return pid.isdigit() and ticks != "" and start_ticks(int(pid)) == ticks


def _remove_at_exit(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits the registration, not the folder
        shutil.rmtree(folder, ignore_errors=True)


def alive(pid: int, ticks: str) -> bool:
    """Tell whether the process with this number that started at `ticks` exists; without ticks, any with the number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = start_ticks(pid)
    return now == ticks or not (now and ticks)


def _base() -> Path:
    shared_memory = Path("/dev/shm")
    return shared_memory if os.access(shared_memory, os.W_OK) else Path(tempfile.gettempdir())


def start_ticks(pid: int) -> str:
    """Return when a process started, in clock ticks since boot (field 22 of /proc/PID/stat), or '' if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
