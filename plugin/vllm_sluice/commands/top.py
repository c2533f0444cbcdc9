"""`sluice top`: what the live page shows, in the terminal: a line for each layer, refreshed in place."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_sluice.commands.answers import Engine, Live, LiveEngine, State
from vllm_sluice.commands.client import Client
from vllm_sluice.commands.problem import Problem
from vllm_sluice.commands.terminal import (
    Line,
    Piece,
    Screen,
    Style,
    bar,
    colours,
    duration,
    encodable,
    line,
    moment,
    paint,
    plural,
    table,
)

_PLAIN_SIZE = (120, 24)
_RATE_SECONDS = 30
_BAR_WIDTHS = range(5, 25)
_RATIO_DECADES = 5.0
_MASSIVE_RATIO = 1000.0
_SINK_HEAD_MASS = 0.3


@dataclass(frozen=True)
class View:
    """What one frame shows: an engine's numbers, and its state where the server gives that."""

    live: Live
    engine: LiveEngine | None
    generation: int | None
    state: Engine | None


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes
    ----------
    title
        Head of the column.
    text, style
        What stands in it for a layer's index.
    share
        Length of a bar behind it, 0 to 1, or None without a bar.
    weight
        The lightest columns give way where the terminal is narrow.
    """

    title: str
    text: Callable[[int], str]
    style: Callable[[int], Style]
    share: Callable[[int], float] | None
    weight: int


def once(client: Client, engine: str | None) -> None:
    """Print one frame with all layers, as wide as the terminal; a pipe or a file gets plain text.

    Raises
    ------
    Problem
        If the server does not answer, has no live page, or lacks the engine.
    """
    width = shutil.get_terminal_size(_PLAIN_SIZE).columns
    coloured = colours(sys.stdout)
    lines = frame(look(client, engine), width, None, sys.stdout.encoding)
    print(encodable("\n".join(paint(pieces, coloured, width) for pieces in lines), sys.stdout))


def run(client: Client, engine: str | None, interval: float) -> None:
    """Fill the terminal with frames until somebody presses q; a server that stops answering leaves its last one.

    Raises
    ------
    Problem
        If there is no terminal, or as for `once` in the beginning.
    """
    if not sys.stdout.isatty():
        raise Problem("the live view needs a terminal, and the output is none; use --once for a pipe or a file")
    view = look(client, engine)
    lost = ""
    coloured = colours(sys.stdout)
    with Screen(sys.stdout) as screen:
        while True:
            width, height = shutil.get_terminal_size(_PLAIN_SIZE)
            notice = [line(lost, "red")] if lost else []
            lines = [*notice, *frame(view, width, height - len(notice), sys.stdout.encoding)][:height]
            screen.show([paint(pieces, coloured, width) for pieces in lines])
            if not screen.wait(interval):
                return
            try:
                view = look(client, engine)
                lost = ""
            except Problem as error:
                lost = f"the numbers are those of {moment(view.live.time, '%H:%M:%S')}: {error}"


def look(client: Client, engine: str | None) -> View:
    """Ask the server for what a frame shows.

    Raises
    ------
    Problem
        If the server does not answer, has no live page, or lacks the engine.
    """
    # No past of the layers, only their latest values; of the rest what the rate of tokens takes.
    live = client.read(Live, "live.json", since=-_RATE_SECONDS, metrics="")
    state = client.read(State, "state")
    if engine is not None and engine not in live.names:
        known = ", ".join(live.names) or "none yet"
        raise Problem(f"{client.url} has no engine {engine}; it has: {known}")
    chosen = next((e for e in live.engines if engine is None or e.engine == engine), None)
    known_state = next((e for e in state.engines if chosen is not None and e.engine == chosen.engine), None)
    return View(live, chosen, None if state.control is None else state.control.generation, known_state)


def frame(view: View, width: int, height: int | None, encoding: str | None) -> list[Line]:
    """Return the lines of one frame.

    Parameters
    ----------
    view
        What is shown.
    width, height
        Columns and lines that there are; layers that do not fit are counted in the last line. None: all fit.
    encoding
        The output's, for the bars.
    """
    engine = view.engine
    if engine is None:
        return [line("Sluice", "bold"), line("no worker reports; while a model loads this is normal")]
    lines = [*_header(view, engine, width), line("")]
    order = sorted(range(len(engine.layers)), key=lambda index: engine.layers[index])
    shown = order
    if height is not None and len(lines) + 1 + len(order) > height:
        shown = order[: max(0, height - len(lines) - 2)]
    lines += _table(engine, shown, width, encoding)
    if len(shown) < len(order):
        lines.append(line(plural(len(order) - len(shown), "more layer"), "dim"))
    return lines


# ------------------------------------------------------------------------------------------------ header
def _header(view: View, engine: LiveEngine, width: int) -> list[Line]:
    names = view.live.names
    which = f"engine {engine.engine}" + (f" of {', '.join(names)}" if len(names) > 1 else "")
    generation = "" if view.generation is None else f", generation {view.generation}"
    rest = [
        Piece(f"  {which}{generation}  "),
        _health(view.live, engine),
        Piece(f"  {moment(view.live.time, '%H:%M:%S')}", "dim"),
    ]
    model = Piece(_end_of(engine.model_name, width - sum(len(piece.text) for piece in rest)), "bold")
    patches = [Piece("patches: "), *_patches(view, engine), Piece(f"  tokens seen: {_tokens(view)}")]
    lines: list[Line] = [[model, *rest], patches]
    bad = [_layer(engine, i) for i, count in enumerate(engine.latest.get("nonfinite_total", ())) if count]
    if bad:
        lines.append(line(f"! NaN or infinite values in layer {', '.join(bad)}", "red"))
    probes = engine.series.get("probe_errors_total", {})
    failed = [probe for probe in probes if _last(engine, "probe_errors_total", probe)]
    if failed:
        lines.append(line(f"! failed, see the server's log: probe {', '.join(failed)}", "yellow"))
    return lines


def _health(live: Live, engine: LiveEngine) -> Piece:
    known = [_last(engine, "snapshot_age_seconds", rank) for rank in engine.series.get("snapshot_age_seconds", {})]
    ages = [age for age in known if age is not None]
    if not ages:
        return Piece("no data: no worker reports", "red")
    age = max(ages) + max(0.0, live.time - live.times[-1] if live.times else 0.0)
    if len(ages) < len(known) or age > live.stale_after_seconds:
        return Piece(f"stale: last snapshot {duration(age)} ago", "red")
    if not any(values for metric, values in engine.latest.items() if not metric.endswith("_total")):
        return Piece("idle: no traffic in the window", "yellow")
    return Piece("live", "green")


def _patches(view: View, engine: LiveEngine) -> list[Piece]:
    known = {
        patch: (bool(_last(engine, "patch_installed", patch)), bool(_last(engine, "patch_enabled", patch)))
        for patch in engine.series.get("patch_installed", {})
    }
    if view.state is not None:  # not as old as the last point
        known |= {name: (bool(patch.installed), bool(patch.enabled)) for name, patch in view.state.patches.items()}
    pieces: list[Piece] = []
    for name, (installed, enabled) in sorted(known.items()):
        if installed:
            pieces += [Piece(", ")] if pieces else []
            pieces.append(Piece(f"{name} {'on' if enabled else 'off'}", "green" if enabled else "yellow"))
    return pieces or [Piece("none")]


def _tokens(view: View) -> str:
    """Return tokens by phase, and those per second over the points that there are."""
    engine = view.engine
    phases = {} if engine is None else engine.series.get("tokens_observed_total", {})
    parts = []
    for phase in sorted(phases, reverse=True):  # prefill before decode
        # A series that began late is shorter and ends at the same point.
        points = [
            (time, value)
            for time, value in zip(view.live.times[-len(phases[phase]) :], phases[phase], strict=False)
            if value is not None
        ]
        if not points:
            continue
        (begin, before), (end, now) = points[0], points[-1]
        rate = f" ({(now - before) / (end - begin):,.0f}/s)" if end > begin and now >= before else ""
        parts.append(f"{now:,.0f} {phase}{rate}")
    return ", ".join(parts) or "none"


# ------------------------------------------------------------------------------------------------ table
def _table(engine: LiveEngine, shown: Sequence[int], width: int, encoding: str | None) -> list[Line]:
    columns = _columns(engine)
    while len(columns) > 1 and _width(columns, shown) > width:
        columns.remove(min(columns, key=lambda column: column.weight))
    bars = sum(column.share is not None for column in columns)
    length = min((width - _width(columns, shown)) // bars - 1, _BAR_WIDTHS[-1]) if bars else 0
    head: list[Piece] = []
    rows: list[list[Piece]] = [[] for _ in shown]
    for column in columns:
        texts = [column.text(index) for index in shown]
        cells = max(map(len, (column.title, *texts)))
        drawn = column.share if length in _BAR_WIDTHS else None
        head.append(Piece(column.title.rjust(cells) + (" " * (length + 1) if drawn else ""), "dim"))
        for row, index, text in zip(rows, shown, texts, strict=True):
            behind = f" {bar(drawn(index), length, encoding)}" if drawn else ""
            row.append(Piece(text.rjust(cells) + behind, column.style(index)))
    return table([head, *rows])


def _columns(engine: LiveEngine) -> list[Column]:
    def value(metric: str, index: int) -> float | None:
        values = engine.latest.get(metric, ())
        return values[index] if index < len(values) else None

    def number(metric: str) -> Callable[[int], str]:
        return lambda index: _number(value(metric, index))

    def share(metric: str) -> Callable[[int], str]:
        return lambda index: _share(value(metric, index))

    def sink_heads(index: int) -> str:
        sinks, heads = value("attention_sink_heads", index), value("attention_heads", index)
        return "-" if sinks is None else f"{_number(sinks)}/{_number(heads)}"

    def ratio_bar(index: int) -> float:
        ratio = value("activation_max_to_median_ratio", index) or 1.0
        return math.log10(max(ratio, 1.0)) / _RATIO_DECADES

    def ratio_style(index: int) -> Style:
        ratio = value("activation_max_to_median_ratio", index) or 0.0
        return "red" if ratio >= _MASSIVE_RATIO else "yellow" if ratio >= _MASSIVE_RATIO / 10 else ""

    def sink_style(index: int) -> Style:
        return "yellow" if (value("attention_sink_mass", index) or 0.0) >= _SINK_HEAD_MASS else ""

    def layer_style(index: int) -> Style:
        return "red" if value("nonfinite_total", index) else ""

    def plain(_: int) -> Style:
        return ""

    columns = [
        Column("layer", lambda index: _layer(engine, index), layer_style, None, 9),
        Column("max |h|", number("activation_abs_max"), layer_style, None, 8),
        Column("max/median", number("activation_max_to_median_ratio"), ratio_style, ratio_bar, 7),
        Column("kurtosis", number("activation_kurtosis"), plain, None, 1),
        Column("massive", number("massive_activations_total"), plain, None, 2),
        Column("sink mass", share("attention_sink_mass"), sink_style,
               lambda index: value("attention_sink_mass", index) or 0.0, 6),
        Column("sink heads", sink_heads, plain, None, 3),
    ]  # fmt: skip
    if any(mean is not None for mean in engine.latest.get("gate_mean", ())):
        columns.append(Column("gate mean", share("gate_mean"), plain, None, 5))
    return columns


def _width(columns: Sequence[Column], shown: Sequence[int]) -> int:
    cells = (max(map(len, (column.title, *map(column.text, shown)))) for column in columns)
    return sum(cells) + 2 * (len(columns) - 1)


def _layer(engine: LiveEngine, index: int) -> str:
    return engine.layers[index].lstrip("0") or "0"


def _end_of(text: str, width: int) -> str:
    """Return the end of a text, which in the path of a model says most."""
    return text if len(text) <= max(width, 8) else f"...{text[3 - max(width, 8) :]}"


def _last(engine: LiveEngine, metric: str, label: str) -> float | None:
    values = engine.series.get(metric, {}).get(label, ())
    return values[-1] if values else None


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
