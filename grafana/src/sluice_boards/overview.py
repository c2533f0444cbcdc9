"""Overview: is anything wrong, is the monitor alive, what do patches do."""

from __future__ import annotations

from typing import Any

from sluice_boards import needs, panels, shared
from sluice_boards.board import Row, board
from sluice_boards.panels import Panel, column, stat, state_timeline, steps, table, timeseries
from sluice_boards.queries import ENGINE, alerts, cost, equal, increase, now, of, once, rate, rows, series

_SEVERITY = {1.0: ("info", "blue"), 2.0: ("warning", "orange"), 3.0: ("critical", "red")}
_CALLS = 'severity!="info"'
_FIRING = ('alertname=~"Sluice.+"', equal("alertstate", "firing"))


def build() -> dict[str, Any]:
    """Return the board."""
    return board(
        "sluice-overview", "Overview",
        "Is anything wrong, is the monitor alive, and what do patches do to the model that vLLM serves.",
        [
            Row("Is anything wrong, and is the monitor alive?", _tiles()),
            Row("Since when?", [_alerts_over_time(), _largest(), _sinks(), _massive()]),
            Row("What do patches do?", [shared.patch_lanes((24, 5)), shared.time_to_first_token(),
                                        shared.inter_token_latency(), shared.throughput()]),
            Row("Is the monitor alive?", [_observed(), _ages(), _cost()]),
            Row("Each engine", [_engines()]),
        ],
    )  # fmt: skip


def _tiles() -> list[Panel]:
    firing = stat(
        "Alerts firing",
        "Alerts of Sluice that Prometheus says are firing now, those that are only information (`info`) left out. Also "
        "\"none\" where the rules are not loaded.",
        "none.",
        now(f"count({alerts(*_FIRING, _CALLS)})", "firing"),
        "none", colours=steps(red=1), decimals=0,
    )  # fmt: skip
    firing["fieldConfig"]["defaults"]["noValue"] = "none"
    return [
        firing,
        shared.nonfinite(),
        shared.range_used(),
        shared.behind(),
        shared.snapshot_age(),
        stat("Probe errors", "Errors inside probes in the time range. The server goes on; a probe's metrics may stop.",
             "0.", now(f"sum({increase(of('sluice_probe_errors_total'))})", "errors"),
             "short", colours=steps(orange=1e-9), alert="SluiceProbeErrors", decimals=0),
        shared.probe_cost(),
        stat("Engines", "Engines that report, by `sluice_info`.", "As many as you run.",
             now(f"count(max by ({ENGINE}) {once(of('sluice_info'))})", "engines"), "none", decimals=0,
             need=needs.SERVER),
    ]  # fmt: skip


def _alerts_over_time() -> Panel:
    level = " or ".join(
        f"{value:g} * max by (alertname) ({alerts(*_FIRING, equal('severity', severity))})"
        for value, (severity, _) in sorted(_SEVERITY.items(), reverse=True)
    )
    panel = state_timeline(
        "Alerts over time",
        "A lane for each alert that fired in the time range, by severity.",
        "Empty.",
        series(level, "{{alertname}}"), _SEVERITY, size=(12, 8),
    )  # fmt: skip
    panel["fieldConfig"]["defaults"]["noValue"] = "no alert fired in this time range (or no rules are loaded)"
    return panel


def _largest() -> Panel:
    return timeseries(
        "Largest activation",
        f"Largest absolute value of any layer's hidden state, by engine. {shared.ACTIVATION}",
        "Steady. A jump that stays means new massive activations or another kind of input.",
        series(f"max by ({ENGINE}) ({of('sluice_activation_abs_max')})", "{{model_name}} {{instance}} {{engine}}"),
        "short", alert="SluiceActivationDrift", log=True,
    )  # fmt: skip


def _sinks() -> Panel:
    return timeseries(
        "Sink mass",
        f"{shared.SINK} Mean over layers, by engine.",
        "Steady between switches.",
        series(f"avg by ({ENGINE}) ({of('sluice_attention_sink_mass')})", "{{model_name}} {{instance}} {{engine}}"),
        "percentunit", alert="SluiceSinkRateShifted",
    )  # fmt: skip


def _massive() -> Panel:
    counted = f"sum by (model_name, position) ({rate(of('sluice_massive_activations_total'))})"
    tokens = f"sum by (model_name) ({rate(of('sluice_tokens_observed_total'))}) > 0"
    return timeseries(
        "Massive activations per token",
        "Massive activations for each token that the probes looked at, over all layers, by the token's position: "
        "start (position 0), delimiter or other.",
        "Steady. Most belong to start tokens; a rise at other positions is new.",
        series(f"{counted} / on (model_name) group_left () ({tokens})", "{{position}} {{model_name}}"),
        "short", alert="SluiceMassiveActivationsNew",
    )  # fmt: skip


def _observed() -> Panel:
    return timeseries(
        "Tokens looked at",
        "Tokens that the probes looked at, per second, beside the requests that vLLM runs.",
        "Follows the traffic. Requests without tokens: the probes are off, or the monitor hangs.",
        [series(f"sum by (phase) ({rate(of('sluice_tokens_observed_total'))})", "{{phase}} tokens/s"),
         series(f"sum({of('vllm:num_requests_running')})", "requests running")],
        "short", size=(8, 8),
    )  # fmt: skip


def _ages() -> Panel:
    return timeseries(
        "Snapshot age",
        "Age of the last snapshot of the worst rank, by engine.",
        "A few seconds, always.",
        series(f"max by ({ENGINE}) ({of('sluice_snapshot_age_seconds')})", "{{instance}} {{engine}}"),
        "s", alert="SluiceSnapshotStale", size=(8, 8), limit=shared.AGE,
    )  # fmt: skip


def _cost() -> Panel:
    return timeseries(
        "Probe cost over time",
        "Time that probes take outside the compiled graph, divided by the time of forward passes, by engine.",
        f"Below {shared.COST_BUDGET:.0%}.",
        series(cost(ENGINE), "{{instance}} {{engine}}"),
        "percentunit", alert="SluiceProbeCostHigh", size=(8, 8), limit=steps(orange=shared.COST_BUDGET),
    )  # fmt: skip


def _engines() -> Panel:
    def by_engine(function: str, metric: str) -> dict[str, Any]:
        return rows(f"{function} by ({ENGINE}) ({of(metric)})")

    return table(
        "Engines now",
        "One row an engine. Click an instance to see its layers.",
        "Engines of one model look alike.",
        [
            column("patches on", by_engine("sum", "sluice_patch_enabled"), "none", decimals=0),
            column("largest activation", by_engine("max", "sluice_activation_abs_max"), "short", decimals=1),
            column("max/median", by_engine("max", "sluice_activation_max_to_median_ratio"), "none",
                   decimals=0),
            column("sink mass", by_engine("avg", "sluice_attention_sink_mass"), "percentunit", decimals=1),
            column("non-finite, ever", by_engine("sum", "sluice_nonfinite_total"), "short", decimals=0,
                   colours=steps(panels.OFF, red=1e-9)),
            column("snapshot age", by_engine("max", "sluice_snapshot_age_seconds"), "s", decimals=1,
                   colours=shared.AGE),
            column("paused", by_engine("max", "sluice_engine_paused"), "none",
                   texts={0.0: ("no", panels.OFF), 1.0: ("paused", "red")}),
        ],
        labels={"model_name": "model", "instance": "instance", "engine": "engine"},
        alert="SluiceEnginePaused", need=needs.IDLE, size=(24, 7),
        link=("instance", "/d/sluice-layers?${__url_time_range}&${datasource:queryparam}&${job:queryparam}"
                          "&var-model_name=${__data.fields.model}&var-instance=${__data.fields.instance}"
                          "&var-engine=${__data.fields.engine}"),
    )  # fmt: skip
