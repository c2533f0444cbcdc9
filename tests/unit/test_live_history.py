"""The ring buffer behind the live page, over snapshot files as workers write them."""

from __future__ import annotations

import json
import math
import threading
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.live.synthetic import Model, info, series, write
from vllm_sluice.config import Live
from vllm_sluice.live import encode, point
from vllm_sluice.live.column import OLDER_POINTS, RECENT_POINTS, Column, Resolution
from vllm_sluice.live.history import History
from vllm_sluice.telemetry.catalogue import BY_NAME
from vllm_sluice.telemetry.collector import Sample, SnapshotCollector

LIVE = Live(history_seconds=60.0, period_seconds=2.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(tmp_path: Path, clock: Clock) -> History:
    return History(SnapshotCollector(tmp_path), LIVE, clock=clock)


def record(history: History, clock: Clock, times: int = 1) -> None:
    for _ in range(times):
        clock.now += 2.0
        history.record()


def answer(history: History, **arguments) -> dict:
    return json.loads(history.as_json(**arguments))


def only_engine(history: History, **arguments) -> dict:
    (engine,) = answer(history, **arguments)["engines"]
    return engine


def test_every_metric_is_in_the_catalogue():
    for kept in (*point.LAYERED, *point.SERIES):
        about = BY_NAME.get(f"sluice_{kept.metric}")
        if about is None:
            # Named here, so that a misspelt metric is noticed: what another part may or may not export.
            assert kept.metric.startswith(("baseline_", "quantization_")), kept
        else:
            assert {*kept.by, "layer"} - {"layer"} <= set(about.labels), kept
            assert ("layer" in about.labels) or kept not in point.LAYERED, kept


def test_without_snapshots_there_are_points_but_no_engines(history, clock):
    record(history, clock, 3)
    assert answer(history)["engines"] == []
    assert len(answer(history)["times"]) == 3


def test_a_point_holds_what_was_written(history, clock, tmp_path):
    model = Model(layers=3)
    model.write(tmp_path, 5)
    record(history, clock)
    written = model.values(5)
    engine = only_engine(history)
    assert engine["model_name"] == "sluice/twin-32"
    assert engine["info"] == {"version": "0.1.0", "vllm_version": "0.32.0", "fingerprint": "3f9ac01be5d27714"}
    assert engine["layers"] == ["000", "001", "002"]
    for metric in point.LAYER_METRICS:
        found = engine["rows"][metric][-1]
        assert found == pytest.approx([written[series(metric, layer=f"00{i}")] for i in range(3)], rel=1e-4)
        assert engine["latest"][metric] == found
    assert engine["latest"]["activation_top_channel"] == [
        written[series("activation_top_channel", layer=f"00{i}", rank="1")] for i in range(3)
    ]
    assert engine["series"]["tokens_observed_total"] == {"decode": [183], "prefill": [607]}
    assert engine["series"]["patch_enabled"] == {"gate": [1]}
    assert engine["series"]["nonfinite_total"] == {"all": [0]}
    assert engine["series"]["probe_errors_total"] == {"attention": [0], "residual": [0]}
    assert 0 <= engine["series"]["snapshot_age_seconds"]["pp0-tp0"][0] < 60


def test_counters_are_summed_over_layers_and_kept_per_layer(history, clock, tmp_path):
    write(
        tmp_path,
        info(),
        {
            series("nonfinite_total", layer="000"): 2.0,
            series("nonfinite_total", layer="001"): 3_000_000_001.0,
            series("massive_activations_total", layer="000", position="start"): 4.0,
            series("massive_activations_total", layer="001", position="start"): 5.0,
            series("massive_activations_total", layer="001", position="other"): 6.0,
        },
    )
    record(history, clock)
    engine = only_engine(history)
    assert engine["series"]["nonfinite_total"] == {"all": [3_000_000_003]}
    assert engine["series"]["massive_activations_total"] == {"other": [6], "start": [9]}
    assert engine["latest"]["nonfinite_total"] == [2, 3_000_000_001]
    assert engine["latest"]["massive_activations_total"] == [4, 11]


def test_absent_values_are_null_and_an_idle_window_is_an_empty_row(history, clock, tmp_path):
    values = {series("activation_abs_max", layer=f"00{i}"): v for i, v in enumerate((1.0, math.nan, 3.0))}
    writer = write(tmp_path, info(), {**values, series("gate_mean", layer="001"): math.nan})
    record(history, clock)
    writer.write(np.full(4, math.nan))
    record(history, clock)
    engine = only_engine(history)
    layers = engine["layers"]
    first = dict(zip(layers, engine["rows"]["activation_abs_max"][0], strict=False))
    assert (first["000"], first.get("001"), first["002"]) == (1, None, 3)
    assert engine["rows"]["activation_abs_max"][1] == []
    assert engine["rows"]["gate_mean"] == [[], []]


def test_infinity_survives_the_way_through_json(history, clock, tmp_path):
    write(tmp_path, info(), {series("activation_abs_max", layer="000"): math.inf})
    record(history, clock)
    assert "1e999" in history.as_json()
    assert only_engine(history)["rows"]["activation_abs_max"] == [[math.inf]]


def test_ranks_of_an_engine_are_combined_and_engines_kept_apart(history, clock, tmp_path):
    for engine, model in (("0", "a"), ("1", "b"), ("10", "c")):
        for rank in (0, 1):
            about = info(f"pp0-tp{rank}", engine, model)
            values = {
                series("activation_abs_max", layer="000"): 10.0 + rank,
                series("attention_sink_heads", layer="000"): 2.0,
                series("attention_sink_mass", layer="000"): 0.2 + 0.4 * rank,
            }
            write(tmp_path, about, values)
    record(history, clock)
    everything = answer(history)
    assert everything["names"] == ["0", "1", "10"]
    assert [e["model_name"] for e in everything["engines"]] == ["a", "b", "c"]
    chosen = only_engine(history, engine="1")
    assert chosen["engine"] == "1"
    assert chosen["rows"]["activation_abs_max"] == [[11]]
    assert chosen["rows"]["attention_sink_heads"] == [[4]]
    assert chosen["rows"]["attention_sink_mass"] == [[pytest.approx(0.4)]]
    assert set(chosen["series"]["snapshot_age_seconds"]) == {"pp0-tp0", "pp0-tp1"}
    assert len(answer(history, engine="no such")["engines"]) == 3


def test_a_pipeline_stage_that_comes_later_adds_layers_at_the_end(history, clock, tmp_path):
    write(tmp_path, info("pp1-tp0"), {series("activation_abs_max", layer="002"): 2.0})
    record(history, clock)
    write(
        tmp_path,
        info("pp0-tp0"),
        {series("activation_abs_max", layer="000"): 1.0, series("tokens_observed_total", phase="decode"): 7.0},
    )
    record(history, clock)
    engine = only_engine(history)
    assert engine["layers"] == ["002", "000"]
    assert engine["rows"]["activation_abs_max"] == [[2], [2, 1]]
    assert engine["series"]["tokens_observed_total"] == {"decode": [None, 7]}
    assert engine["series"]["snapshot_age_seconds"]["pp0-tp0"][0] is None


def test_a_rank_that_is_gone_is_null_and_forgotten_with_its_last_point(history, clock, tmp_path):
    for rank in ("pp0-tp0", "pp0-tp1"):
        write(tmp_path, info(rank), {series("activation_abs_max", layer="000"): 1.0})
    record(history, clock)
    (tmp_path / "0-pp0-tp1.snapshot").unlink()
    record(history, clock)
    assert only_engine(history)["series"]["snapshot_age_seconds"]["pp0-tp1"][1] is None
    record(history, clock, 30)
    assert set(only_engine(history)["series"]["snapshot_age_seconds"]) == {"pp0-tp0"}


def test_an_engine_that_is_gone_leaves_with_its_last_point(history, clock, tmp_path):
    write(tmp_path, info(), {series("activation_abs_max", layer="000"): 1.0})
    record(history, clock)
    (tmp_path / "0-pp0-tp0.snapshot").unlink()
    record(history, clock)
    engine = only_engine(history)
    assert engine["rows"]["activation_abs_max"] == [[1], []]
    assert engine["latest"]["activation_abs_max"] == []
    record(history, clock, 30)
    assert answer(history)["names"] == []


def test_memory_is_bounded(history, clock, tmp_path):
    write(tmp_path, info(), {series("activation_abs_max", layer="000"): 1.0})
    record(history, clock, 100)
    found = answer(history)
    assert len(found["times"]) == 30
    assert found["times"][-1] == clock.now
    assert len(found["engines"][0]["rows"]["activation_abs_max"]) == 30


def test_since_and_points_select(history, clock, tmp_path):
    model = Model(layers=1, gate=False)
    for step in range(20):
        model.write(tmp_path, step)
        record(history, clock)
    everything = answer(history)
    times = everything["times"]
    assert answer(history, since=times[14])["times"] == times[15:]
    assert answer(history, since=times[-1])["times"] == []
    assert answer(history, since=-7.0)["times"] == times[-4:]
    assert answer(history, since=times[-1] + 9)["times"] == []
    thin = answer(history, points=7)
    assert thin["step"] == 4
    assert thin["spacing_seconds"] == 8
    chosen = [i for i, t in enumerate(times) if i in (0, 19) or t // 8 != times[i - 1] // 8]
    assert len(chosen) <= 7
    assert thin["times"] == [times[i] for i in chosen]
    assert thin["provisional"] == (times[19] // 8 == times[18] // 8)
    tokens = everything["engines"][0]["series"]["tokens_observed_total"]["prefill"]
    assert thin["engines"][0]["series"]["tokens_observed_total"]["prefill"] == [tokens[i] for i in chosen]
    few = only_engine(history, metrics=["attention_sink_mass"])
    assert list(few["rows"]) == ["attention_sink_mass"]
    assert len(few["latest"]["activation_abs_max"]) == 1


def test_an_incremental_reader_sees_every_point_once(history, clock, tmp_path):
    write(tmp_path, info(), {series("activation_abs_max", layer="000"): 1.0})
    seen: list[float] = []
    for _ in range(10):
        clock.now += 1.2345
        history.record()
        seen += answer(history, since=seen[-1] if seen else None)["times"]
    assert seen == answer(history)["times"]


def test_a_thinned_reader_that_goes_on_gets_what_it_would_get_at_once(history, clock, tmp_path):
    write(tmp_path, info(), {series("activation_abs_max", layer="000"): 1.0})
    seen: list[float] = []
    provisional = False
    for _ in range(25):
        record(history, clock)
        found = answer(history, since=seen[-1] if seen else None, step=4)
        if found["times"] and provisional:
            seen.pop()
        seen += found["times"]
        provisional = found["provisional"]
        assert seen[-1] == clock.now
    assert seen == answer(history, step=4)["times"]
    assert len(seen) <= 8


@pytest.mark.parametrize(("seconds", "period"), [(60, 2.0), (900, 2.0), (3600, 2.0), (10_800, 2.0), (21_600, 0.5)])
def test_how_many_points_are_kept_and_how_far_apart(seconds, period):
    resolution = Resolution.of(seconds, period)
    times: Column[float] = Column(resolution)
    for i in range(round(1.5 * seconds / period)):
        gone, before = times.next_out, times.last_older
        keep = gone is not None and (before is None or resolution.begins(gone, before, resolution.stride))
        times.append(1e9 + i * period, keep)
    kept = times.values()
    assert len(kept) <= RECENT_POINTS + OLDER_POINTS
    assert kept[-1] - kept[0] == pytest.approx(seconds, abs=2 * resolution.stride * period + period)
    gaps = [round(b - a, 3) for a, b in pairwise(kept)]
    assert set(gaps[1 - resolution.recent :]) == {period}
    assert max(gaps) == period * resolution.stride < 60


def test_the_last_three_hours_are_the_default():
    assert Live().history_seconds == 3 * 3600
    assert Resolution.of(3 * 3600, 2.0) == Resolution(2.0, 450, 619, 8)


def test_older_points_are_thinner_and_a_column_that_began_later_stays_aligned(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("vllm_sluice.live.column.RECENT_POINTS", 10)
    monkeypatch.setattr("vllm_sluice.live.column.OLDER_POINTS", 5)
    history = History(SnapshotCollector(tmp_path), Live(history_seconds=100.0, period_seconds=2.0), clock=clock)
    clock.now = 1_700_000_000.0
    begun = clock.now
    for step in range(45):
        values = {series("activation_abs_max", layer="000"): float(step)}
        if step >= 30:
            values[series("gate_mean", layer="000")] = step / 100
        write(tmp_path, info(), values)
        record(history, clock)
    found = answer(history)
    steps = [round((t - begun) / 2) - 1 for t in found["times"]]
    assert steps[-10:] == list(range(35, 45))
    assert steps[:-10] == [0, 7, 15, 23, 31]
    assert found["spacing_seconds"] == 16
    rows = found["engines"][0]["rows"]
    assert [row[0] for row in rows["activation_abs_max"]] == steps
    assert list(rows["gate_mean"]) == [[s / 100] if s >= 30 else [] for s in steps]


def test_every_switch_is_remembered_also_between_the_points_that_are_kept(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("vllm_sluice.live.column.RECENT_POINTS", 2)
    monkeypatch.setattr("vllm_sluice.live.column.OLDER_POINTS", 2)
    history = History(SnapshotCollector(tmp_path), LIVE, clock=clock)
    start = clock.now = 1_700_000_000.33
    # Changes at 5.2 s and 9.1 s by the patch's own clock; back and forth between two points at 12.5 s and 13 s.
    # The last one, of 15.5 s, is first seen at 18 s: a reader who was there at 16 s has to get it.
    states = [(1, 0), (1, 0), (0, 5.2), (0, 5.2), (1, 9.1), (1, 9.1), (1, 13.0), (1, 13.0), (0, 15.5)]
    for step, (on, changed) in enumerate(states):
        values = {
            series("patch_enabled", patch="gate"): float(on),
            series("generation", rank="pp0-tp0", kind="applied"): float(step),
            series("generation", rank="pp0-tp0", kind="desired"): 99.0,
        }
        if changed:
            values[series("patch_last_change_timestamp_seconds", patch="gate")] = start + changed
        write(tmp_path, info(), values)
        record(history, clock)
    found = answer(history)
    switches = [(5.2, False, 2), (9.1, True, 4), (13.0, True, 6), (16.0, False, 8)]
    expected = [[round(start + after, 2), "gate", on, generation] for after, on, generation in switches]
    assert found["engines"][0]["switches"] == expected
    assert len(found["times"]) < 9
    assert only_engine(history, since=start + 16.0)["switches"] == expected[3:]
    # A reader who asks again gets each switch once, with the point that showed it.
    assert only_engine(history, since=start + 10.0)["switches"] == expected[2:]
    assert only_engine(history, since=clock.now)["switches"] == []


def test_by_how_much_counters_rose(history, clock, tmp_path):
    for step in range(10):
        write(
            tmp_path,
            info(),
            {
                series("tokens_observed_total", phase="decode"): 100.0 + 7 * step,
                series("tokens_observed_total", phase="prefill"): 50.0 if step < 8 else 3.0,  # began anew
                series("massive_activations_total", layer="000", position="start"): 2.0 * step,
                series("massive_activations_total", layer="001", position="start"): 5.0,
                series("massive_activations_total", layer="001", position="other"): 1.0 * step,
                series("activation_abs_max", layer="000"): 9.0,
            },
        )
        record(history, clock)
    rose = only_engine(history, span=8.5)["increase"]
    assert rose["seconds"] == 8
    assert rose["rows"] == {
        "massive_activations_total:start": [8, 0],
        "massive_activations_total:other": [None, 4],
    }
    assert rose["series"]["tokens_observed_total"] == {"decode": 28, "prefill": 3}
    assert "increase" not in only_engine(history)
    assert only_engine(history, span=0.001)["increase"]["seconds"] == 0


def test_quantization_is_kept_where_it_is_measured(history, clock, tmp_path, monkeypatch):
    model = Model(layers=2, quantization=True, baseline=True)
    model.write(tmp_path, 1)
    record(history, clock)
    written = model.values(1)

    def headroom(site: str, layer: int) -> float:
        labels = {"site": site, "format": "fp8_e4m3", "scale": "none"}
        return written[series("quantization_headroom_ratio", layer=f"00{layer}", **labels)]

    row = "quantization_headroom_ratio:fp8_e4m3:none"
    engine = only_engine(history, metrics=[row])
    assert list(engine["rows"]) == [row]
    assert row in engine["kept"]
    assert "quantization_snr_decibels:int8:per_token" not in engine["kept"]
    tightest = [min(headroom(s, i) for s in ("hidden", "attention_input", "mlp_input")) for i in (0, 1)]
    assert engine["rows"][row] == [pytest.approx(tightest, rel=1e-4)]
    assert engine["latest"][f"{row}:mlp_input"] == pytest.approx([headroom("mlp_input", i) for i in (0, 1)], rel=1e-4)
    assert len(engine["latest"]["quantization_snr_decibels:int8:per_token:hidden"]) == 2
    assert engine["series"]["quantization_clipped_total"]["hidden"] == [40]
    assert len(only_engine(history, metrics=["quantization_headroom_ratio"])["rows"]) == 3
    # Neither the baseline nor a counter makes an idle engine look busy.
    assert set(engine["baseline"]) == {
        "baseline_activation_abs_max",
        "baseline_activation_max_to_median_ratio",
        "baseline_attention_sink_mass",
    }
    assert not any(key.startswith("baseline") or ":start" in key for key in engine["latest"])


def test_a_server_without_those_metrics_does_not_name_them(history, clock, tmp_path):
    Model(layers=2).write(tmp_path, 1)
    record(history, clock)
    assert "quantization" not in history.as_json()
    assert only_engine(history)["baseline"] == {}


def test_a_point_of_a_large_model_takes_little_memory():
    samples: list[Sample] = []

    class Source:
        def samples(self) -> list[Sample]:
            return samples

    now = [1e9]
    history = History(Source(), Live(), clock=lambda: now[0])
    common = (("model_name", "m"), ("engine", "0"))
    written = [Sample(s.metric, (*common, *s.labels), v) for s, v in Model(layers=80).values(0).items()]
    kept = []
    tracemalloc.start()
    try:
        for step in range(60):
            now[0] += 2.0
            samples = [Sample(s.metric, s.labels, s.value * (1 + 1e-4 * step)) for s in written]
            history.record()
            kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # Three hours keep 1,069 points: 12 MB at most for 80 layers.
    assert 3_000 < (kept[-1] - kept[9]) / 50 < 11_000
    maps = ["activation_max_to_median_ratio", "attention_sink_mass", "gate_mean"]
    assert len(history.as_json(metrics=maps, span=10_800)) < 60 * 2_200 + 20_000
    assert len(history.as_json(since=now[0] - 2.5, metrics=maps, span=10_800)) < 20_000


def test_a_clock_set_back_begins_anew(history, clock, tmp_path):
    write(tmp_path, info(), {series("activation_abs_max", layer="000"): 1.0})
    record(history, clock, 5)
    clock.now -= 3600
    record(history, clock)
    assert answer(history)["times"] == [clock.now]
    assert only_engine(history)["rows"]["activation_abs_max"] == [[1]]


def test_stale_limit_follows_the_snapshot_interval(tmp_path):
    collector = SnapshotCollector(tmp_path)
    assert answer(History(collector, LIVE))["stale_after_seconds"] == 10
    assert answer(History(collector, LIVE, interval_seconds=30.0))["stale_after_seconds"] == 90


def test_reading_while_recording(history, clock, tmp_path):
    model = Model(layers=8)
    model.write(tmp_path, 0)
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                for engine in answer(history, points=5)["engines"]:
                    lengths = {len(rows) for rows in engine["rows"].values()}
                    lengths |= {len(v) for labels in engine["series"].values() for v in labels.values()}
                    assert len(lengths) == 1
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    record(history, clock, 60)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []


# Within the last 1e-5 below the largest double, five digits round up to infinity. Hidden states end at 3.4e38.
@given(st.floats(-1e308, 1e308) | st.sampled_from([math.nan, math.inf, -math.inf]))
def test_numbers_are_valid_json_with_five_digits(value):
    found = json.loads(encode.number(value))
    if math.isnan(value):
        assert found is None
    else:
        assert found == pytest.approx(value, rel=1e-4, abs=0)


@given(st.integers(min_value=0, max_value=10**14))
def test_counts_are_exact(value):
    assert json.loads(encode.number(float(value))) == value
