"""Fleet: many engines at once, the worst first; by model, version and patch state."""

from __future__ import annotations

from typing import Any

from sluice_boards import needs, panels, shared
from sluice_boards.board import Row, board
from sluice_boards.panels import Panel, column, stat, steps, table, timeseries
from sluice_boards.queries import ENGINE, cost, increase, now, of, once, ranks_behind, rows, series

_WORST = 20
_LINK = (
    "/d/sluice-overview?${__url_time_range}&${datasource:queryparam}&${job:queryparam}"
    "&var-model_name=${__data.fields.model}&var-instance=${__data.fields.instance}&var-engine=${__data.fields.engine}"
)


def build() -> dict[str, Any]:
    """Return the board."""
    return board(
        "sluice-fleet", "Fleet",
        "Many engines at once: which are worst, and how they differ by model, version and patch state.",
        [
            Row("All selected engines", _tiles()),
            Row("Worst engines first", [_worst_activation(), _worst_sinks(), _worst_monitor(), _worst_cost()]),
            Row("By model, version and patch state", [_models(), _versions(), _patch_states()]),
            Row("Over time", [_spread("Largest over median activation over engines",
                                      "max", "sluice_activation_max_to_median_ratio", "short", log=True),
                              _spread("Sink mass over engines", "avg", "sluice_attention_sink_mass", "percentunit")]),
        ],
    )  # fmt: skip


def _tiles() -> list[Panel]:
    return [
        stat("Engines reporting", "Engines that report, by `sluice_info`.", "As many as you run.",
             now(f"count(max by ({ENGINE}) {once(of('sluice_info'))})", "engines"), "none", decimals=0, width=4,
             need=needs.SERVER),
        stat("With non-finite values", "Engines whose hidden state had NaN or infinity in the time range.",
             "0.",
             now(f"sum((sum by ({ENGINE}) ({increase(of('sluice_nonfinite_total'))})) > bool 0)", "engines"),
             "none", colours=steps(red=1), alert="SluiceNonFiniteValues", decimals=0, width=4),
        stat("Engines behind", "Engines with a rank that does not run under the desired generation.", "0.",
             now(f"sum(max by ({ENGINE}) ({ranks_behind()}))", "engines"),
             "none", colours=steps(red=1), alert="SluiceRanksDisagree", decimals=0, width=4),
        stat("With old snapshots", f"Engines whose oldest snapshot is over {shared.AGE[1][0]:g} s old.", "0.",
             now(f"sum((max by ({ENGINE}) ({of('sluice_snapshot_age_seconds')})) > bool {shared.AGE[1][0]:g})",
                 "engines"),
             "none", colours=steps(orange=1), alert="SluiceSnapshotStale", decimals=0, width=4),
        stat("Engines paused", "Engines whose generation is paused.", "0.",
             now(f"sum({of('sluice_engine_paused')})", "engines"),
             "none", colours=steps(red=1), alert="SluiceEnginePaused", decimals=0, width=4),
        stat("With a patch on", "Engines on which at least one patch acts.", "As you set them.",
             now(f"sum(max by ({ENGINE}) {once(of('sluice_patch_enabled'))})", "engines"), "none", decimals=0,
             need=needs.PATCH, width=4),
    ]  # fmt: skip


def _worst(title: str, says: str, good: str, heading: str, expr: str, unit: str, *, alert: str,
           decimals: int = 1, colours: panels.Steps = ()) -> Panel:  # fmt: skip
    return table(
        title, f"{says} The {_WORST} worst of the selected engines; click an instance to look at it.", good,
        [column(heading, rows(f"topk({_WORST}, {expr})"), unit, decimals=decimals, colours=colours)],
        labels={"model_name": "model", "instance": "instance", "engine": "engine"},
        sort=f"-{heading}", alert=alert, size=(12, 8), link=("instance", _LINK),
    )  # fmt: skip


def _worst_activation() -> Panel:
    return _worst(
        "Largest over median activation", "Worst layer of each engine.", "Engines of one model are alike.",
        "max/median", f"max by ({ENGINE}) ({of('sluice_activation_max_to_median_ratio')})", "none",
        alert="SluiceMassiveActivationsNew", decimals=0,
    )  # fmt: skip


def _worst_sinks() -> Panel:
    return _worst(
        "Sink mass", f"{shared.SINK} Mean over layers.", "Engines of one model and patch state are alike.",
        "sink mass", f"avg by ({ENGINE}) ({of('sluice_attention_sink_mass')})", "percentunit",
        alert="SluiceSinkRateShifted",
    )  # fmt: skip


def _worst_monitor() -> Panel:
    return _worst(
        "Snapshot age", "Oldest snapshot of any rank.", "A few seconds.",
        "snapshot age", f"max by ({ENGINE}) ({of('sluice_snapshot_age_seconds')})", "s",
        alert="SluiceSnapshotStale", colours=shared.AGE,
    )  # fmt: skip


def _worst_cost() -> Panel:
    return _worst(
        "Probe cost", "Probe time divided by the time of forward passes.", f"Below {shared.COST_BUDGET:.0%}.",
        "cost", cost(ENGINE), "percentunit", alert="SluiceProbeCostHigh", colours=steps(orange=shared.COST_BUDGET),
    )  # fmt: skip


def _models() -> Panel:
    def by_model(function: str, expression: str) -> dict[str, Any]:
        return rows(f"{function} by (model_name) ({expression})")

    return table(
        "By model", "One row a served model, over its engines.", "What you expect of the model.",
        [
            column("engines", by_model("count", f"max by ({ENGINE}) {once(of('sluice_info'))}"), "none", decimals=0),
            column("largest activation", by_model("max", of("sluice_activation_abs_max")), "short", decimals=1),
            column("max/median", by_model("max", of("sluice_activation_max_to_median_ratio")), "none",
                   decimals=0),
            column("sink mass", by_model("avg", of("sluice_attention_sink_mass")), "percentunit", decimals=1),
        ],
        labels={"model_name": "model"}, size=(10, 7),
    )  # fmt: skip


def _versions() -> Panel:
    # The stages of a pipeline have a sluice_info each.
    each = f"max by ({ENGINE}, version, vllm_version) {once(of('sluice_info'))}"
    return table(
        "By version", "Engines by version of Sluice and of vLLM.", "One row, apart from a roll-out.",
        [column("engines", rows(f"count by (version, vllm_version) ({each})"), "none", decimals=0)],
        labels={"version": "Sluice", "vllm_version": "vLLM"}, size=(7, 7), sort="-engines",
    )  # fmt: skip


def _patch_states() -> Panel:
    acts = f"max by ({ENGINE}, patch) {once(of('sluice_patch_enabled'))}"
    acts = f"count_values by ({ENGINE}, patch) ('acts', {acts})"
    return table(
        "By patch state", "Engines by model, patch and whether it acts.", "Engines of one model are in one state.",
        [column("engines", rows(f"count by (model_name, patch, acts) ({acts})"), "none", decimals=0)],
        labels={"model_name": "model", "patch": "patch", "acts": "acts"}, size=(7, 7), sort="model",
        label_texts={"acts": shared.ON_OFF},
    )  # fmt: skip


def _spread(title: str, function: str, metric: str, unit: str, *, log: bool = False) -> Panel:
    value = f"{function} by ({ENGINE}) ({of(metric)})"
    return timeseries(
        title, "The highest, the median and the lowest engine of each model.",
        "Close together. A lone highest engine is the one to look at.",
        [series(f"max by (model_name) ({value})", "highest {{model_name}}"),
         series(f"quantile by (model_name) (0.5, {value})", "median {{model_name}}"),
         series(f"min by (model_name) ({value})", "lowest {{model_name}}")],
        unit, log=log,
    )  # fmt: skip
