"""Monitor health: what Sluice itself costs, whether it errs, how fresh and how many its numbers are."""

from __future__ import annotations

from typing import Any

from sluice_boards import needs, shared
from sluice_boards.board import Row, board
from sluice_boards.panels import Panel, column, stat, state_timeline, steps, table, timeseries
from sluice_boards.queries import ENGINE, cost, increase, now, of, rate, rows, series

_FILE = {0.0: ("cannot be used", "red"), 1.0: ("good", "green")}


def build() -> dict[str, Any]:
    """Return the board."""
    return board(
        "sluice-monitor", "Monitor health",
        "Whether the numbers on the other boards are there, fresh, complete and affordable.",
        [
            Row("Now", _tiles()),
            Row("Cost", [_share(), _by_probe(), _per_token()]),
            Row("Fresh and complete", [_ages(), _coverage(), _sampled()]),
            Row("Errors", [_errors(), _file(), _switch_time()]),
            Row("Series", [_series(), _scrape(), _versions()]),
        ],
    )  # fmt: skip


def _tiles() -> list[Panel]:
    return [
        shared.snapshot_age(3),
        stat("Probe errors", "Errors inside probes in the time range; the server goes on without the probe.", "0.",
             now(f"sum({increase(of('sluice_probe_errors_total'))})", "errors"), "short",
             colours=steps(orange=1e-9), alert="SluiceProbeErrors", decimals=0, width=3),
        shared.probe_cost(3),
        stat("Configuration file", "Whether the configuration file of every engine can be used.", "good.",
             now(f"min({of('sluice_config_file_good')})", "file"), "none", texts=_FILE, need=needs.CONFIG_FILE,
             alert="SluiceConfigFileBroken", width=3),
        stat("Baseline file", "Whether the calibration file of every engine that names one can be used. If not, no "
             "alert for drift, sinks or the quantization range can fire.", "good.",
             now(f"min({of('sluice_baseline_good')})", "file"), "none", texts=_FILE, need=needs.BASELINE_FILE,
             alert="SluiceBaselineUnusable", width=3),
        stat("Probes off", "Installed probes that look at nothing: switched off, or off after ten errors.",
             "0, unless somebody switched one off.",
             now(f"sum({of('sluice_probe_enabled')} == bool 0)", "probes"), "none", decimals=0, width=3),
        stat("Series a scrape", "Series that Sluice exports, over the selected engines.",
             "A few hundred an engine; 12 a layer by default.",
             now(f"sum({of('sluice_exported_series')})", "series"), "none", decimals=0, width=3),
        stat("Snapshot interval", "Time between two snapshots, as configured (`telemetry.interval_seconds`).",
             "At most half the scrape interval.",
             now(f"max({of('sluice_telemetry_interval_seconds')})", "interval"), "s", width=3),
    ]  # fmt: skip


def _share() -> Panel:
    return timeseries(
        "Cost of all probes", "Time of probes outside the compiled graph, divided by the time of forward passes.",
        f"Below {shared.COST_BUDGET:.0%}; probes pace themselves to 2 % of the time each.",
        series(cost(ENGINE), "{{instance}} {{engine}}"), "percentunit", alert="SluiceProbeCostHigh", size=(8, 8),
        limit=steps(orange=shared.COST_BUDGET),
    )  # fmt: skip


def _by_probe() -> Panel:
    return timeseries(
        "Time by probe", "Seconds that each probe's work outside the compiled graph took, per second.",
        "Level; the attention probe takes most.",
        series(f"sum by (probe) ({rate(of('sluice_probe_seconds_total'))})", "{{probe}}"), "percentunit", stacked=True,
        size=(8, 8), alert="SluiceProbeCostHigh",
    )  # fmt: skip


def _per_token() -> Panel:
    spent = f"sum by ({ENGINE}) ({rate(of('sluice_probe_seconds_total'))})"
    seen = f"sum by ({ENGINE}) ({rate(of('sluice_tokens_observed_total'))})"
    return timeseries(
        "Time per token", "Probe time divided by the tokens looked at.",
        "Microseconds. It falls as batches grow, because probes look at a time, not at a token.",
        series(f"{spent} / ({seen} > 0)", "{{instance}} {{engine}}"), "s", size=(8, 8),
    )  # fmt: skip


def _ages() -> Panel:
    return timeseries(
        "Snapshot age by rank", "Age of each rank's last snapshot.", "A few seconds, always.",
        series(f"max by (instance, engine, rank) ({of('sluice_snapshot_age_seconds')})",
               "{{instance}} {{engine}} {{rank}}"), "s", alert="SluiceSnapshotStale", size=(8, 8), limit=shared.AGE,
    )  # fmt: skip


def _coverage() -> Panel:
    vllm = " + ".join(f"sum({rate(of(f'vllm:{kind}_tokens_total'))})" for kind in ("prompt", "generation"))
    return timeseries(
        "Tokens looked at", "Tokens that the probes looked at beside those that vLLM counts. Prompt tokens from the "
        "prefix cache are counted by vLLM and not computed, so they cannot be looked at.",
        "Close together; far below means that the probes do not see the traffic.",
        [series(f"sum by (phase) ({rate(of('sluice_tokens_observed_total'))})", "{{phase}}"),
         series(vllm, "vLLM, prompt and generated")],
        "short", size=(8, 8),
    )  # fmt: skip


def _sampled() -> Panel:
    return timeseries(
        "Sampled", "Queries whose attention was computed again, and tokens at position 0, per second. Without start "
        "tokens the sink's own activations are not seen.",
        "Both above 0 while there is traffic.",
        [series(f"sum by (phase) ({rate(of('sluice_queries_sampled_total'))})", "queries, {{phase}}"),
         series(f"sum({rate(of('sluice_start_tokens_observed_total'))})", "start tokens")],
        "short", size=(8, 8),
    )  # fmt: skip


def _errors() -> Panel:
    return timeseries(
        "Errors by probe", "Errors inside each probe; the worker's log says why.", "0.",
        series(f"sum by (probe) (increase({of('sluice_probe_errors_total')}[$__rate_interval]))", "{{probe}}"), "short",
        alert="SluiceProbeErrors", size=(8, 7),
    )  # fmt: skip


def _file() -> Panel:
    return state_timeline(
        "Configuration file over time", "A lane for each engine: whether its configuration file can be used. "
        "If not, the last good state stays in force.", "good.",
        series(f"min by (instance, engine) ({of('sluice_config_file_good')})", "{{instance}} {{engine}}"), _FILE,
        alert="SluiceConfigFileBroken", need=needs.CONFIG_FILE, size=(8, 7),
    )  # fmt: skip


def _switch_time() -> Panel:
    took = f"sum(increase({of('sluice_switch_seconds_total')}[$__rate_interval]))"
    return timeseries(
        "Time in switches", "Seconds that changes of the run-time state took; generation is paused for a part of it.",
        "Well under a second a change.",
        series(took, "seconds"), "s", size=(8, 7),
    )  # fmt: skip


def _series() -> Panel:
    return timeseries(
        "Series exported",
        "Series that Sluice adds to /metrics, by engine. `telemetry.detail: full` nearly doubles it.",
        "Level.",
        series(f"sum by ({ENGINE}) ({of('sluice_exported_series')})", "{{instance}} {{engine}}"), "short", size=(8, 7),
    )  # fmt: skip


def _scrape() -> Panel:
    target = 'job=~"$job", instance=~"$instance"'
    return timeseries(
        "Scrape duration", "How long Prometheus waits for /metrics, vLLM's part included.",
        "Far below the scrape timeout.",
        series(f"max by (job, instance) (scrape_duration_seconds{{{target}}})", "{{instance}}"), "s", size=(8, 7),
    )  # fmt: skip


def _versions() -> Panel:
    return table(
        "Versions",
        "Versions and the fingerprint of what is installed: the same fingerprint is the same compiled model.",
        "One version, and one fingerprint a model.",
        [column("engines", rows(f"count by (model_name, version, vllm_version, fingerprint) ({of('sluice_info')})"),
                "none", decimals=0)],
        labels={"model_name": "model", "version": "Sluice", "vllm_version": "vLLM", "fingerprint": "fingerprint"},
        size=(8, 7),
    )  # fmt: skip
