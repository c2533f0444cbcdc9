"""The maps of layers over time: every cell has its value's colour, and can be read by pointer, keyboard and table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from tests.live.site import (
    STEPS,
    canvas,
    choose,
    clock,
    exact,
    focus,
    moments,
    of,
    opened,
    pixels,
    rectangle,
    shown,
    still,
    table,
    text,
    texts,
    timescale,
)
from tests.live.synthetic import Model, info, series, write
from vllm_sluice.config import Live

VIRIDIS = [(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)]
MARKED = [224, 33, 138, 255]
RATIO, SINK, GATE = "activation_max_to_median_ratio", "attention_sink_mass", "gate_mean"
HEADROOM = "quantization_headroom_ratio"


def colour(part: float) -> list[int]:
    """Return the colour of a value that lies so far up its scale."""
    at = round(255 * min(1.0, max(0.0, part))) / 255 * 5
    stop = min(int(at), 4)
    return [
        *(math.floor(a + (at - stop) * (b - a) + 0.5) for a, b in zip(VIRIDIS[stop], VIRIDIS[stop + 1], strict=True)),
        255,
    ]


def quarters(values: list[float]) -> tuple[float, float]:
    """Return the logarithmic scale of values: quarters of a decade that hold them."""
    return math.floor(4 * math.log10(min(values))) / 4, math.floor(4 * math.log10(max(values)) + 1) / 4


def near(found: list[int], expected: list[int]) -> bool:
    """Tell whether colours differ by less than one of the 256 shades does from the next."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 4


def check(page, model: Model, metric: str, part, steps: list[int], written: str = "") -> None:
    """Compare the pixels of whole columns with what was written."""
    found, column = pixels(page, metric), timescale(page)
    assert len(found) == model.layers
    for step in steps:
        # A point stands for the time before it: its column is there.
        x = column(model.started + model.period * (step - 0.5))
        expected = [part(v) for v in of(model, written or metric, step)]
        wrong = [i for i in range(model.layers) if not near(found[i][x], expected[i])]
        assert not wrong, (metric, step, x, [(found[i][x], expected[i]) for i in wrong])


def every(model: Model, metric: str, steps: range = range(STEPS)) -> list[float]:
    return [shown(v) for step in steps for v in of(model, metric, step)]


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Run in a time zone, given as POSIX spells it: the names of zones need files that may not be there."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("zone", ["UTC0", "IST-5:30", "CET-1CEST,M3.5.0,M10.5.0/3"], indirect=True)
@pytest.mark.parametrize("day", [1774742400, 1792886400, 1795910400], ids=["spring forward", "fall back", "no change"])
@pytest.mark.parametrize(("span", "apart"), [(10800, 900), (900, 60), (60, 5)])
def test_an_axis_is_read_at_any_hour_of_the_day(zone, day, span, apart):
    for now in range(day, day + 86400, 420):
        marks = [float(t) for t in range(now - span, now + 1) if t % apart == 0]
        assert moments([clock(t)[: 8 if apart < 60 else 5] for t in marks], now + 0.7) == marks, clock(now)


def test_every_cell_has_the_colour_of_its_value(browser, serve):
    model = Model(layers=24, switch_steps=(60, 100), nonfinite_layer=7)
    page = still(opened(browser, serve([model]).url))
    steps = [3, 20, 57, 63, 80, 97, 103, 130, 147]
    low, high = quarters(every(model, RATIO))
    check(page, model, RATIO, lambda v: colour((math.log10(v) - low) / (high - low)), steps)
    check(page, model, SINK, colour, steps)
    top = next(t for t in (0.25, 0.5, 1) if max(every(model, GATE)) <= t)
    check(page, model, GATE, lambda v: colour(v / top), steps)
    assert texts(page, "figure .tick") == [
        *(exact(float(f"{10**v:.2g}")) for v in (low, high)), "0", "1", "0", str(top),
    ]  # fmt: skip
    page.evaluate("location.hash = 'show=activation_abs_max'")
    page.wait_for("document.querySelectorAll('figure').length === 1")
    low, high = quarters(every(model, "activation_abs_max"))
    check(page, model, "activation_abs_max", lambda v: colour((math.log10(v) - low) / (high - low)), steps)
    assert page.errors == []


def test_three_hours_are_drawn_with_the_older_points_in_their_places(browser, serve):
    model = Model(layers=4, switch_steps=(300, 700))
    # 900 points twelve seconds apart: the first half of them is thinned to one in two or more.
    made = serve([model], 900, Live(period_seconds=12.0))
    page = still(opened(browser, made.url + "#span=10800&show=attention_sink_mass", 360))
    column = timescale(page)
    found = pixels(page, SINK)
    for begin, end, on in ((10, 290, True), (310, 690, False), (710, 890, True)):
        for step in range(begin, end, 20):
            cell = found[2][column(model.started + 12.0 * step)]
            assert cell[3] == 255, step
            assert (cell[1] < 60) == on, (step, cell)
    assert page.errors == []


def test_times_without_a_value_stay_empty(browser, serve):
    model = Model(layers=3, quiet=range(50, 90))
    page = still(opened(browser, serve([model]).url))
    found, column = pixels(page, SINK), timescale(page)
    for step, empty in ((40, False), (60, True), (80, True), (100, False)):
        assert (found[1][column(model.started + 2 * (step - 0.5))][3] == 0) == empty
    assert page.errors == []


def test_what_is_not_measured_is_told_from_no_traffic(browser, serve):
    made = serve([], 1)
    write(made.folder, info(), {series("activation_abs_max", layer="000"): 2.0})
    made.history.record()
    page = opened(browser, made.url + "#show=attention_sink_mass")
    page.wait_for("document.getElementById('heatEmpty').innerText.startsWith('Not measured: its probe')")
    assert page.errors == []


def test_clipped_and_infinite_values_are_marked(browser, serve):
    model = Model(layers=12, switch_steps=(60,), quantization=True)
    page = still(opened(browser, serve([model]).url))
    headroom = [[448.0 / v for v in of(model, "activation_abs_max", step)] for step in range(STEPS)]
    low, high = quarters([max(1.0, shown(v)) for row in headroom for v in row])

    def part(peak: float) -> list[int]:
        ratio = 448.0 / peak
        return MARKED if ratio < 1 else colour(1 - (math.log10(ratio) - low) / (high - low))

    check(page, model, HEADROOM, part, [20, 57, 63, 147], "activation_abs_max")
    assert min(headroom[20]) > 1 > min(headroom[147])
    assert page.evaluate("document.getElementById('clipKey').checkVisibility()")
    assert not page.evaluate("document.getElementById('infKey').checkVisibility()")
    choose(page, "format", "serving:none")
    page.wait_for("document.querySelector('[data-key=quantization_headroom_ratio] b').innerText.includes('served')")
    assert not any(cell == MARKED for row in pixels(page, HEADROOM) for cell in row)
    assert not page.evaluate("document.getElementById('clipKey').checkVisibility()")
    assert page.errors == []


def test_infinity_stands_out(browser, serve):
    made = serve([], 1)
    values = {series("activation_abs_max", layer="000"): math.inf, series("activation_abs_max", layer="001"): 2.0}
    write(made.folder, info(), values)
    made.history.record()
    page = opened(browser, made.url + "#show=activation_abs_max")
    page.wait_for("document.querySelectorAll('canvas').length === 1")
    first, second = pixels(page, "activation_abs_max")
    assert first[-1] == MARKED
    assert second[-1] != MARKED and second[-1][3] == 255
    assert page.evaluate("document.getElementById('infKey').checkVisibility()")
    assert page.errors == []


def test_the_tooltip_reads_the_cell_under_the_pointer(browser, serve):
    model = Model(layers=24, switch_steps=(60,))
    page = still(opened(browser, serve([model]).url))
    column = timescale(page)
    page.evaluate(f"document.querySelector('{canvas(SINK)}').scrollIntoView({{block: 'center'}})")
    left, top, _, high = rectangle(page, canvas(SINK))
    top -= page.evaluate("scrollY")
    for layer, step in ((0, 15), (11, 104), (23, 60)):
        # A point stands for the time before it.
        page.move(left + column(model.started + 2.0 * (step - 0.5)), top + (layer + 0.5) * high / 24)
        tip = f"[data-key={SINK}] .tip"
        found = page.evaluate(f"document.querySelector('{tip} b').innerText")
        lines = page.evaluate(
            f"[...document.querySelectorAll('{tip} p')].map(p => [...p.childNodes].map(e => e.textContent))"
        )
        assert found == f"layer {layer} · {clock(model.started + 2.0 * step)}"
        assert lines == [
            ["max / median", exact(of(model, RATIO, step)[layer])],
            ["sink mass", exact(of(model, SINK, step)[layer])],
            ["gate mean", exact(of(model, GATE, step)[layer])],
            ["gate on" if step < 60 else "gate off"],
        ]
        # The other maps show where that is, and no tip of their own.
        marks = page.evaluate("[...document.querySelectorAll('.cursor')].map(c => [c.hidden, c.style.left])")
        assert [hidden for hidden, _ in marks] == [False] * 3
        assert len({at for _, at in marks}) == 1
        assert page.evaluate("document.querySelectorAll('.tip:not([hidden])').length") == 1
    assert text(page, "said") == ""  # a mouse makes no screen reader talk
    page.move(2, 2)
    assert page.evaluate("document.querySelectorAll('.tip:not([hidden])').length") == 0
    assert page.errors == []


def test_the_keyboard_moves_a_cursor_and_every_step_is_spoken(browser, serve):
    model = Model(layers=16, switch_steps=(60,))
    page = opened(browser, serve([model]).url)
    page.evaluate("document.getElementById('pause').click()")
    focus(page, canvas(SINK))

    def spoken(layer: int, step: int) -> str:
        values = {name: exact(of(model, m, step)[layer]) for name, m in
                  (("max / median", RATIO), ("sink mass", SINK), ("gate mean", GATE))}  # fmt: skip
        return "; ".join([
            f"layer {layer} · {clock(model.started + 2 * step)}",
            *(f"{name} {value}" for name, value in values.items()),
            "gate on" if step < 60 else "gate off",
        ])  # fmt: skip

    last = STEPS - 1
    steps = [
        ("ArrowDown", 0, last), ("ArrowDown", 1, last), ("ArrowLeft", 1, last - 1), ("PageDown", 11, last - 1),
        ("PageDown", 15, last - 1), ("ArrowDown", 15, last - 1), ("ArrowUp", 14, last - 1), ("Home", 14, 0),
        ("ArrowLeft", 14, 0), ("ArrowRight", 14, 1), ("PageUp", 4, 1), ("End", 4, last), ("ArrowRight", 4, last),
    ]  # fmt: skip
    for key, layer, step in steps:
        page.press(key)
        assert page.evaluate("document.getElementById('said').textContent") == spoken(layer, step), key
        assert page.evaluate(f"document.querySelector('[data-key={SINK}] .tip').hidden") is False
    assert page.evaluate("document.getElementById('said').ariaLive") == "polite"
    page.press("Escape")
    assert page.evaluate("document.querySelectorAll('.tip:not([hidden])').length") == 0
    assert page.evaluate("document.getElementById('said').textContent") == ""
    assert page.evaluate("scrollX") == 0
    assert page.errors == []


def test_a_cursor_stays_while_points_arrive(browser, serve):
    model = Model(layers=4)
    made = serve([model], 40, Live(period_seconds=0.5))
    page = opened(browser, made.url)
    focus(page, canvas(SINK))
    for key in ("Home", "ArrowDown", "ArrowDown"):
        page.press(key)
    tip = f"document.querySelector('[data-key={SINK}] .tip b').innerText"
    before = page.evaluate(tip)
    model.write(made.folder, 5000)
    made.history.record()
    page.wait_for("document.body.innerText.includes('600,007')")
    assert page.evaluate(tip) == before
    assert page.errors == []


def test_points_that_arrive_are_as_far_apart_as_the_older_ones(browser, serve):
    model = Model(layers=1, gate=False)
    made = serve([model], 900, Live(period_seconds=1.0))  # more points than a phone has room for: one in two
    recorded = made.history._times.values()
    made.history._clock = lambda: recorded[-1]
    page = opened(browser, made.url, 360)
    for step in range(900, 910):
        recorded.append(round(recorded[-1] + 1.0, 2))
        model.write(made.folder, step)
        made.history.record()
        # One point with every answer, however slow the machine is.
        page.wait_for(f"document.body.innerText.includes('{120 * step + 7:,}')")
    still(page)
    focus(page, canvas(SINK))
    times = []
    for key in ["End", *["ArrowLeft"] * 4]:
        page.press(key)
        spoken = page.evaluate("document.getElementById('said').textContent")
        times.append(spoken.split(" · ")[1].split(";")[0])
    # The first of every two seconds; the last point is there in any case.
    expected = sorted({*{t // 2: t for t in reversed(recorded)}.values(), recorded[-1]})
    assert times == [clock(t) for t in expected[:-6:-1]]
    assert page.errors == []


def test_each_map_can_be_shown_alone_and_has_a_name(browser, serve):
    page = opened(browser, serve([Model(layers=6)]).url)
    names = dict(zip(
        page.evaluate("[...document.querySelectorAll('input[name=metric]')].map(i => i.value)"),
        texts(page, "#metrics label"), strict=True,
    ))  # fmt: skip
    del names["overview"], names[HEADROOM]
    pictures = set()
    for metric, name in names.items():
        page.click(f"input[value={metric}] + span")
        page.wait_for(f"document.querySelector('figure').dataset.key === '{metric}'")
        page.wait_for(f"document.querySelectorAll('figure').length === 1 && {draws(metric)}")
        label = page.evaluate("document.querySelector('canvas').ariaLabel")
        assert label.startswith(f"{name}: 6 layers from ")
        assert " now " in label
        assert "Good: " in text(page, "about")
        pictures.add(page.evaluate("document.querySelector('canvas').toDataURL()"))
    assert len(pictures) == len(names) == 5
    assert page.errors == []


def draws(metric: str) -> str:
    return (
        f"(() => {{ const c = document.querySelector('{canvas(metric)}'); return c.width > 1 && c.getContext('2d')"
        ".getImageData(c.width / 2, 0, 1, 1).data[3] === 255; })()"
    )


def test_the_values_are_there_as_tables(browser, serve):
    model = Model(layers=5, switch_steps=(60,))
    page = opened(browser, serve([model]).url)
    assert page.evaluate("document.querySelectorAll('#valueTables table').length") == 0
    page.click("summary")
    page.wait_for("document.querySelectorAll('#valueTables table').length === 3")
    captions = texts(page, "#valueTables caption")
    assert [c.split(",")[0] for c in captions] == ["max / median", "sink mass", "gate mean"]
    rows = table(page, "valueTables table:nth-child(2)")
    assert rows[0][0] == "layer"
    times = [clock(model.started + 2 * s) for s in range(STEPS)]
    steps = [times.index(found) for found in rows[0][1:]]
    assert steps[-1] == STEPS - 1 and len(steps) == 8
    for layer, row in enumerate(rows[1:]):
        assert row == [str(layer), *(exact(of(model, SINK, step)[layer]) for step in steps)]
    scopes = page.evaluate("[...document.querySelectorAll('#valueTables th')].map(t => t.scope)")
    assert set(scopes) == {"row", "col"}
    assert page.errors == []


def test_the_tip_names_the_baseline(browser, serve):
    page = opened(browser, serve([Model(layers=3, baseline=True)], 20).url)
    focus(page, canvas(SINK))
    page.press("ArrowDown")
    assert page.evaluate(f"document.querySelector('[data-key={SINK}] .picked').innerText").endswith("(baseline 0.5)")
    assert page.errors == []
