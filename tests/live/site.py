"""The live page with a past, in a browser, and what can be read off it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.browser import Browser, Page
from tests.live.synthetic import Model, record, series
from vllm_sluice.config import Live
from vllm_sluice.live.history import History
from vllm_sluice.telemetry.catalogue import layer_label
from vllm_sluice.telemetry.collector import SnapshotCollector

STEPS = 150


@dataclass
class Site:
    """A server of the page; `folder` holds the snapshots."""

    url: str
    folder: Path
    history: History


Serve = Callable[..., Site]


def site(folder: Path, models: list[Model], steps: int = STEPS, settings: Live | None = None) -> Site:
    """Record a past; nothing is served yet."""
    settings = settings or Live()
    now = [time.time()]
    # A long interval, so that a slow machine does not make the snapshots stale before the browser has looked.
    history = History(SnapshotCollector(folder), settings, interval_seconds=200.0, clock=lambda: now[0])
    record(history, folder, models, steps, now, settings.period_seconds)
    history._clock = time.time
    return Site("", folder, history)


def opened(browser: Browser, url: str, width: int = 1440, dark: bool = False) -> Page:
    """Open the page and wait for its first picture."""
    page = browser.open(url, width, 900, dark)
    page.wait_for("document.querySelectorAll('.tile').length > 0")
    return page


def still(page: Page) -> Page:
    """Pause the page, so that no refresh comes between two readings, nor moves the button away from a pointer."""
    page.evaluate("document.getElementById('pause').click()")
    return page


def texts(page: Page, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText.trim())")


def text(page: Page, element: str) -> str:
    return page.evaluate(f"document.getElementById('{element}').innerText")


def tiles(page: Page) -> dict[str, str]:
    return dict(
        page.evaluate("[...document.querySelectorAll('.tile')].map(t => [t.children[0].innerText, t.innerText])")
    )


def table(page: Page, box: str = "tableBox") -> list[list[str]]:
    return page.evaluate(
        f"[...document.querySelectorAll('#{box} tr')].map(r => [...r.children].map(c => c.innerText.trim()))"
    )


def clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(round(seconds, 2)))


def rectangle(page: Page, selector: str) -> list[float]:
    """Return x, y, width and height in the document."""
    return page.evaluate(
        f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        " return [r.x + scrollX, r.y + scrollY, r.width, r.height]; })()"
    )


def focus(page: Page, selector: str) -> None:
    page.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")


def choose(page: Page, element: str, value: str) -> None:
    """Choose an option of a select, as a user's choice."""
    page.evaluate(
        f"(() => {{ const e = document.getElementById('{element}'); e.value = {json.dumps(value)};"
        " e.dispatchEvent(new Event('change')); })()"
    )


def canvas(metric: str) -> str:
    """Return the selector of a map."""
    return f"[data-key={metric}] canvas"


def shown(value: float) -> float:
    """Return what the page is sent of a value: five digits."""
    return float(f"{value:.5g}")


def number(value: float) -> str:
    value = shown(value)
    return f"{math.floor(value + 0.5):,}" if value >= 1000 else f"{value:#.4g}"


def exact(value: float) -> str:
    return f"{shown(value):,.10f}".rstrip("0").rstrip(".")


def share(value: float) -> str:
    return f"{shown(value):.3f}"


def of(model: Model, metric: str, step: int = STEPS - 1, **labels: str) -> list[float]:
    """Return a metric's values by layer, as they were written."""
    written = model.values(step)
    return [written[series(metric, layer=layer_label(i), **labels)] for i in range(model.layers)]


def pixels(page: Page, metric: str) -> list[list[list[int]]]:
    """Return a map's pixels as [layer][x][rgba]."""
    found: dict[str, Any] = page.evaluate(
        f"(() => {{ const c = document.querySelector({json.dumps(canvas(metric))});"
        " return {width: c.width, height: c.height,"
        " data: [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]}; })()"
    )
    width, data = found["width"], found["data"]
    cells = [data[4 * i : 4 * i + 4] for i in range(width * found["height"])]
    return [cells[y * width : (y + 1) * width] for y in range(found["height"])]


def moments(labels: list[str], now: float) -> list[float]:
    """Return when the marks of a time axis are, given what a clock shows there; the last one is not long before `now`.

    A clock tells no date, and shows an hour twice when summer time ends: the time is looked for from `now` backwards.
    """
    form, unit = ("%H:%M:%S", 1) if labels[-1].count(":") == 2 else ("%H:%M", 60)
    found, before = [], int(now) // unit * unit
    for label in reversed(labels):
        day = range(before, before - 86400, -unit)
        found.append(next(t for t in day if time.strftime(form, time.localtime(t)) == label))
        before = found[-1] - unit
    return [float(t) for t in reversed(found)]


def timescale(page: Page) -> Callable[[float], int]:
    """Return which pixel column a time is drawn in, as the ticks of the axis say; the browser has our time zone."""
    ticks = page.evaluate(
        "[...document.querySelectorAll('#axis span')].map(s => [s.innerText, parseFloat(s.style.left)])"
    )
    width = page.evaluate("document.querySelector('canvas').width")
    at = moments([word for word, _ in ticks], time.time())
    (t0, x0), (t1, x1) = ((t, left / 100 * width) for t, (_, left) in ((at[0], ticks[0]), (at[-1], ticks[-1])))
    return lambda moment: int(x0 + (moment - t0) * (x1 - x0) / (t1 - t0))
