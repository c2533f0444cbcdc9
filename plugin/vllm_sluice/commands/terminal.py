"""What is printed on a terminal: lines of coloured pieces, tables, and the full screen; plain text everywhere else."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from types import FrameType

Style = Literal["", "bold", "dim", "red", "green", "yellow", "cyan"]
_CODES: Mapping[Style, str] = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = "█"


@dataclass(frozen=True)
class Piece:
    """Text in one colour."""

    text: str
    style: Style = ""


Line = Sequence[Piece]


def colours(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether to colour: on a terminal that can, unless NO_COLOR (no-color.org) is set."""
    environ = os.environ if environ is None else environ
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def say(lines: Sequence[Line], stream: TextIO | None = None) -> None:
    """Print lines at once, in colours where those are wanted."""
    stream = sys.stdout if stream is None else stream
    coloured = colours(stream)
    print(encodable("\n".join(paint(line, coloured) for line in lines), stream), file=stream, flush=True)


def encodable(text: str, stream: TextIO) -> str:
    """Replace the characters that the stream's encoding lacks."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def line(text: str, style: Style = "") -> Line:
    """Return a line in one colour."""
    return (Piece(text, style),)


def paint(pieces: Line, coloured: bool, width: int | None = None) -> str:
    """Return a line as text, cut off at `width` columns, without blanks at its end."""
    left = sys.maxsize if width is None else width
    painted = []
    for piece in _without_trailing_blanks(pieces):
        text = piece.text[:left]
        left -= len(text)
        code = _CODES.get(piece.style) if coloured else None
        painted.append(f"\x1b[{code}m{text}\x1b[0m" if code and text.strip() else text)
    return "".join(painted)


def table(rows: Sequence[Sequence[Piece]], right: Collection[int] = ()) -> list[Line]:
    """Align the cells of rows of equal length in columns two blanks apart; `right` names columns to align right."""
    widths = [max(len(cell.text) for cell in column) for column in zip(*rows, strict=True)]
    lines: list[Line] = []
    for row in rows:
        pieces: list[Piece] = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text = cell.text.rjust(width) if column in right else cell.text.ljust(width)
            pieces += [Piece("  "), Piece(text, cell.style)] if pieces else [Piece(text, cell.style)]
        lines.append(pieces)
    return lines


def bar(share: float, width: int, encoding: str | None) -> str:
    """Draw a share of 0 to 1 as a bar of `width` columns; in number signs where the encoding lacks blocks."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    try:
        _FULL.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ("#" * round(eighths / 8)).ljust(width)
    full, rest = divmod(eighths, 8)
    return (_FULL * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def duration(seconds: float) -> str:
    """Return a time span in the unit that suits it."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def moment(seconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Return seconds since the epoch as local time; as they are where that is no date."""
    try:
        return time.strftime(form, time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def plural(count: int, what: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


class Screen:
    """The whole terminal for as long as the context lasts, and then as it was before.

    Keys are not echoed meanwhile. SIGTERM ends the program through the context's end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._undo = ExitStack()

    def __enter__(self) -> Screen:
        previous = signal.signal(signal.SIGTERM, _terminate)
        self._undo.callback(signal.signal, signal.SIGTERM, previous)
        self._undo.callback(self._write, "\x1b[?25h\x1b[?1049l")
        self._write("\x1b[?1049h\x1b[?25l")
        if sys.stdin.isatty():
            import termios
            import tty

            keys = sys.stdin.fileno()
            before = termios.tcgetattr(keys)
            self._undo.callback(termios.tcsetattr, keys, termios.TCSADRAIN, before)
            tty.setcbreak(keys)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def show(self, lines: Sequence[str]) -> None:
        """Replace what is on the screen, without a flicker."""
        self._write("\x1b[H" + "\n".join(f"{text}\x1b[K" for text in lines) + "\x1b[J")

    def wait(self, seconds: float) -> bool:
        """Wait; return False as soon as somebody presses q."""
        until = time.monotonic() + seconds
        listening = sys.stdin.isatty()
        while (left := until - time.monotonic()) > 0:
            if not listening:
                time.sleep(left)
            elif select.select([sys.stdin], [], [], left)[0]:
                key = os.read(sys.stdin.fileno(), 64)
                if b"q" in key or b"Q" in key:
                    return False
                listening = bool(key)  # the end of the input is readable for ever
        return True

    def _write(self, text: str) -> None:
        self._stream.write(encodable(text, self._stream))
        self._stream.flush()


def _terminate(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _without_trailing_blanks(pieces: Line) -> list[Piece]:
    kept = list(pieces)
    while kept and not kept[-1].text.strip():
        kept.pop()
    return [*kept[:-1], Piece(kept[-1].text.rstrip(), kept[-1].style)] if kept else []
