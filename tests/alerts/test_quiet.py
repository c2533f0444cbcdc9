"""What happens to every server must alert nobody: a failed scrape, a restart, a replacement, an idle hour.

And must hide nothing: a fault is noticed although scrapes fail, and although requests come one minute in five.

promtool plays hours of a healthy server's whole catalogue through all rules. `stale` is the marker that Prometheus
writes when a scrape fails or a series is no longer there, so that what vanishes does so at once, as in production.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.alerts.rules import RULES, alerts
from tests.conftest import need_program
from vllm_sluice.telemetry.catalogue import CATALOGUE, Metric

STEP = 30
"""Seconds between two scrapes."""
WINDOW = 60
"""Seconds that windowed series outlive the last token."""
EVENT = 7 * 3600
"""When it happens, late enough for the rule that looks back 6 hours."""
END = 10 * 3600
LONG_AGO = 100_000
"""Age in seconds of a server that runs at the start of a history."""

VALUES: dict[str, tuple[str, ...]] = {
    "layer": ("000", "001", "002"), "rank": ("pp0-tp0", "pp0-tp1"), "position": ("start", "other"),
    "phase": ("decode",),
    "site": ("hidden",), "format": ("int8",), "scale": ("static",), "patch": ("gate",), "probe": ("residual",),
    "result": ("applied",), "kind": ("desired", "applied"), "version": ("0.1.0",), "vllm_version": ("0.32.0",),
    "fingerprint": ("f",), "baseline": ("b",), "patches": ("gate",), "group": ("rest",),
    "parameter": ("temperature",),
}  # fmt: skip
GAUGES = {
    "activation_abs_max": 40.0, "activation_max_to_median_ratio": 90.0, "attention_sink_mass": 0.2,
    "baseline_activation_abs_max": 40.0, "baseline_activation_max_to_median_ratio": 90.0,
    "baseline_attention_sink_mass": 0.2, "serving_dtype_max": 65504.0, "engine_paused": 0.0,
    "config_restart_needed": 0.0,
    "probe_failed": 0.0, "telemetry_interval_seconds": 1.0, "patch_last_change_timestamp_seconds": -LONG_AGO,
}  # fmt: skip
"""A healthy server's values where 1 is not one."""
RATES = {
    "tokens_observed": 900.0, "start_tokens_observed": 30.0, "forward_seconds": 20.0, "probe_seconds": 0.4,
    "quantization_elements": 90_000.0, "quantization_clipped": 3.0,
}  # fmt: skip
"""What counters gain in a scrape; the others keep what a fault of long ago left in them."""
MASSIVE = {
    "activation_abs_max": 4000.0, "activation_max_to_median_ratio": 9000.0, "massive_activations": 30.0,
    "baseline_activation_abs_max": 4000.0, "baseline_activation_max_to_median_ratio": 9000.0,
}  # fmt: skip
"""What is different in a model with massive activations."""
OLD = {"nonfinite": 7.0, "massive_activations": 12.0, "probe_errors": 3.0}


@dataclasses.dataclass(frozen=True)
class Story:
    """When a server is scraped and busy, and how often it was started.

    Attributes
    ----------
    scraped, busy
        Whether the scrape at this second succeeds, and whether requests run then.
    started
        Second at which the process began that is scraped then; negative before the history.
    trial
        Whether the guard tries something then.
    massive
        Whether the model has massive activations from its first token on, and the baseline with it.
    """

    scraped: Callable[[int], bool] = lambda t: True
    busy: Callable[[int], bool] = lambda t: True
    started: Callable[[int], int] = lambda t: -LONG_AGO
    trial: Callable[[int], bool] = lambda t: False
    baseline: bool = True
    massive: bool = False
    instance: str = "a:8000"


def label_sets(metric: Metric) -> Iterator[dict[str, str]]:
    sets: list[dict[str, str]] = [{}]
    for label in metric.labels:
        values = ("1", "2", "3") if label == "rank" and "layer" in metric.labels else VALUES[label]
        sets = [{**one, label: value} for one in sets for value in values]
    yield from sets


def history(story: Story) -> list[dict[str, str]]:
    """Return the series of a story as promtool wants them."""
    own = {"job": "vllm", "instance": story.instance}
    model = {**own, "model_name": "org/model", "engine": "0"}
    times = range(0, END + STEP, STEP)
    series = [
        _series("up", own, [float(story.scraped(t)) for t in times]),
        _series("vllm:num_requests_running", model,
                [float(3 * story.busy(t)) if story.scraped(t) else None for t in times]),
    ]  # fmt: skip
    busy = list(_busy_scrapes(story, times))
    for metric in CATALOGUE:
        short = metric.name.removeprefix("sluice_").removesuffix("_total")
        measured_by_guard = short.startswith("guard_") and short != "guard_running"
        if measured_by_guard or (not story.baseline and _needs_baseline(short)):
            continue
        values = [_value(metric, short, story, t, scrapes) for t, scrapes in zip(times, busy, strict=True)]
        series += [_series(metric.name, {**model, **labels}, values) for labels in label_sets(metric)]
    return series


def _busy_scrapes(story: Story, times: range) -> Iterator[int]:
    """Yield how many scrapes of the process there were so far while requests ran, those before the history too."""
    count, began = 0, None
    for t in times:
        if story.started(t) != began:
            began = story.started(t)
            count = max(-began, 0) // STEP
        count += story.busy(t)
        yield count


def _value(metric: Metric, short: str, story: Story, t: int, busy_scrapes: int) -> float | None:
    if not story.scraped(t) or (metric.windowed and not any(story.busy(t - ago) for ago in range(0, WINDOW, STEP))):
        return None
    if short == "guard_running":
        return 1.0 if story.trial(t) else None
    began = story.started(t)
    special = MASSIVE if story.massive else {}
    if metric.kind == "counter":
        return special.get(short, RATES.get(short, 0.0)) * busy_scrapes + (OLD.get(short, 0.0) if began < 0 else 0.0)
    return float(began) if short == "start_timestamp_seconds" else special.get(short, GAUGES.get(short, 1.0))


def _needs_baseline(short: str) -> bool:
    return short.startswith("baseline_") or short in ("quantization_clipped", "quantization_headroom_ratio")


def _series(name: str, labels: dict[str, str], values: list[float | None]) -> dict[str, str]:
    """Write values; where they end, a stale marker and then nothing."""
    words, before = [], None
    for value in values:
        words.append(repr(value) if value is not None else "_" if before is None else "stale")
        before = value
    return {
        "series": name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}",
        "values": " ".join(words),
    }


def fired(folder: Path, *stories: Story) -> str:
    """Return what promtool says of alerts that these servers raise, or nothing."""
    test: dict[str, Any] = {
        "interval": f"{STEP}s",
        "input_series": [series for story in stories for series in history(story)],
        "promql_expr_test": [
            {"expr": 'count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[12h]))',
             "eval_time": f"{END}s", "exp_samples": []},
        ],
    }  # fmt: skip
    file = {"rule_files": [str(RULES)], "evaluation_interval": "30s",
            "group_eval_order": ["sluice.recording", "sluice.alerts"], "tests": [test]}  # fmt: skip
    (folder / "test.yml").write_text(json.dumps(file))
    command = [need_program("promtool", "prometheus"), "test", "rules", folder / "test.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def away(seconds: int) -> Callable[[int], bool]:
    return lambda t: not EVENT <= t < EVENT + seconds


STORIES: dict[str, tuple[Story, ...]] = {
    "one scrape fails": (Story(scraped=away(STEP)),),
    "two minutes of failed scrapes": (Story(scraped=away(120)),),
    "Prometheus was away for two hours": (Story(scraped=away(7200)),),
    "a new Prometheus": (Story(scraped=lambda t: t >= EVENT),),
    "a restart under traffic": (
        Story(scraped=away(180), started=lambda t: -LONG_AGO if t < EVENT else EVENT + 150),
    ),
    "a replacement": (
        Story(scraped=lambda t: t < EVENT),
        Story(scraped=lambda t: t >= EVENT - 300, started=lambda t: EVENT - 310, instance="b:8000"),
    ),
    "nobody asks for an hour": (Story(busy=away(3600)),),
    "nobody asks for a minute": (Story(busy=away(60)),),
}  # fmt: skip


@pytest.mark.parametrize("kind", [{"baseline": True}, {"baseline": False, "massive": True}], ids=str)
@pytest.mark.parametrize("name", STORIES)
def test_nobody_is_called(tmp_path: Path, name: str, kind: dict[str, bool]) -> None:
    assert fired(tmp_path, *(dataclasses.replace(story, **kind) for story in STORIES[name])) == ""


FAULTS_OF_WINDOWS = {"activation_abs_max": 40_000.0, "attention_sink_mass": 0.5, "quantization_headroom_ratio": 0.5}
FAULTS = {
    **FAULTS_OF_WINDOWS, "engine_paused": 1.0, "baseline_good": 0.0, "config_restart_needed": 2.0,
    "config_file_good": 0.0, "snapshot_age_seconds": 600.0,
}  # fmt: skip
FAULTY_RATES = {"nonfinite": 2.0, "probe_errors": 1.0, "probe_seconds": 5.0, "massive_activations": 1.0}
OF_RANKS = {"SluicePatchNotApplied", "SluiceRanksDisagree"}
"""These need ranks or generations that differ."""


def names_in(said: str) -> set[str]:
    return {name for name in alerts() if f'"{name}"' in said}


@pytest.mark.parametrize(
    "story",
    [Story(scraped=lambda t: t // STEP % 10 != 0), Story(busy=lambda t: t % 300 < 60)],
    ids=["every tenth scrape fails", "requests come one minute in five"],
)
def test_a_fault_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    for name, value in FAULTS.items():
        monkeypatch.setitem(GAUGES, name, value)
    for name, value in FAULTY_RATES.items():
        monkeypatch.setitem(RATES, name, value)
    assert names_in(fired(tmp_path, story)) == alerts().keys() - OF_RANKS


def test_one_odd_minute_of_an_idle_night_calls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FAULTS_OF_WINDOWS.items():
        monkeypatch.setitem(GAUGES, name, value)
    monkeypatch.setitem(RATES, "quantization_clipped", 900.0)
    said = fired(tmp_path, Story(busy=lambda t: EVENT <= t < EVENT + 60))
    assert said == ""


def test_the_guards_trial_calls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary's rows are of another patch state than the baseline in force."""
    monkeypatch.setitem(GAUGES, "activation_abs_max", 4000.0)
    monkeypatch.setitem(GAUGES, "activation_max_to_median_ratio", 9000.0)
    monkeypatch.setitem(RATES, "massive_activations", 30.0)
    story = Story(trial=lambda t: True)
    assert names_in(fired(tmp_path, story)) == set()
    assert names_in(fired(tmp_path, dataclasses.replace(story, trial=lambda t: False))) == {
        "SluiceMassiveActivationsNew", "SluiceActivationDrift",
    }  # fmt: skip
