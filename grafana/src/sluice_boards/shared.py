"""Panels that more than one board shows, so that they look and mean the same everywhere."""

from __future__ import annotations

from sluice_boards import needs, panels
from sluice_boards.panels import Panel, Steps, layer_heatmap, stat, state_timeline, steps, timeseries
from sluice_boards.queries import ENGINE, cost, increase, now, of, of_layers, quantile, ranks_behind, rate, series

ON_OFF = {0.0: ("off", panels.OFF), 1.0: ("on", "blue")}
COST_BUDGET = 0.05
"""Share of the forward passes' time that SluiceProbeCostHigh allows."""
AGE: Steps = steps(orange=15, red=60)

EITHER_WAY = (
    "Steady between switches. Which way a switch moves it depends on the model: one that was trained with gates is not "
    "itself without them."
)
ACTIVATION = "The hidden state of a layer is the residual stream after it."
SINK = "Sink mass is the share of attention that goes to position 0, mean over heads and sampled queries."


def nonfinite(width: int = 3) -> Panel:
    """NaN and infinity in the time range."""
    return stat(
        "Non-finite values",
        "NaN and infinite entries of the hidden state in the time range, over all layers.",
        "0. Anything else is a broken model, a broken kernel or an overflow.",
        now(f"sum({increase(of('sluice_nonfinite_total'))})", "NaN and infinity"),
        "short", colours=steps(red=1e-9), alert="SluiceNonFiniteValues", decimals=0, width=width,
    )  # fmt: skip


def range_used(width: int = 3) -> Panel:
    """Largest activation as a share of what the served dtype holds."""
    engine_max = f"max by ({ENGINE}) ({of('sluice_activation_abs_max')})"
    return stat(
        "Serving range",
        "Share of the served dtype's range that is in use in the worst engine: its largest activation divided by the "
        "largest number that the dtype can hold.",
        "Far below 50 %. With bfloat16 it is always near 0 %; with float16 the limit is 65504.",
        now(f"max({engine_max} / on ({ENGINE}) max by ({ENGINE}) ({of('sluice_serving_dtype_max')}))", "used"),
        "percentunit", colours=steps(orange=0.5, red=0.9), alert="SluiceServingRangeSaturated", decimals=1,
        width=width,
    )  # fmt: skip


def snapshot_age(width: int = 3) -> Panel:
    """Age of the oldest snapshot."""
    return stat(
        "Oldest snapshot",
        "Age of the oldest snapshot of any rank. Ranks write one every telemetry interval, traffic or not.",
        "A few seconds. Older means that what the boards show is old, or that a worker hangs.",
        now(f"max({of('sluice_snapshot_age_seconds')})", "age"),
        "s", colours=AGE, alert="SluiceSnapshotStale", decimals=1, width=width,
    )  # fmt: skip


def behind(width: int = 3) -> Panel:
    """Ranks whose applied generation is not the desired one."""
    return stat(
        "Ranks behind",
        "Ranks that run under another generation of the run-time state than the desired one.",
        "0, apart from the second in which a switch is made.",
        now(f"sum({ranks_behind()})", "behind"),
        "none", colours=steps(red=1), alert="SluicePatchNotApplied", decimals=0, width=width,
    )  # fmt: skip


def probe_cost(width: int = 3) -> Panel:
    """Share of the time that probes take, in the worst engine."""
    return stat(
        "Probe cost",
        "Time that probes take outside the compiled graph, divided by the time of forward passes, in the worst engine.",
        f"Below {COST_BUDGET:.0%}. A longer `interval_seconds` of a probe makes it cheaper.",
        now(f"max({cost(ENGINE)})", "cost"),
        "percentunit", colours=steps(orange=COST_BUDGET), alert="SluiceProbeCostHigh", decimals=1, width=width,
    )  # fmt: skip


def patch_lanes(size: tuple[int, int] = (24, 6)) -> Panel:
    """Show a lane for each patch and engine."""
    return state_timeline(
        "Patches over time",
        "A lane for each patch of each engine: whether it acts on every rank.",
        "Neither is wrong; a change that nobody made is. `sluice changes` says who made it.",
        series(f"max by ({ENGINE}, patch) ({of('sluice_patch_enabled')})", "{{patch}} {{instance}} {{engine}}"),
        ON_OFF, size=size,
    )  # fmt: skip


def magnitude(size: tuple[int, int] = (12, 10)) -> Panel:
    """Heatmap of the largest activation."""
    return layer_heatmap(
        "Largest activation by layer",
        f"Largest absolute value of the hidden state. {ACTIVATION} Colour is the logarithm to base 10: 2 is 100.",
        "Steady. Some layers are always far above others; a row that changes colour is what to look at.",
        series(f"log10(max by (layer) ({of_layers('sluice_activation_abs_max')}) > 0)", "{{layer}}"),
        "none", alert="SluiceActivationDrift", size=size,
    )  # fmt: skip


def ratio(size: tuple[int, int] = (12, 10)) -> Panel:
    """Heatmap of the maximum over the median."""
    return layer_heatmap(
        "Largest over median activation by layer",
        "Largest absolute value divided by the median: what makes a layer hard to quantize. "
        "Colour is the logarithm to base 10: 3 is 1000 times the median, where massive activations begin.",
        "Steady, and the lower the better for quantization.",
        series(f"log10(max by (layer) ({of_layers('sluice_activation_max_to_median_ratio')}) > 0)", "{{layer}}"),
        "none", alert="SluiceMassiveActivationsNew", size=size,
    )  # fmt: skip


def sink_mass(size: tuple[int, int] = (12, 10)) -> Panel:
    """Heatmap of the attention sink."""
    return layer_heatmap(
        "Sink mass by layer",
        f"{SINK} Heads with nothing to do park their attention there.",
        "Steady between switches. High is normal in a model without gates; one that was trained with gates has less.",
        series(f"avg by (layer) ({of_layers('sluice_attention_sink_mass')})", "{{layer}}"),
        "percentunit", alert="SluiceSinkRateShifted", size=size, decimals=0, bounds=(0, 1),
    )  # fmt: skip


def gate_mean(size: tuple[int, int] = (12, 10)) -> Panel:
    """Heatmap of the gates."""
    return layer_heatmap(
        "Mean gate by layer",
        "Mean value of the gates over heads and tokens: 0 is closed, 1 lets everything through.",
        "Steady while the gate is not switched. Near 1 everywhere, the gate does nothing.",
        series(f"avg by (layer) ({of_layers('sluice_gate_mean')})", "{{layer}}"),
        "percentunit", need=needs.GATE, size=size, decimals=0, bounds=(0, 1), scheme="Viridis",
    )  # fmt: skip


def time_to_first_token(size: tuple[int, int] = (8, 8)) -> Panel:
    """VLLM's time to first token."""
    name = "vllm:time_to_first_token_seconds"
    return timeseries(
        "Time to first token",
        "vLLM's own measurement, median and 95th percentile over the selected engines.",
        "As before a switch. In a switch everything in flight is computed again, which shows as one peak.",
        [series(quantile(share, name, "model_name"), f"p{share * 100:.0f} {{{{model_name}}}}")
         for share in (0.5, 0.95)],
        "s", size=size,
    )  # fmt: skip


def inter_token_latency(size: tuple[int, int] = (8, 8)) -> Panel:
    """VLLM's time between tokens."""
    name = "vllm:inter_token_latency_seconds"
    return timeseries(
        "Inter-token latency",
        "vLLM's own measurement, median and 95th percentile over the selected engines.",
        "As before a switch: switching an installed patch never recompiles, so a lasting change has another cause.",
        [series(quantile(share, name, "model_name"), f"p{share * 100:.0f} {{{{model_name}}}}")
         for share in (0.5, 0.95)],
        "s", size=size,
    )  # fmt: skip


def throughput(size: tuple[int, int] = (8, 8)) -> Panel:
    """Tokens per second, from vLLM."""
    return timeseries(
        "Throughput",
        "Tokens that vLLM generated and prompt tokens that it took in, per second.",
        "As before a switch, under the same load.",
        [series(f"sum by (model_name) ({rate(of('vllm:generation_tokens_total'))})", "generated {{model_name}}"),
         series(f"sum by (model_name) ({rate(of('vllm:prompt_tokens_total'))})", "prompt {{model_name}}")],
        "short", size=size,
    )  # fmt: skip
