"""Layers: layer by time for magnitude, ratio, sinks and gates; each layer now; top channels; against the baseline."""

from __future__ import annotations

from typing import Any

from sluice_boards import needs, panels, shared
from sluice_boards.board import Row, board
from sluice_boards.panels import Panel, bar_gauge, column, layer_heatmap, state_timeline, steps, table, timeseries
from sluice_boards.queries import LAYER, now, of_layers, rate, rows, series, to_baseline

_BASELINE_STATES = {
    0.0: ("as recorded", "green"), 1.0: ("over twice or under half", "orange"), 2.0: ("not finite", "red"),
}  # fmt: skip
DRIFT = 2.0
"""Times the baseline from which SluiceActivationDrift counts a layer; also one over it, downwards."""


def build() -> dict[str, Any]:
    """Return the board."""
    return board(
        "sluice-layers", "Layers",
        "What the hidden state, attention sinks and gates do in every decoder layer, over time and now. "
        "Choose one model: layers of different models have nothing in common.",
        [
            Row("Layers over time", [shared.magnitude(), shared.ratio(), shared.sink_mass(), shared.gate_mean()]),
            Row("Layers now", [_now()]),
            Row("What is in a layer", [_spread(), _massive()]),
            Row("Against the baseline (needs sluice baseline record)", _baseline(), collapsed=True),
            Row("Full detail (needs telemetry.detail: full)", _full(), collapsed=True),
        ],
        layer=True,
    )  # fmt: skip


def _by_layer(function: str, metric: str, *matchers: str) -> str:
    return f"{function} by (layer) ({of_layers(metric, *matchers)})"


def _now() -> Panel:
    return table(
        "Each layer now",
        "Statistics of the last window, worst engine of those selected. The channel is the index of the largest one; "
        "click a layer to narrow the board to it.",
        "Neighbouring layers look alike, apart from the few where massive activations begin and end. "
        "The same channel is the largest in many layers.",
        [
            column("largest", rows(_by_layer("max", "sluice_activation_abs_max")), "short", decimals=1),
            column("median", rows(_by_layer("max", "sluice_activation_median")), "short", decimals=3),
            column("max/median", rows(_by_layer("max", "sluice_activation_max_to_median_ratio")), "none",
                   decimals=0),
            column("kurtosis", rows(_by_layer("max", "sluice_activation_kurtosis")), "none", decimals=0),
            column("channel", rows(_by_layer("max", "sluice_activation_top_channel", 'rank="1"')), "none", decimals=0),
            column("sink mass", rows(_by_layer("avg", "sluice_attention_sink_mass")), "percentunit", decimals=1),
            column("sink heads", rows(_by_layer("max", "sluice_attention_sink_heads")), "none", decimals=0),
            column("gate", rows(_by_layer("avg", "sluice_gate_mean")), "percentunit", decimals=1),
            column("non-finite, ever", rows(_by_layer("sum", "sluice_nonfinite_total")), "short", decimals=0,
                   colours=steps(panels.OFF, red=1e-9)),
        ],
        labels={"layer": "layer"}, size=(24, 14), alert="SluiceNonFiniteValues",
        link=("layer", "/d/sluice-layers?${__url_time_range}&${datasource:queryparam}&${job:queryparam}"
                       "&${model_name:queryparam}&${instance:queryparam}&${engine:queryparam}"
                       "&var-layer=${__data.fields.layer}"),
    )  # fmt: skip


def _spread() -> Panel:
    return timeseries(
        "Largest and median activation",
        f"Largest and median absolute value over the selected layers. {shared.ACTIVATION}",
        "Both steady. Only the largest rises: new outliers. Both rise: another scale of input.",
        [series(f"max({of_layers('sluice_activation_abs_max')})", "largest"),
         series(f"max({of_layers('sluice_activation_median')})", "median, largest layer"),
         series(f"min({of_layers('sluice_activation_median')})", "median, smallest layer")],
        "short", log=True, alert="SluiceActivationDrift",
    )  # fmt: skip


def _massive() -> Panel:
    return timeseries(
        "Massive activations by position",
        "Massive activations per second in the selected layers, by the token's position: start (position 0), "
        "delimiter or other.",
        "Follows the traffic. Most belong to start tokens; other positions are what to look at.",
        series(f"sum by (position) ({rate(of_layers('sluice_massive_activations_total'))})", "{{position}}"),
        "short", alert="SluiceMassiveActivationsNew",
    )  # fmt: skip


def _baseline() -> list[Panel]:
    against = to_baseline("sluice_activation_abs_max", "sluice_baseline_activation_abs_max")
    moved = (
        f"(max by (layer) ({against}) > bool {DRIFT:g}) + on (layer) (min by (layer) ({against}) < bool {1 / DRIFT:g})"
    )
    ratios = to_baseline(
        "sluice_activation_max_to_median_ratio", "sluice_baseline_activation_max_to_median_ratio"
    )
    sinks = (
        f"{of_layers('sluice_attention_sink_mass')} - on ({LAYER}) {of_layers('sluice_baseline_attention_sink_mass')}"
    )
    broken = f"2 * ((sum by (layer) ({rate(of_layers('sluice_nonfinite_total'))}) > bool 0) == 1)"
    return [
        layer_heatmap(
            "Largest activation, times the baseline",
            "Largest activation divided by what the baseline recorded. Colour is the logarithm to base 2: "
            "0 is as recorded, 1 is twice, -1 is half.",
            "Near 0 in all layers.",
            series(f"log2(max by (layer) ({against}) > 0)", "{{layer}}"),
            "none", alert="SluiceActivationDrift", need=needs.BASELINE, bounds=(-2, 2), scheme="RdBu",
        ),
        state_timeline(
            "Layers against the baseline",
            f"A lane for each layer: within {DRIFT:g} times and half of the baseline, outside of it, or not finite.",
            "Green throughout.",
            series(f"{broken} or {moved}", "{{layer}}"),
            _BASELINE_STATES, alert="SluiceActivationDrift", need=needs.BASELINE, size=(12, 10),
        ),
        bar_gauge(
            "Largest over median, times the baseline",
            "Now, one bar a layer: 1 is as recorded.",
            f"Between {1 / DRIFT:g} and {DRIFT:g}.",
            now(f"max by (layer) ({ratios})", "{{layer}}"),
            "none", colours=steps(orange=DRIFT), alert="SluiceActivationDrift", need=needs.BASELINE, decimals=2, most=4,
        ),
        timeseries(
            "Sink mass, change from the baseline",
            "Sink mass now less what the baseline recorded, in points of share.",
            "Near 0.",
            series(f"avg by (layer) ({sinks})", "{{layer}}"),
            "percentunit", alert="SluiceSinkRateShifted", need=needs.BASELINE, least=None, size=(12, 10),
        ),
    ]  # fmt: skip


def _full() -> list[Panel]:
    return [
        layer_heatmap(
            "RMS of the hidden state by layer",
            "Root mean square over tokens and channels. Colour is the logarithm to base 10.",
            "Rises slowly over layers, and is steady over time.",
            series(f"log10({_by_layer('max', 'sluice_activation_rms')} > 0)", "{{layer}}"),
            "none", need=needs.FULL,
        ),
        table(
            "Top channels",
            "The three channels with the largest values, by layer. The channel's number is a value, not a label, "
            "so that another channel makes no new series.",
            "The same few channels in many layers.",
            [
                column("channel", rows(f"max by (layer, rank) ({of_layers('sluice_activation_top_channel')})"), "none",
                       decimals=0),
                column("largest", rows(f"max by (layer, rank) ({of_layers('sluice_activation_top_abs')})"), "short",
                       decimals=1),
            ],
            labels={"layer": "layer", "rank": "rank"}, sort="-largest", need=needs.FULL, size=(12, 10),
        ),
    ]  # fmt: skip
