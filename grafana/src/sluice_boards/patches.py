"""Patches: what acts since when, and the model and vLLM before and after each change."""

from __future__ import annotations

from typing import Any

from sluice_boards import needs, shared
from sluice_boards.board import Row, board
from sluice_boards.panels import Panel, column, stat, state_timeline, steps, table, timeseries
from sluice_boards.queries import ENGINE, equal, now, of, ranks_behind, rows, series

_SETTLED = 240
"""Seconds after a switch at which before and after are compared: windows of 60 s hold nothing old by then."""
_LONGEST_STEP = 60
"""Seconds; the query's step is at most this, see `_before_after`."""
_LANES = {0.0: ("applied", "green"), 1.0: ("behind", "red")}


def build() -> dict[str, Any]:
    """Return the board."""
    return board(
        "sluice-patches", "Patches",
        "Which patches act, since when, whether every rank agrees, and what a switch did to the model and to vLLM.",
        [
            Row("Now", _tiles()),
            Row("History", [shared.patch_lanes((24, 6)), _ranks(), _results(), _parameters()]),
            Row("Before and after", [_before_after()]),
            Row("What a switch does to the model", [_effect_sinks(), _effect_ratio(), _effect_gate()]),
            Row("What a switch does to vLLM",
                [shared.time_to_first_token(), shared.inter_token_latency(), shared.throughput()]),
            Row("Guarded trials", _trials(), collapsed=True),
        ],
        time="now-3h",
    )  # fmt: skip


def _tiles() -> list[Panel]:
    return [
        stat("Patches installed", "Patches that are built into the model on every rank, over engines.",
             "As configured.",
             now(f"sum({of('sluice_patch_installed')})", "installed"), "none", decimals=0, width=4),
        stat("Patches on", "Installed patches that act on every rank, over engines.", "As you set them.",
             now(f"sum({of('sluice_patch_enabled')})", "on"), "none", need=needs.PATCH, decimals=0, width=4),
        shared.behind(4),
        stat("Generations apart", "Different applied generations among the ranks of one engine, in the worst engine.",
             "1: all ranks agree.",
             now(f"max(count by ({ENGINE}) (count by ({ENGINE}, generation) (count_values by ({ENGINE}) "
                 f"('generation', {of('sluice_generation', equal('kind', 'applied'))}))))", "generations"),
             "none", colours=steps(red=2), alert="SluiceRanksDisagree", decimals=0, width=4),
        stat("Engines paused", "Engines whose generation is paused, by a switch or by somebody else.",
             "0. A switch pauses for well under a second.",
             now(f"sum({of('sluice_engine_paused')})", "paused"), "none", colours=steps(red=1),
             alert="SluiceEnginePaused", decimals=0, width=4),
        stat("Settings waiting for a restart",
             "Settings in the configuration file that only a restart can bring into force.", "0.",
             now(f"max({of('sluice_config_restart_needed')})", "settings"), "none", colours=steps(orange=1),
             need=needs.CONFIG_FILE, alert="SluiceRestartNeeded", decimals=0, width=4),
    ]  # fmt: skip


def _ranks() -> Panel:
    return state_timeline(
        "Ranks",
        "A lane for each rank: whether it runs under the desired generation.",
        "Green, apart from the second of a switch.",
        series(f"max by (instance, engine, rank) ({ranks_behind()})", "{{instance}} {{engine}} {{rank}}"),
        _LANES, alert="SluiceRanksDisagree", size=(12, 7),
    )  # fmt: skip


def _results() -> Panel:
    return timeseries(
        "Changes by result",
        "Changes of the run-time state: applied, rolled_back (the old state holds), failed, or tried by the guard. "
        "Prometheus extrapolates, so one change may show as 1.3.",
        "Only applied and tried.",
        series(f"sum by (result) (increase({of('sluice_switches_total')}[$__rate_interval]))", "{{result}}"),
        "short", alert="SluicePatchNotApplied", size=(12, 7),
    )  # fmt: skip


def _parameters() -> Panel:
    return timeseries(
        "Parameters",
        "Run-time parameters of installed patches, such as a gate's temperature and floor, whether they act or not.",
        "As you set them; temperature 1 and floor 0 are the trained gate.",
        series(f"max by ({ENGINE}, patch, parameter) ({of('sluice_patch_parameter')})",
               "{{patch}} {{parameter}} {{instance}} {{engine}}"),
        "none", alert="SluiceRanksDisagree", need=needs.PATCH, size=(24, 6), decimals=2,
    )  # fmt: skip


def _before_after() -> Panel:
    """One row for each change, from the one step of the range that lies four minutes after it."""
    changed = f"max by ({ENGINE}, patch) ({of('sluice_patch_last_change_timestamp_seconds')})"
    settled = f"((time() - {changed}) >= {_SETTLED} < ({_SETTLED} + $__interval_ms / 1000))"

    def at_switch(value: str) -> dict[str, Any]:
        expr = f"({value}) * on ({ENGINE}) group_right () ({settled} > bool 0)"
        return rows(expr, over_time=True)

    def gauge(function: str, metric: str, offset: str) -> dict[str, Any]:
        inner = f"avg_over_time({of(metric)}[3m]{offset})"
        return at_switch(f"{function} by ({ENGINE}) ({inner})")

    def latency(histogram: str, offset: str) -> dict[str, Any]:
        buckets = f"rate({of(f'{histogram}_bucket')}[3m]{offset})"
        return at_switch(f"histogram_quantile(0.5, sum by (le, {ENGINE}) ({buckets}))")

    def tokens(offset: str) -> dict[str, Any]:
        return at_switch(f"sum by ({ENGINE}) (rate({of('vllm:generation_tokens_total')}[3m]{offset}))")

    # The step that is found lies up to one step after the time that is meant; look back further by that much.
    before = f" offset {_SETTLED + _LONGEST_STEP}s"
    when = rows(f"1000 * {changed} * ({settled} > bool 0)", over_time=True)
    state = rows(f"max by ({ENGINE}, patch) ({of('sluice_patch_enabled')}) * on ({ENGINE}, patch) ({settled} > bool 0)",
                 over_time=True)  # fmt: skip
    panel = table(
        "Before and after each change",
        "Minutes 4 to 1 before a change of a patch (a switch, or a parameter) and minutes 1 to 4 after it, once they "
        "are over. Ratio is the largest over the median activation, latencies are vLLM's medians. A change that is "
        "followed by another within four minutes is left out. Traffic differs too, so look at the curves below.",
        "Sinks and ratio move the way they did in your trials; TTFT, ITL and tokens per second stay as they were.",
        [
            column("changed at", when, "dateTimeAsIso"),
            column("to", state, "none", texts=shared.ON_OFF),
            *[
                column(f"{name} {label}", make(offset), unit, decimals=decimals)
                for name, make, unit, decimals in (
                    ("sinks", lambda o: gauge("avg", "sluice_attention_sink_mass", o), "percentunit", 1),
                    ("ratio", lambda o: gauge("max", "sluice_activation_max_to_median_ratio", o), "none", 0),
                    ("TTFT", lambda o: latency("vllm:time_to_first_token_seconds", o), "s", 1),
                    ("ITL", lambda o: latency("vllm:inter_token_latency_seconds", o), "s", 1),
                    ("tok/s", tokens, "short", 0),
                )
                for label, offset in (("before", before), ("after", ""))
            ],
        ],
        labels={"patch": "patch", "instance": "instance", "engine": "engine"},
        sort="-changed at", need=needs.CHANGED, size=(24, 8),
    )  # fmt: skip
    panel |= {"interval": "30s", "maxDataPoints": 1500}  # a step of a minute at most, up to 25 hours
    return panel


def _effect(title: str, says: str, good: str, expr: str, unit: str, **options: Any) -> Panel:
    return timeseries(title, says, good, series(expr, "{{model_name}} {{instance}} {{engine}}"), unit, size=(8, 8),
                      **options)  # fmt: skip


def _effect_sinks() -> Panel:
    return _effect(
        "Sink mass", f"{shared.SINK} Mean over layers, by engine; the marks are changes of patches.",
        shared.EITHER_WAY,
        f"avg by ({ENGINE}) ({of('sluice_attention_sink_mass')})", "percentunit", alert="SluiceSinkRateShifted",
    )  # fmt: skip


def _effect_ratio() -> Panel:
    return _effect(
        "Largest over median activation", "Largest ratio of any layer, by engine; the marks are changes of patches.",
        shared.EITHER_WAY,
        f"max by ({ENGINE}) ({of('sluice_activation_max_to_median_ratio')})", "short", log=True,
        alert="SluiceMassiveActivationsNew",
    )  # fmt: skip


def _effect_gate() -> Panel:
    return _effect(
        "Mean gate", "Mean gate over layers, by engine, computed whether it acts or not.",
        "Follows temperature and floor; other input moves it a little.",
        f"avg by ({ENGINE}) ({of('sluice_gate_mean')})", "percentunit", need=needs.GATE, most=1,
    )  # fmt: skip


_TRIAL = needs.Need("Needs a guarded trial (`control.guard`) in the time range.", "no data: no guarded trial ran")


def _trials() -> list[Panel]:
    return [
        timeseries(
            "Log-probability in trials",
            "Mean log-probability of the tokens that the canary (new state) and the rest generated.",
            "The two stay close; the guard rolls back where they differ for certain.",
            series(f"avg by (patch, group) ({of('sluice_guard_logprob')})", "{{patch}} {{group}}"),
            "none", least=None, need=_TRIAL, decimals=2,
        ),
        timeseries(
            "Tokens and non-finite rows in trials",
            "What the verdict rests on: tokens by group, and rows of logits with NaN or infinity.",
            "Tokens of both groups rise; no row is non-finite.",
            [series(f"sum by (patch, group) ({of('sluice_guard_tokens')})", "{{patch}} {{group}} tokens"),
             series(f"sum by (patch, group) ({of('sluice_guard_nonfinite')})", "{{patch}} {{group}} non-finite")],
            "short", need=_TRIAL,
        ),
    ]  # fmt: skip
