"""The live page in a real browser: the numbers that it shows are those that were written."""

from __future__ import annotations

import math

import pytest

from tests.live.site import (
    STEPS,
    choose,
    clock,
    number,
    of,
    opened,
    share,
    shown,
    still,
    table,
    text,
    texts,
    tiles,
)
from tests.live.synthetic import FORMATS, SITES, Model, info, series, write
from vllm_sluice.config import Live
from vllm_sluice.telemetry.catalogue import layer_label

VIEWS = [(1440, False), (1440, True), (360, False), (360, True)]


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_the_page_shows_the_numbers_written(browser, serve, width, dark):
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
    gates = list(map(shown, of(model, "gate_mean")))
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

    assert page.errors == []


def test_switches_are_marked_at_their_own_time(browser, serve):
    model = Model(layers=6, switch_steps=(50, 75, 120))
    page = still(opened(browser, serve([model]).url))
    times = [model.started + 2.0 * step - 0.7 for step in (50, 75, 120)]
    words = [clock(t) for t in times]
    states = list(zip(words, ("off", "on", "off"), (1, 2, 3), strict=True))
    expected = [f"{word} gate {on}, generation {generation}" for word, on, generation in states]
    assert texts(page, "#switches li") == expected[::-1]
    runs = page.evaluate(
        "[...document.querySelectorAll('.run')].map(r => [r.children[0].innerText, r.offsetLeft, r.offsetWidth])"
    )
    assert [run[0] for run in runs] == ["on", *(f"{on} · generation {generation}" for _, on, generation in states)]
    assert all(
        run[0].startswith("gate o") and " to " in run[0]
        for run in page.evaluate("[...document.querySelectorAll('.run')].map(r => [r.children[1].textContent])")
    )
    # Every map has the lines, the first one the words too; they stand where the lanes change.
    lines = page.evaluate(
        "[...document.querySelectorAll('.marks')].map(m => [...m.querySelectorAll('i')]"
        ".map(i => parseFloat(i.style.left)))"
    )
    assert len(lines) == 3
    assert lines[1:] == lines[:1] * 2
    wide = page.evaluate("document.querySelector('#lanes .plot').clientWidth")
    assert [run[1] for run in runs[1:]] == pytest.approx([line * wide / 100 for line in lines[0]], abs=2)
    assert texts(page, ".marks b") == ["gate off", "gate on", "gate off"]
    assert f"since {clock(round(times[2], 1))}" in tiles(page)["Patch gate"]  # that metric comes to a tenth of a second
    assert page.errors == []


def test_a_model_without_a_gate_looks_right(browser, serve):
    page = opened(browser, serve([Model(layers=6, gate=False)]).url, 360)
    found = tiles(page)
    assert "not installed" in found["Patch gate"]
    assert "Mean gate" not in found
    assert not any("gate" in name for name in table(page)[0])
    assert page.evaluate("[...document.querySelectorAll('figure')].map(f => f.dataset.key)") == [
        "activation_max_to_median_ratio",
        "attention_sink_mass",
    ]
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
    assert note.startswith(f"No traffic in the window; the last values are from {seen}. Send the model a request")
    assert not page.evaluate("document.getElementById('tableBox').checkVisibility()")
    assert page.evaluate("document.querySelector('canvas').checkVisibility()")
    assert page.errors == []


def test_without_workers_it_says_so(browser, serve):
    page = opened(browser, serve([], steps=1).url, 360)
    assert text(page, "state") == "no data"
    for note in ("status", "heatEmpty", "positionEmpty", "tableEmpty"):
        assert "No worker reports. While a model loads this is normal" in text(page, note)
    assert not page.evaluate("document.getElementById('quantization').checkVisibility()")
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


def test_engines_can_be_picked(browser, serve):
    models = [Model(layers=3, engine="0", name="first"), Model(layers=5, engine="1", name="second", gate=False)]
    page = opened(browser, serve(models, steps=20).url)
    assert page.evaluate("[...document.getElementById('engine').options].map(o => o.value)") == ["0", "1"]
    assert texts(page, "#engine option") == ["0 · first", "1 · second"]
    assert text(page, "model") == "first"
    choose(page, "engine", "1")
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
    assert "The attention probe failed 2 times" in text(page, "status")
    assert "not measured" in tiles(page)["Strongest sink"]
    assert page.errors == []


def test_massive_activations_are_shown_by_position_and_layer(browser, serve):
    model = Model(layers=6, switch_steps=(100,))
    page = opened(browser, serve([model]).url)
    first, last = model.values(0), model.values(STEPS - 1)
    tokens = sum(
        last[series("tokens_observed_total", phase=p)] - first[series("tokens_observed_total", phase=p)]
        for p in ("prefill", "decode")
    )
    note = text(page, "positionNote")
    assert note.startswith(f"{tokens:,.0f} tokens looked at in 5 min (17,880 prefill, 5,364 decode; 298 of them at")
    rows = {row[0]: row[1:] for row in table(page, "positionBox")[1:]}

    def cell(layer: int, position: str) -> str:
        rise = last[series("massive_activations_total", layer=layer_label(layer), position=position)]
        return f"{1000 * rise / tokens:.3g} ({rise:.0f})" if rise else "0"

    assert rows == {str(i): [cell(i, p) for p in ("start", "delimiter", "other")] for i in range(6)}
    assert (rows["0"], rows["2"]) == (["2.15 (50)", "0", "0"], ["2.15 (50)", "1.25 (29)", "0"])
    widest = page.evaluate("[...document.querySelectorAll('#positionBody tr:nth-child(3) i')].map(i => i.style.width)")
    assert [float(w.rstrip("%")) for w in widest] == pytest.approx([92, 92 * 29 / 50, 0], abs=0.1)
    assert page.errors == []


def test_layers_without_massive_activations_are_summed_up(browser, serve):
    page = opened(browser, serve([Model(layers=6)]).url)
    assert [row[0] for row in table(page, "positionBox")] == ["layer", "2"]
    assert text(page, "positionNote").endswith("None in layer 0, 1, 3, 4, 5.")
    assert page.errors == []


def test_no_massive_activation_is_told_from_not_having_looked(browser, serve):
    quiet = Model(layers=1, gate=False, quiet=range(STEPS))
    assert text(opened(browser, serve([quiet], 5).url), "positionEmpty") == (
        "No token was looked at in this span: nothing is known."
    )


def test_without_massive_activations_the_tokens_are_named(browser, serve):
    page = opened(browser, serve([Model(layers=1)], 5).url)
    assert text(page, "positionEmpty").startswith("No massive activation in this span. 624 tokens looked at in 8.0 s")
    made = serve([], 1)
    write(made.folder, info(), {series("attention_sink_mass", layer="000"): 0.5})
    (made.folder / "0-pp0-tp0.snapshot").touch()
    made.history._engines.clear()
    made.history.record()
    page = opened(browser, made.url)
    page.wait_for("document.getElementById('positionEmpty').innerText.includes('not installed')")


def test_quantization_and_the_baseline_appear_where_they_are_measured(browser, serve):
    model = Model(layers=6, switch_steps=(60,), quantization=True, baseline=True)
    page = opened(browser, serve([model]).url)
    written = model.values(STEPS - 1)
    rows = {row[0]: row[1:] for row in table(page, "quantizationBox")[1:]}
    assert list(rows) == [
        "FP8 E4M3, no scale",
        "FP8 E4M3, scale per tensor",
        "INT8, scale per tensor",
        "INT8, scale per token",
        "INT8, static scale",
        "as served",
    ]

    def worst(metric: str, form: str, scale: str) -> tuple[float, int, str]:
        return min(
            (written[series(metric, layer=layer_label(i), site=site, format=form, scale=scale)], i, site)
            for i in range(6)
            for site in SITES
        )

    least, layer, at = worst("quantization_headroom_ratio", "fp8_e4m3", "none")
    assert least < 1
    assert rows["FP8 E4M3, no scale"] == [f"{number(least)} × layer {layer}, {at}", "–"]
    assert page.evaluate("document.querySelector('#quantizationBody td span').className") == "warn"
    decibels, layer, at = worst("quantization_snr_decibels", "int8", "per_token")
    assert rows["INT8, scale per token"] == ["–", f"{decibels:.1f} dB layer {layer}, {at}"]
    assert text(page, "clipped").endswith("hidden 0.0020 %, attention input 0.0020 %, mlp input 0.0020 %.") or (
        # A counter that did not rise in the span clips nothing.
        text(page, "clipped") == ""
    )
    assert texts(page, "#format option") == ["FP8 E4M3, no scale", "INT8, static scale", "as served"]
    assert tiles(page)["Headroom"].split("\n\n")[0].startswith("Headroom")
    head, *layers = table(page)
    assert head[-1] == "headroom"
    most = [FORMATS["fp8_e4m3", "none"] / v for v in of(model, "activation_abs_max")]
    assert [row[-1] for row in layers] == list(map(number, most))
    choose(page, "format", "int8:static")
    page.wait_for("document.querySelector('[data-key=quantization_headroom_ratio] b').innerText.includes('INT8')")
    most = [FORMATS["int8", "static"] / v for v in of(model, "activation_abs_max")]
    assert [row[-1] for row in table(page)[1:]] == list(map(number, most))

    usual = of(model, "baseline_activation_abs_max")
    marks = page.evaluate("[...document.querySelectorAll('#body td:nth-child(2) b')].map(b => b.title)")
    assert marks == [f"baseline {number(v)}" for v in usual]
    assert "a line marks the baseline" in page.evaluate("document.body.innerText")
    assert "baseline there 0.500" in tiles(page)["Strongest sink"]
    assert page.errors == []


def test_the_time_range_decides_how_far_back_the_page_looks(browser, serve):
    # Three hours of points that are further apart than the page's usual ones, which are quick to write.
    settings = Live(period_seconds=30.0)
    model = Model(layers=3, switch_steps=(40, 345))
    page = opened(browser, serve([model], 360, settings).url)
    assert len(texts(page, "#switches li")) == 1
    assert page.evaluate("document.querySelector('input[name=span]:checked').value") == "900"
    page.click("input[value='10800'] + span")
    page.wait_for("document.querySelectorAll('#switches li').length === 2")
    assert text(page, "positionEmpty") == "" and "in 3 h" in text(page, "positionNote")
    ticks = texts(page, "#axis span")
    assert len(ticks) > 8 and all(tick.endswith(("00", "15", "30", "45")) for tick in ticks)
    assert page.evaluate("location.hash").startswith("#span=10800&show=overview")
    # A link shows another person the same.
    other = opened(browser, page.evaluate("location.href").replace("overview", "attention_sink_mass"))
    assert other.evaluate("document.querySelector('input[name=span]:checked').value") == "10800"
    assert other.evaluate("[...document.querySelectorAll('figure')].map(f => f.dataset.key)") == ["attention_sink_mass"]
    assert page.errors == other.errors == []


def test_only_the_time_that_the_server_keeps_is_offered(browser, serve):
    page = opened(browser, serve([Model(layers=2)], 5, Live(history_seconds=3600.0)).url)
    assert texts(page, "#spans label:not([hidden])") == ["15 min", "1 h"]


def test_what_is_wrong_is_said_in_words_the_worst_first(browser, serve):
    made = serve([Model(layers=3, nonfinite_layer=1)], 3)
    write(
        made.folder,
        info("pp0-tp1"),
        {
            series("generation", rank="pp0-tp1", kind="desired"): 4.0,
            series("generation", rank="pp0-tp1", kind="applied"): 3.0,
            series("engine_paused"): 1.0,
            series("config_file_good"): 0.0,
            series("config_restart_needed"): 2.0,
            series("probe_errors_total", probe="attention"): 5.0,
            series("nonfinite_total", layer="001"): 9.0,
        },
    )
    made.history.record()
    page = opened(browser, made.url)
    page.wait_for("document.querySelectorAll('#status p').length === 6")
    assert texts(page, "#status p") == [
        "Problem: 9 NaN or infinite values in layer 1; 6 of them in this span.",
        "Problem: Generation is paused: by a switch under way, or by somebody else.",
        "Problem: Not in the state that was asked for: pp0-tp1.",
        "Warning: The attention probe failed 5 times; its numbers may be missing. See the server log.",
        "Warning: The configuration file cannot be used; the last good state stays. See the server log.",
        "Note: 2 changed settings wait for a restart.",
    ]
    assert page.evaluate("document.getElementById('status').className") == "bad"
    assert "in layer 1" in tiles(page)["Non-finite"]
    assert page.errors == []


def test_a_calm_server_says_so(browser, serve):
    page = opened(browser, serve([Model(layers=2)], 5).url)
    assert text(page, "status").startswith("No problem seen: nothing non-finite")


def test_new_points_arrive_without_taking_a_selection_away(browser, serve):
    model = Model(layers=2)
    made = serve([model], 10)
    page = opened(browser, made.url)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#body td span'))")
    page.evaluate("window.kept = document.querySelector('#body td')")
    model.write(made.folder, 5000)
    made.history.record()
    page.wait_for("document.body.innerText.includes('600,007')")
    assert page.evaluate("getSelection().toString()").strip() != ""
    assert page.evaluate("kept.isConnected")
    assert page.errors == []
