"""A program beside the server that answers on a port of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_sluice.commands.problem import Problem
from vllm_sluice.stack.child import Child
from vllm_sluice.stack.console import StatusLine, Stop
from vllm_sluice.stack.loopback import get

_PERIOD = 0.25
_PATIENCE = 240


@dataclass(frozen=True)
class Service:
    """A started program.

    Attributes
    ----------
    child
        Its process.
    url
        Where it answers, without a slash at the end.
    ready
        Path that answers once it can be used.
    """

    child: Child
    url: str
    ready: str

    def wait(self, line: StatusLine, stop: Stop) -> None:
        """Wait until it can be used.

        Raises
        ------
        Problem
            If it ends, or does not answer within a minute.
        """
        for _ in range(_PATIENCE):
            check_alive(self.child)
            if get(self.url + self.ready) is not None:
                return
            line.show(f"starting {self.child.name}")
            stop.sleep(_PERIOD)
        raise Problem(f"{self.child.name} does not answer at {self.url}{self.ready}\n(log: {self.child.log})")


def program(*names: str) -> str | None:
    """Return the path of the first of these programs that is installed."""
    return next((path for path in map(shutil.which, names) if path), None)


def check_alive(child: Child) -> None:
    """Raise `Problem` with the reason if a process has ended."""
    status = child.exit_status
    if status is None:
        return
    ended = f"by signal {-status}" if status < 0 else f"with status {status}"
    raise Problem(f"the {child.name} ended {ended}: {child.why()}\n(log: {child.log})")


def check_all_alive(children: Iterable[Child]) -> None:
    """Raise `Problem` with the reason if one of the processes has ended."""
    for child in children:
        check_alive(child)


def stop_child(child: Child, line: StatusLine) -> None:
    """End a process and say so while it takes time."""
    if child.exit_status is None:
        line.show(f"stopping the {child.name}")
    child.stop()
