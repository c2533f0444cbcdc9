"""The catalogue of metrics: its names, its page in the docs, its budget, and what a collector makes of snapshots."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT, need_program
from vllm_sluice.commands import metrics_docs
from vllm_sluice.telemetry.catalogue import BY_NAME, CATALOGUE, COMMON_LABELS, OPTIONAL_GROUPS, layer_label
from vllm_sluice.telemetry.collector import SnapshotCollector
from vllm_sluice.telemetry.snapshot import SUFFIX, RankInfo, Series, SnapshotWriter

BUDGET = 12
QUANTIZATION_BUDGET = 36
LABEL_VALUES = {
    "layer": ("000", "001"),
    "rank": ("1", "2", "3"),
    "position": ("start", "delimiter", "other"),
    "phase": ("prefill", "decode"),
    "patch": ("gate",),
    "probe": ("residual", "attention", "gate", "quantization"),
    "baseline": ("0123456789ab",),
    "patches": ("gate=1",),
    "kind": ("desired", "applied"),
    "result": ("applied", "rolled_back", "failed", "tried"),
    "group": ("rest", "canary"),
    "parameter": ("temperature", "floor"),
}
FROM_THE_COLLECTOR = ("sluice_info", "sluice_snapshot_age_seconds", "sluice_exported_series")


def info(rank: str = "pp0-tp0", engine: str = "0") -> RankInfo:
    return RankInfo(os.getpid(), rank, engine, "twin", "0.1.0", "0.32.0", "abc")


def every_series() -> list[Series]:
    """Every series that a rank can write, with all values of its labels."""
    named = []
    for metric in CATALOGUE:
        if metric.name not in FROM_THE_COLLECTOR:
            if "layer" in metric.labels:
                sets = metrics_docs.label_sets(metric, LABEL_VALUES["layer"])
            else:
                values = [LABEL_VALUES[label] for label in metric.labels]
                sets = [dict(zip(metric.labels, chosen, strict=True)) for chosen in itertools.product(*values)]
            named += [Series(metric.name, tuple(labels.items())) for labels in sets]
    return named


@pytest.fixture
def write(tmp_path):
    """Write snapshots of ranks; return what a scrape shows as {name: {labels: value}}."""
    writers = []

    def snapshot(series: list[Series], values, who: RankInfo | None = None) -> Path:
        who = who or info()
        writer = SnapshotWriter(tmp_path / f"dp{who.engine}-{who.rank}{SUFFIX}", who, series)
        writer.write(np.asarray(values, np.float64))
        writers.append(writer)
        return tmp_path

    return snapshot


def exposition(folder: Path, detail="standard") -> str:
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(folder, detail))
    return generate_latest(registry).decode()


def scraped(folder: Path, detail="full") -> dict[str, dict[frozenset, float]]:
    found: dict[str, dict[frozenset, float]] = {}
    for family in text_string_to_metric_families(exposition(folder, detail)):
        for sample in family.samples:
            labels = frozenset((k, v) for k, v in sample.labels.items() if k != "model_name")
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name} appears twice with {labels}"
            found[sample.name][labels] = sample.value
    return found


def key(**labels: str) -> frozenset:
    return frozenset({"engine": "0", **labels}.items())


# ---------------------------------------------------------------------------------------------- the table itself
def test_names_follow_prometheus():
    """Lower case without colons, counters end in `_total` and nothing else does, base units spelled out."""
    assert len(BY_NAME) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert re.fullmatch(r"sluice_[a-z0-9]+(_[a-z0-9]+)*", metric.name)
        assert metric.name.endswith("_total") is (metric.kind == "counter")
        assert not re.search(r"_(count|sum|bucket|ms|milliseconds|percent|gauge|counter)(_|$)", metric.name)
        assert ("_seconds" in metric.name) is (metric.unit == "seconds")
        if metric.name.removesuffix("_total").endswith("_ratio"):
            assert metric.unit == "1"
        for label in metric.labels:
            assert re.fullmatch(r"[a-z]+(_[a-z]+)*", label)
            assert label not in COMMON_LABELS


def test_help_is_one_sentence():
    for metric in CATALOGUE:
        assert metric.help.endswith("."), metric.name
        assert "\n" not in metric.help
        assert len(metric.help) <= 120, metric.name


def test_only_the_window_can_fall_silent():
    for metric in CATALOGUE:
        measured = metric.group in ("residual", "attention", "gate", "quantization")
        assert metric.windowed is (metric.kind == "gauge" and measured)


def test_a_layer_costs_at_most_the_budget_by_default():
    assert metrics_docs.series_per_layer("standard") <= BUDGET
    assert metrics_docs.series_per_layer("full") >= metrics_docs.series_per_layer("standard")
    assert metrics_docs.series_per_layer("full", "quantization") == QUANTIZATION_BUDGET
    assert metrics_docs.series_per_layer("full", "baseline") == 3


def test_layers_sort_as_text():
    labels = [layer_label(layer) for layer in range(120)]
    assert labels == sorted(labels)


# ---------------------------------------------------------------------------------------------- the page
def test_the_page_in_the_docs_is_current():
    metrics_docs.check(ROOT / "docs" / "metrics.md", metrics_docs.page())


def test_the_page_has_one_row_a_metric_and_explains_every_label():
    page = metrics_docs.page()
    for metric in CATALOGUE:
        assert page.count(f"\n| `{metric.name}` |") == 1
        for label in (*COMMON_LABELS, *metric.labels):
            is_info = metric.name == "sluice_info"
            assert f"`{label}`" in page.split("## Hidden states")[0] or is_info
    assert len({line.count("|") for line in page.splitlines() if line.startswith("| `sluice_")}) == 1


# ---------------------------------------------------------------------------------------------- the exposition
@pytest.mark.parametrize("detail", ["standard", "full"])
def test_the_real_exposition_passes_promtool(write, detail):
    promtool = need_program("promtool", "prometheus")
    series = every_series()
    text = exposition(write(series, np.linspace(0.5, 3.0, len(series))), detail)
    for metric in CATALOGUE:
        assert (f"\n# HELP {metric.name} {metric.help}\n" in "\n" + text) is (
            detail == "full" or metric.detail == "standard"
        )
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_by_default_a_layer_has_the_series_that_the_docs_promise(write):
    series = every_series()
    folder = write(series, np.ones(len(series)))
    for detail in ("standard", "full"):
        labelled = [labels for samples in scraped(folder, detail).values() for labels in samples]
        promised = sum(metrics_docs.series_per_layer(detail, group) for group in (None, *OPTIONAL_GROUPS))
        assert sum(("layer", "001") in labels for labels in labelled) == promised


def test_exported_series_counts_what_is_exported(write):
    series = every_series()
    folder = write(series, np.ones(len(series)))
    for detail in ("standard", "full"):
        found = scraped(folder, detail)
        assert found["sluice_exported_series"][key()] == sum(len(samples) for samples in found.values())


def test_what_has_nothing_to_report_is_left_out(write):
    series = [Series("sluice_activation_abs_max", (("layer", layer),)) for layer in ("000", "001")]
    found = scraped(write(series, [np.nan, 2.0]))
    assert found["sluice_activation_abs_max"] == {key(layer="001"): 2.0}


def test_ranks_of_one_engine_are_combined_as_the_catalogue_says(write):
    series = [s for s in every_series() if dict(s.labels).get("layer", "000") == "000"]
    write(series, np.full(len(series), 1.0), info("pp0-tp0"))
    folder = write(series, np.full(len(series), 3.0), info("pp0-tp1"))
    found = scraped(folder)
    for one in series:
        expected = {"max": 3.0, "min": 1.0, "sum": 4.0, "mean": 2.0}[BY_NAME[one.metric].combine]
        assert found[one.metric][key(**dict(one.labels))] == expected, one


def test_stages_of_a_pipeline_add_their_layers(write):
    write([Series("sluice_activation_abs_max", (("layer", "000"),))], [1.0], info("pp0-tp0"))
    folder = write([Series("sluice_activation_abs_max", (("layer", "001"),))], [2.0], info("pp1-tp0"))
    assert scraped(folder)["sluice_activation_abs_max"] == {key(layer="000"): 1.0, key(layer="001"): 2.0}


def test_engines_stay_apart(write):
    series = [Series("sluice_activation_abs_max", (("layer", "000"),))]
    write(series, [1.0], info(engine="0"))
    found = scraped(write(series, [2.0], info(engine="1")))
    assert found["sluice_activation_abs_max"] == {key(layer="000"): 1.0, key(engine="1", layer="000"): 2.0}
    assert len(found["sluice_exported_series"]) == 2


def test_every_rank_shows_its_age(write):
    write([], [], info("pp0-tp0"))
    found = scraped(write([], [], info("pp0-tp1")))
    ages = found["sluice_snapshot_age_seconds"]
    assert set(ages) == {key(rank="pp0-tp0"), key(rank="pp0-tp1")}
    assert all(0 <= age < 60 for age in ages.values())


def test_a_rank_whose_process_is_gone_disappears(write):
    ended = subprocess.Popen(["true"])
    ended.wait()
    who = info()
    gone = RankInfo(ended.pid, "pp0-tp1", who.engine, who.model_name, who.version, who.vllm_version, who.fingerprint)
    series = [Series("sluice_activation_abs_max", (("layer", "000"),))]
    write(series, [9.0], gone)
    assert scraped(write(series, [1.0], who))["sluice_activation_abs_max"] == {key(layer="000"): 1.0}
