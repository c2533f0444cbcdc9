"""What the person at the console does and sees: a request to stop, and one line of status."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PLAIN_PERIOD = 10.0


class Stopped(Exception):
    """Someone asked for the end."""


class Stop:
    """Remembers SIGINT, SIGTERM and SIGHUP until it is asked.

    An exception out of the signal handler could come between the start of a child and the note to end it.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Stop:
        self._previous = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Wait; raise `Stopped` if a signal came."""
        time.sleep(seconds)
        if self._asked:
            raise Stopped

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True


class StatusLine:
    """One line that is written over on a terminal, and repeated now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._last = -_PLAIN_PERIOD
        self._shown = False

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Show a text in place of the last one."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\x1b[K{text[:width]}")
            sys.stdout.flush()
            self._shown = True
        elif time.monotonic() - self._last >= _PLAIN_PERIOD:
            self._last = time.monotonic()
            print(text, flush=True)

    def clear(self) -> None:
        """Leave an empty line, so that other output starts at its beginning."""
        if self._shown:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
            self._shown = False
