"""Attention: sinks, heads, entropy and the gate."""

from __future__ import annotations

from typing import Any

from sluice_boards import needs, shared
from sluice_boards.board import Row, board
from sluice_boards.panels import Panel, bar_gauge, layer_heatmap, stat, timeseries
from sluice_boards.queries import now, of, of_layers, rate, series


def build() -> dict[str, Any]:
    """Return the board."""
    return board(
        "sluice-attention", "Attention",
        "Where attention goes: the sink at position 0, how many heads use it, how spread attention is, and the gate. "
        "Choose one model: layers of different models have nothing in common.",
        [
            Row("Now", _tiles()),
            Row("Sinks", [shared.sink_mass(), _heads_heatmap(), _range(), _sink_now()]),
            Row("Gate (needs an installed gate)", [shared.gate_mean(), _gate_now()]),
            Row("Full detail (needs telemetry.detail: full)", _full(), collapsed=True),
        ],
        layer=True,
    )  # fmt: skip


def _tiles() -> list[Panel]:
    sink = of_layers("sluice_attention_sink_mass")
    return [
        stat("Mean sink mass", f"{shared.SINK} Mean over the selected layers.", "Steady.",
             now(f"avg({sink})", "sink mass"), "percentunit", alert="SluiceSinkRateShifted", decimals=1,
             width=5),
        stat("Strongest layer", "Sink mass of the layer with the most.", "Steady.",
             now(f"max({sink})", "sink mass"), "percentunit", alert="SluiceSinkRateShifted", decimals=1,
             width=5),
        stat("Sink heads", "Heads whose mean attention to position 0 is above 0.3, over the selected layers, "
             "in the engine with most.", "Steady; few with a gate that acts.",
             now(f"max(sum by (job, instance, model_name, engine) ({of_layers('sluice_attention_sink_heads')}))",
                 "heads"), "none", decimals=0, width=5),
        stat("Mean gate", "Mean value of the gates over the selected layers: 1 lets everything through.", "Steady.",
             now(f"avg({of_layers('sluice_gate_mean')})", "gate"), "percentunit", need=needs.GATE, decimals=1,
             width=5),
        stat("Queries sampled", "Queries per second whose attention was computed again, exactly. All numbers of this "
             "board rest on them.", "Above 0 while there is traffic.",
             now(f"sum({rate(of('sluice_queries_sampled_total'))})", "queries/s"), "short", decimals=1,
             width=4),
    ]  # fmt: skip


def _heads_heatmap() -> Panel:
    return layer_heatmap(
        "Sink heads by layer",
        "Heads whose mean attention to position 0 is above 0.3, in the engine with most.",
        "Steady. No head at all in layers where a gate does the work.",
        series(f"max by (layer) ({of_layers('sluice_attention_sink_heads')})", "{{layer}}"),
        "none", decimals=0, alert="SluiceSinkRateShifted",
    )  # fmt: skip


def _range() -> Panel:
    sink = f"avg by (layer) ({of_layers('sluice_attention_sink_mass')})"
    return timeseries(
        "Sink mass over layers",
        "Sink mass of the strongest, the median and the weakest layer.",
        "Steady between switches.",
        [series(f"max({sink})", "strongest layer"), series(f"quantile(0.5, {sink})", "median layer"),
         series(f"min({sink})", "weakest layer")],
        "percentunit", most=1, alert="SluiceSinkRateShifted", size=(12, 10),
    )  # fmt: skip


def _sink_now() -> Panel:
    return bar_gauge(
        "Sink mass now", "Sink mass of each layer, mean over the selected engines.", "As on other days.",
        now(f"avg by (layer) ({of_layers('sluice_attention_sink_mass')})", "{{layer}}"),
        "percentunit", most=1, decimals=1,
    )  # fmt: skip


def _gate_now() -> Panel:
    return bar_gauge(
        "Mean gate now", "Mean gate of each layer, over the selected engines.", "As on other days.",
        now(f"avg by (layer) ({of_layers('sluice_gate_mean')})", "{{layer}}"),
        "percentunit", most=1, decimals=1, need=needs.GATE,
    )  # fmt: skip


def _full() -> list[Panel]:
    def heatmap(title: str, says: str, good: str, metric: str, need: needs.Need = needs.FULL) -> Panel:
        expr = f"avg by (layer) ({of_layers(metric)})"
        return layer_heatmap(title, says, good, series(expr, "{{layer}}"), "percentunit", need=need, decimals=0,
                             bounds=(0, 1))  # fmt: skip

    share = (
        f"sum by (layer) ({of_layers('sluice_attention_sink_heads')}) "
        f"/ on (layer) sum by (layer) ({of_layers('sluice_attention_heads')})"
    )
    closed = heatmap(
        "Closed gates by layer", "Share of gates below 0.1: heads that the gate silences for a token.",
        "Steady. These are heads that need no sink to be silent.", "sluice_gate_closed_ratio", needs.FULL_GATE,
    )  # fmt: skip
    return [
        heatmap("Attention to the first four tokens by layer",
                "Share of attention that goes to positions 0 to 3. More than the sink mass: the sink is spread.",
                "Close to the sink mass.", "sluice_attention_first4_mass"),
        heatmap("Attention entropy by layer",
                "Entropy of attention divided by its largest possible value: 0 looks at one token, 1 at all alike.",
                "Steady. Near 0 in many layers, attention has collapsed.", "sluice_attention_entropy_ratio"),
        layer_heatmap("Share of sink heads by layer", "Heads above 0.3 divided by the heads looked at.",
                      "Steady.", series(share, "{{layer}}"), "percentunit", need=needs.FULL, decimals=0, bounds=(0, 1)),
        closed,
    ]  # fmt: skip
