"""The live page in a real browser, over snapshot files whose values vary over layers and time."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import CHROMIUM, Browser, Page
from tests.conftest import need_program
from tests.live.synthetic import Model, info, record, series, served, write
from vllm_sluice.config import Live
from vllm_sluice.live.history import History
from vllm_sluice.telemetry.catalogue import layer_label
from vllm_sluice.telemetry.collector import SnapshotCollector

STEPS = 150
VIEWS = [(1440, False), (1440, True), (360, False), (360, True)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        need_program("chromium", "chromium")
    with Browser() as started:
        yield started


@dataclass
class Site:
    url: str
    folder: Path
    history: History


def site(folder: Path, models: list[Model], steps: int = STEPS) -> Site:
    now = [time.time()]
    # A long interval, so that a slow machine does not make the snapshots stale before the browser has looked.
    history = History(SnapshotCollector(folder), Live(), interval_seconds=200.0, clock=lambda: now[0])
    record(history, folder, models, steps, now)
    history._clock = time.time
    return Site("", folder, history)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    with contextlib.ExitStack() as stack:

        def start(models: list[Model], steps: int = STEPS) -> Site:
            made = site(tmp_path, models, steps)
            made.url = stack.enter_context(served(SnapshotCollector(tmp_path), Live(), made.history))
            return made

        yield start


def opened(browser: Browser, url: str, width: int = 1440, dark: bool = False) -> Page:
    page = browser.open(url, width, 900, dark)
    page.wait_for("document.querySelectorAll('.tile').length > 0")
    return page


def tiles(page: Page) -> dict[str, str]:
    return dict(
        page.evaluate("[...document.querySelectorAll('.tile')].map(t => [t.children[0].innerText, t.innerText])")
    )


def table(page: Page) -> list[list[str]]:
    return page.evaluate("[...document.querySelectorAll('tr')].map(r => [...r.children].map(c => c.innerText.trim()))")


def text(page: Page, element: str) -> str:
    return page.evaluate(f"document.getElementById('{element}').innerText")


def clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(round(seconds, 2)))


def box(page: Page, selector: str) -> list[float]:
    return page.evaluate(
        f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        " return [r.x + scrollX, r.y + scrollY, r.width, r.height]; })()"
    )


def number(value: float) -> str:
    """Format as the page does, from the five digits that it is sent."""
    value = float(f"{value:.5g}")
    return f"{math.floor(value + 0.5):,}" if value >= 1000 else f"{value:#.4g}"


def exact(value: float) -> str:
    value = float(f"{value:.5g}")
    return f"{value:,.10f}".rstrip("0").rstrip(".")


def share(value: float) -> str:
    return f"{float(f'{value:.5g}'):.3f}"


def of(model: Model, metric: str, **labels: str) -> list[float]:
    written = model.values(STEPS - 1)
    return [written[series(metric, layer=layer_label(i), **labels)] for i in range(model.layers)]


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_the_page_shows_the_numbers_written(browser, serve, tmp_path, width, dark):
    model = Model(layers=24, switch_steps=(60, 100, 120), nonfinite_layer=7)
    page = opened(browser, serve([model]).url, width, dark)

    found = tiles(page)
    peaks, sinks = of(model, "activation_abs_max"), of(model, "attention_sink_mass")
    peak, sink = peaks.index(max(peaks)), sinks.index(max(sinks))
    ratio = of(model, "activation_max_to_median_ratio")[peak]
    assert "off" in found["Patch gate"].split()
    assert f"{number(peaks[peak])}" in found["Largest |h|"]
    assert f"layer {peak} · {number(ratio)} × median" in found["Largest |h|"]
    assert share(sinks[sink]) in found["Strongest sink"]
    heads = of(model, "attention_sink_heads")[sink]
    assert f"layer {sink} · {heads:.0f} of 16 heads" in found["Strongest sink"]
    gates = [float(f"{v:.5g}") for v in of(model, "gate_mean")]
    assert f"{sum(gates) / len(gates):.3f}" in found["Mean gate"]
    assert "3" in found["Non-finite"] and "in layer 7" in found["Non-finite"]
    assert f"{120 * (STEPS - 1) + 7:,} prefill" in found["Tokens seen"]
    assert f"{36 * (STEPS - 1) + 3:,} decode" in found["Tokens seen"]

    head, *rows = table(page)
    columns = {
        "max |h|": list(map(number, peaks)),
        "median |h|": list(map(number, of(model, "activation_median"))),
        "max / median": list(map(number, of(model, "activation_max_to_median_ratio"))),
        "kurtosis": list(map(number, of(model, "activation_kurtosis"))),
        "top channel": [f"{v:.0f}" for v in of(model, "activation_top_channel", rank="1")],
        "sink mass": list(map(share, sinks)),
        "sink heads": [f"{v:.0f} / 16" for v in of(model, "attention_sink_heads")],
        "entropy": list(map(share, of(model, "attention_entropy_ratio"))),
        "gate mean": list(map(share, of(model, "gate_mean"))),
        "gate closed": list(map(share, of(model, "gate_closed_ratio"))),
    }
    assert head == ["layer", *columns]
    assert [row[0].split()[0] for row in rows] == [str(i) for i in range(24)]
    assert "3 NaN/∞" in rows[7][0]
    for at, expected in enumerate(columns.values(), start=1):
        assert [row[at] for row in rows] == expected

    assert text(page, "model") == "sluice/twin-32"
    versions = text(page, "versions")
    assert versions == "Sluice 0.1.0 · vLLM 0.32.0 · fingerprint 3f9ac01be5d27714 · 24 layers · ranks: 1"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    scheme = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (scheme == "rgb(14, 17, 22)") == dark

    left, top, wide, high = map(round, box(page, "#heat"))
    with Image.open(page.screenshot(tmp_path / "page.png")) as picture:
        assert picture.width == width
        cells = picture.convert("RGB").crop((left, top, left + wide, top + high))
        assert len(cells.getcolors(maxcolors=10**6)) > 50
    assert page.errors == []


def test_an_offence_against_the_policy_is_noticed(browser, serve):
    page = opened(browser, serve([Model(layers=2)], steps=2).url)
    assert page.errors == []
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=color:red>')")
    assert "Content Security Policy" in page.errors[0]


def test_the_tooltip_reads_the_cell_under_the_pointer(browser, serve):
    model = Model(layers=24, switch_steps=(60,))
    page = opened(browser, serve([model]).url)
    page.evaluate("document.getElementById('heat').scrollIntoView({block: 'center'})")
    left, top, wide, high = box(page, "#heat")
    top -= page.evaluate("scrollY")
    for layer, part in ((0, 0.1), (11, 0.7), (23, 0.4)):
        page.move(left + part * wide, top + (layer + 0.5) * high / 24)
        title = page.evaluate("document.querySelector('#tip b').innerText")
        shown = page.evaluate(
            "[...document.querySelectorAll('#tip p')].map(p => [...p.children].map(e => e.innerText))"
        )
        begun, found = title.split(" · ")
        step = [clock(model.started + 2 * s) for s in range(STEPS)].index(found)
        assert begun == f"layer {layer}"
        assert step == pytest.approx(part * STEPS, abs=3)
        values, label = model.values(step), {"layer": layer_label(layer)}
        assert dict(shown) == {
            "max |h|": exact(values[series("activation_abs_max", **label)]),
            "max / median": exact(values[series("activation_max_to_median_ratio", **label)]),
            "sink mass": exact(values[series("attention_sink_mass", **label)]),
            "entropy": exact(values[series("attention_entropy_ratio", **label)]),
            "gate mean": exact(values[series("gate_mean", **label)]),
        }
    page.move(2, 2)
    assert page.evaluate("document.getElementById('tip').hidden")
    assert page.errors == []


def test_the_keyboard_reaches_everything(browser, serve):
    model = Model(layers=6, switch_steps=(60,))
    page = opened(browser, serve([model]).url)
    reached = []
    for _ in range(12):
        page.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value || ''"))
    assert [name for name in ("activation_abs_max", "span", "heat", "tableBox") if name not in reached] == []
    page.evaluate("document.getElementById('heat').focus()")
    for key in ("ArrowLeft", "ArrowDown", "ArrowDown"):
        page.press(key)
    last = exact(of(model, "activation_abs_max")[2])
    tip = text(page, "tip")
    assert tip.startswith("layer 2 · ")
    assert last in tip
    page.press("ArrowLeft")
    assert last not in text(page, "tip")
    page.press("Escape")
    assert page.evaluate("document.getElementById('tip').hidden")
    page.evaluate("document.querySelector('input').focus()")
    page.press("ArrowRight")
    assert page.evaluate("document.querySelector('input:checked').value") == "activation_max_to_median_ratio"
    assert page.errors == []


def test_every_metric_can_be_picked_and_has_a_text_alternative(browser, serve):
    page = opened(browser, serve([Model(layers=6)]).url)
    pictures = set()
    for metric in page.evaluate("[...document.querySelectorAll('input')].map(i => i.value)"):
        page.click(f"input[value={metric}] + span")
        name = page.evaluate("document.querySelector('input:checked + span').innerText")
        assert page.evaluate("document.getElementById('heat').ariaLabel").startswith(f"Heatmap of {name}: 6 layers")
        assert "Good: " in text(page, "about")
        low, _, high = page.evaluate("[...document.querySelectorAll('#ticks span')].map(t => t.innerText)")
        if metric in ("attention_sink_mass", "gate_mean", "attention_entropy_ratio"):
            assert (low, high) == ("0", "1")
        pictures.add(page.evaluate("document.getElementById('heat').toDataURL()"))
    assert len(pictures) == 5
    assert page.errors == []


def test_switches_are_marked_at_their_own_time(browser, serve):
    model = Model(layers=6, switch_steps=(50, 75, 120))
    page = opened(browser, serve([model]).url)
    times = [model.started + 2.0 * step - 0.7 for step in (50, 75, 120)]
    words = [clock(round(t, 1)) for t in times]
    expected = [f"{word} gate {on}" for word, on in zip(words, ("off", "on", "off"), strict=True)][::-1]
    assert page.evaluate("[...document.querySelectorAll('#switches li')].map(i => i.innerText)") == expected
    runs = page.evaluate("[...document.querySelectorAll('.run')].map(r => [r.innerText, r.offsetLeft, r.offsetWidth])")
    assert [run[0] for run in runs] == ["on", "off", "on", "off"]
    lines = page.evaluate("[...document.querySelectorAll('#marks i')].map(i => parseFloat(i.style.left))")
    wide = page.evaluate("document.getElementById('plot').clientWidth")
    assert [run[1] for run in runs[1:]] == pytest.approx([line * wide / 100 for line in lines], abs=2)
    labels = page.evaluate("[...document.querySelectorAll('#marks b')].map(i => i.innerText)")
    assert labels == ["gate off", "gate on", "gate off"]
    assert f"since {words[2]}" in tiles(page)["Patch gate"]
    assert page.errors == []


def test_a_model_without_a_gate_looks_right(browser, serve):
    page = opened(browser, serve([Model(layers=6, gate=False)]).url, 360)
    found = tiles(page)
    assert "not installed" in found["Patch gate"]
    assert "no gate" in found["Mean gate"]
    assert not any("gate" in name for name in table(page)[0])
    assert not page.evaluate(
        "[...document.querySelectorAll('input')].find(i => i.value === 'gate_mean').checkVisibility()"
    )
    assert text(page, "laneEmpty").startswith("No patch is installed")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.errors == []


def test_without_traffic_it_says_so(browser, serve):
    model = Model(layers=6, quiet=range(100, STEPS))
    page = opened(browser, serve([model]).url)
    assert text(page, "state") == "idle"
    found = tiles(page)
    assert "no traffic\nin the window" in found["Largest |h|"].replace("\n\n", "\n")
    assert f"{120 * 100 + 7:,} prefill" in found["Tokens seen"]
    seen = clock(model.started + 2 * 99)
    note = text(page, "tableEmpty")
    assert note == f"No traffic in the window; the last values are from {seen}."
    assert not page.evaluate("document.getElementById('tableBox').checkVisibility()")
    assert page.evaluate("document.getElementById('heat').checkVisibility()")
    assert page.errors == []


def test_without_workers_it_says_so(browser, serve):
    page = opened(browser, serve([], steps=1).url, 360)
    assert text(page, "state") == "no data"
    for note in ("heatEmpty", "tableEmpty", "laneEmpty"):
        assert "No worker reports" in text(page, note)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.errors == []


def test_states_follow_the_ranks(browser, serve):
    made = serve([Model(layers=2, ranks=2)], steps=20)
    page = opened(browser, made.url)
    state = "document.getElementById('state').innerText"
    assert page.evaluate(state) == "live"
    assert "last snapshot" in text(page, "age")
    (made.folder / "0-pp0-tp1.snapshot").unlink()
    made.history.record()
    page.wait_for(f"{state} === 'stale'")
    assert text(page, "age") == "pp0-tp1 stopped reporting"
    (made.folder / "0-pp0-tp0.snapshot").unlink()
    made.history.record()
    page.wait_for(f"{state} === 'no data'")
    assert page.errors == []


def test_an_old_snapshot_is_stale(browser, serve):
    made = serve([Model(layers=2)], steps=5)
    made.history._stale_after = 0.0
    page = opened(browser, made.url)
    assert text(page, "state") == "stale"


def test_new_points_arrive_and_a_lost_server_is_told(browser, tmp_path):
    model = Model(layers=2)
    made = site(tmp_path, [model], 10)
    with served(SnapshotCollector(tmp_path), Live(), made.history) as url:
        page = opened(browser, url)
        model.write(tmp_path, 5000)
        made.history.record()
        page.wait_for("document.body.innerText.includes('600,007')")
    page.wait_for("document.getElementById('state').innerText === 'no answer'")
    assert "from the server since" in text(page, "age")


def test_engines_can_be_picked(browser, serve):
    models = [Model(layers=3, engine="0", name="first"), Model(layers=5, engine="1", name="second", gate=False)]
    page = opened(browser, serve(models, steps=20).url)
    assert page.evaluate("[...document.getElementById('engine').options].map(o => o.value)") == ["0", "1"]
    assert text(page, "model") == "first"
    page.evaluate("document.getElementById('engine').value = '1'")
    page.evaluate("document.getElementById('engine').dispatchEvent(new Event('change'))")
    page.wait_for("document.getElementById('model').innerText === 'second'")
    assert len(table(page)) == 6
    assert page.errors == []


def test_failing_probes_and_infinite_values_stand_out(browser, serve):
    made = serve([], steps=1)
    write(
        made.folder,
        info(model="<b>m</b>"),
        {
            series("activation_abs_max", layer="000"): math.inf,
            series("activation_abs_max", layer="001"): 2.0,
            series("probe_errors_total", probe="attention"): 2.0,
        },
    )
    made.history.record()
    page = opened(browser, made.url)
    page.wait_for("document.getElementById('model').innerText === '<b>m</b>'")
    assert "Infinity" in tiles(page)["Largest |h|"]
    assert "The attention probe failed 2 times" in text(page, "notice")
    assert "not measured" in tiles(page)["Strongest sink"]
    pixel = page.evaluate(
        "(() => { const c = document.getElementById('heat');"
        " return [...c.getContext('2d').getImageData(c.width - 1, 0, 1, 1).data]; })()"
    )
    assert pixel == [224, 33, 138, 255]
    assert page.errors == []
