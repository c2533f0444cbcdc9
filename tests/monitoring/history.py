"""A made-up history with known faults, as OpenMetrics text: what Prometheus would hold after 90 minutes.

Three engines of two models on two instances. Every metric of the catalogue occurs; the faults and their times are in
`FAULTS`, so that a test can say what a board or a rule must show. Times and values are written in full precision: a
rounded timestamp of a switch is another time.

    python -m tests.monitoring.history > history.txt
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from vllm_sluice.telemetry.catalogue import BY_NAME as METRICS

START = 1_790_000_000
"""Unix time of the first sample; fixed, so that every run is the same."""
STEP = 20
MINUTES = 90
END = START + MINUTES * 60

FAULTS: dict[str, tuple[float, float]] = {
    # What, and the minutes from which and until which it lasts; `MINUTES` is to the end.
    "idle": (5, 12),
    "non-finite": (40, 43),
    "drift": (45, MINUTES),
    "saturated": (80, MINUTES),
    "clipped": (55, MINUTES),
    "probe errors": (70, 72),
    "cost high": (75, MINUTES),
    "file broken": (82, MINUTES),
    "stale": (84, MINUTES),
    "rank behind": (86, MINUTES),
    "paused": (87, MINUTES),
}
SWITCHES = (20.0, 32.0, 60.0, 70.0)
"""Minutes at which the gate of the gated model is switched, off first."""
TRIAL = (30.0, 32.0)
POSITIONS = ("start", "delimiter", "other")
SITES = ("hidden", "attention_input", "mlp_input")
HEADROOM = {
    ("serving", "none"): None, ("fp8_e4m3", "none"): 448.0, ("int8", "static"): 0.0, ("fp8_e4m3", "static"): 0.0,
}  # fmt: skip
SNR = {
    ("int8", "per_tensor"): 18.0, ("int8", "per_token"): 33.0, ("int8", "static"): 17.0,
    ("fp8_e4m3", "per_tensor"): 31.0, ("fp8_e4m3", "per_token"): 31.5, ("fp8_e4m3", "static"): 30.5,
}  # fmt: skip

Labels = dict[str, str]
Value = Callable[[float], float | None]
"""Minutes since `START` to a value, or None where there is no sample."""


@dataclass(frozen=True)
class Engine:
    """One engine of the history: `gated` can be switched; the faulty ones carry the faults."""

    model_name: str
    instance: str
    engine: str
    layers: int
    gated: bool
    dtype_max: float

    @property
    def labels(self) -> Labels:
        """Labels of all its series."""
        return {"job": "vllm", "instance": self.instance, "model_name": self.model_name, "engine": self.engine}


STEADY = Engine("gated-8b", "10.0.0.1:8000", "0", 12, True, 3.3895313892515355e38)
BROKEN = Engine("gated-8b", "10.0.0.1:8000", "1", 12, True, 3.3895313892515355e38)
DRIFTING = Engine("vanilla-4b", "10.0.0.2:8000", "0", 10, False, 65504.0)
ENGINES = (STEADY, BROKEN, DRIFTING)
BROKEN_LAYER = 5
DRIFTING_LAYER = 7


@dataclass(frozen=True)
class Series:
    """One series: name, labels, and its value at a time."""

    name: str
    labels: Labels
    value: Value


def during(fault: str, minute: float) -> bool:
    """Tell whether a fault is there at a time."""
    first, last = FAULTS[fault]
    return first <= minute < last or (last == MINUTES and minute >= first)


def gate_on(minute: float) -> bool:
    """Tell whether the gate acts at a time; it does at first."""
    return sum(minute >= switch for switch in SWITCHES) % 2 == 0


def write(out: TextIO) -> None:
    """Write the whole history."""
    families: dict[str, list[Series]] = {}
    for series in all_series():
        families.setdefault(family(series.name), []).append(series)
    for name, members in families.items():
        out.write(f"# TYPE {name} {kind(members[0].name)}\n")
        for series in members:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(series.labels.items()))
            for time in range(START, END + 1, STEP):
                value = series.value((time - START) / 60)
                if value is not None:
                    out.write(f"{series.name}{{{labels}}} {value!r} {time}\n")
    out.write("# EOF\n")


def all_series() -> Iterator[Series]:
    """Yield every series of every engine, and what Prometheus itself adds."""
    for engine in ENGINES:
        for make in (_hidden_states, _attention, _gates, _massive, _quantization, _baseline, _patches, _monitor, _vllm):
            for name, labels, value in make(engine):
                yield Series(name, {**engine.labels, **labels}, value)
    for instance in sorted({engine.instance for engine in ENGINES}):
        target = {"job": "vllm", "instance": instance}
        yield Series("up", target, lambda _: 1.0)
        yield Series("scrape_duration_seconds", target, lambda minute: 0.02 + 0.005 * math.sin(minute))
    yield from _alerts()


Made = Iterator[tuple[str, Labels, Value]]


def _window(engine: Engine, value: Callable[[float], float]) -> Value:
    """Leave a windowed value out while the engine is idle."""
    return lambda minute: None if engine is STEADY and during("idle", minute) else value(minute)


def _wave(minute: float, seed: float, depth: float = 0.04) -> float:
    return 1 + depth * math.sin(minute / 3 + seed) + depth / 2 * math.sin(minute * 1.7 + 3 * seed)


def _largest(engine: Engine, layer: int, minute: float) -> float:
    massive = 2 <= layer < engine.layers - 1
    value = (6.0 + layer) if not massive else 40.0 if engine.gated and gate_on(minute) else 420.0
    value *= _wave(minute, layer)
    if engine is DRIFTING and layer == DRIFTING_LAYER:
        if during("saturated", minute):
            return 62000.0 * _wave(minute, layer, 0.01)
        if during("drift", minute):
            value *= 1 + (minute - FAULTS["drift"][0]) / 10
    return value


def _sinks(engine: Engine, layer: int, minute: float) -> float:
    depth = 1 - math.exp(-layer / 3)
    return (0.06 if engine.gated and gate_on(minute) else 0.55) * depth * _wave(minute, layer) + 0.02


def _label(layer: int) -> Labels:
    return {"layer": f"{layer:03d}"}


def _hidden_states(engine: Engine) -> Made:
    for layer in range(engine.layers):
        median = 0.4 + 0.03 * layer

        def largest(minute: float, layer: int = layer) -> float:
            return _largest(engine, layer, minute)

        def ratio(minute: float, layer: int = layer, median: float = median) -> float:
            return _largest(engine, layer, minute) / (median * _wave(minute, layer, 0.01))

        def spoiled(minute: float, layer: int = layer) -> float:
            first, last = FAULTS["non-finite"]
            here = engine is BROKEN and layer == BROKEN_LAYER
            return 21.0 * round((min(max(minute, first), last) - first) * 60 / STEP) if here else 0.0

        def rms(minute: float, median: float = median) -> float:
            return 1.6 * median * _wave(minute, 1, 0.01)

        at = _label(layer)
        yield "sluice_activation_abs_max", at, _window(engine, largest)
        yield "sluice_activation_median", at, _window(engine, lambda m, x=median, n=layer: x * _wave(m, n, 0.01))
        yield "sluice_activation_max_to_median_ratio", at, _window(engine, ratio)
        yield "sluice_activation_rms", at, _window(engine, rms)
        yield "sluice_activation_kurtosis", at, _window(engine, lambda m, f=ratio: 3 + f(m) ** 1.2)
        yield "sluice_nonfinite_total", at, spoiled
        for rank in (1, 2, 3):
            ranked = {**at, "rank": str(rank)}
            channel = float((1009, 77, 2500)[rank - 1] + (layer if rank == 3 else 0))
            yield "sluice_activation_top_abs", ranked, _window(engine, lambda m, f=largest, r=rank: f(m) / r)
            yield "sluice_activation_top_channel", ranked, _window(engine, lambda _, c=channel: c)


def _attention(engine: Engine) -> Made:
    for layer in range(engine.layers):

        def mass(minute: float, layer: int = layer) -> float:
            return _sinks(engine, layer, minute)

        at = _label(layer)
        yield "sluice_attention_sink_mass", at, _window(engine, mass)
        yield "sluice_attention_first4_mass", at, _window(engine, lambda m, f=mass: min(1.0, f(m) * 1.15 + 0.01))
        yield "sluice_attention_sink_heads", at, _window(engine, lambda m, f=mass: float(int(32 * f(m))))
        yield "sluice_attention_heads", at, _window(engine, lambda _: 32.0)
        yield "sluice_attention_entropy_ratio", at, _window(engine, lambda m, f=mass: 0.75 - 0.5 * f(m))


def _gates(engine: Engine) -> Made:
    if not engine.gated:
        return
    for layer in range(engine.layers):
        level = 0.25 + 0.4 * layer / engine.layers
        yield "sluice_gate_mean", _label(layer), _window(engine, lambda m, x=level: x * _wave(m, x))
        yield "sluice_gate_closed_ratio", _label(layer), _window(engine, lambda m, x=level: 0.6 * (1 - x) * _wave(m, x))


def _massive(engine: Engine) -> Made:
    for layer in range(engine.layers):
        for position, share in zip(POSITIONS, (0.9, 0.1, 0.01), strict=True):
            massive = 2 <= layer < engine.layers - 1
            pace = 0.0 if not massive else 60 * share
            labels = {**_label(layer), "position": position}
            yield "sluice_massive_activations_total", labels, lambda m, p=pace: p * m


def _quantization(engine: Engine) -> Made:
    for layer in range(engine.layers):
        for place, site in enumerate(SITES):
            at = {**_label(layer), "site": site}

            def seen(minute: float, layer: int = layer, place: int = place) -> float:
                return _largest(engine, layer, minute) / (1, 8, 5)[place]

            for (form, scale), top in HEADROOM.items():

                def room(minute: float, top: float | None = top, seen: Value = seen) -> float:
                    limit = engine.dtype_max if top is None else top or 1.25 * seen(30)
                    return limit / seen(minute)

                yield ("sluice_quantization_headroom_ratio", {**at, "format": form, "scale": scale},
                       _window(engine, room))  # fmt: skip
            for (form, scale), level in SNR.items():

                def snr(minute: float, level: float = level, form: str = form, layer: int = layer) -> float:
                    outlier = math.log10(_largest(engine, layer, minute))
                    return level - (6.0 * (outlier - 1) if form == "int8" and level < 30 else 0.4 * outlier)

                yield ("sluice_quantization_snr_decibels", {**at, "format": form, "scale": scale},
                       _window(engine, snr))  # fmt: skip

            def clipped(minute: float, here: bool = engine is DRIFTING and layer == DRIFTING_LAYER) -> float:
                return 900.0 * max(0.0, minute - FAULTS["clipped"][0]) if here else 0.0

            yield "sluice_quantization_clipped_total", at, clipped
            yield "sluice_quantization_elements_total", at, lambda m: 4096.0 * 600 * m


def _baseline(engine: Engine) -> Made:
    for patches in ("gate=1", "gate=0") if engine.gated else ("",):

        def in_force(m: float, patches: str = patches) -> float | None:
            return 1.0 if not engine.gated or patches == f"gate={int(gate_on(m))}" else None

        yield "sluice_baseline_info", {"baseline": f"{engine.model_name}-7", "patches": patches}, in_force
    for layer in range(engine.layers):

        def recorded(read: Callable[[float], float]) -> Value:
            # What the engine does under the patch state in force, at a quiet minute of that state.
            return lambda m: read(1.0 if gate_on(m) else 25.0)

        yield ("sluice_baseline_activation_abs_max", _label(layer),
               recorded(lambda m, x=layer: _largest(engine, x, m)))  # fmt: skip
        yield ("sluice_baseline_activation_max_to_median_ratio", _label(layer),
               recorded(lambda m, x=layer: _largest(engine, x, m) / (0.4 + 0.03 * x)))  # fmt: skip
        yield ("sluice_baseline_attention_sink_mass", _label(layer),
               recorded(lambda m, x=layer: _sinks(engine, x, m)))  # fmt: skip


def _patches(engine: Engine) -> Made:
    def generation(minute: float) -> float:
        return 1.0 + (sum(minute >= switch for switch in SWITCHES) if engine.gated else 0)

    def applied(minute: float) -> float:
        return generation(minute) - (1.0 if engine is BROKEN and during("rank behind", minute) else 0.0)

    def changed(minute: float) -> float | None:
        past = [switch for switch in SWITCHES if minute >= switch]
        return START + 60 * past[-1] + 0.25 if past else None

    if engine.gated:
        gate = {"patch": "gate"}
        yield "sluice_patch_installed", gate, lambda _: 1.0
        yield "sluice_patch_enabled", gate, lambda m: float(gate_on(m))
        yield "sluice_patch_parameter", {**gate, "parameter": "temperature"}, lambda _: 1.0
        yield "sluice_patch_parameter", {**gate, "parameter": "floor"}, lambda m: 0.0 if gate_on(m) else 0.05
        yield "sluice_patch_last_change_timestamp_seconds", gate, changed
        yield "sluice_guard_running", gate, lambda m: 1.0 if TRIAL[0] <= m < TRIAL[1] else None
        for group, shift in (("canary", 0.03), ("rest", 0.0)):
            labels = {**gate, "group": group}
            for name, value in (
                ("tokens", lambda m: 40 * (m - TRIAL[0])),
                ("logprob", lambda _, s=shift: -2.3 + s),
                ("nonfinite", lambda _: 0.0),
            ):
                yield (f"sluice_guard_{name}", labels,
                       lambda m, f=value: f(m) if TRIAL[0] <= m < TRIAL[1] else None)  # fmt: skip
    for rank in ("pp0-tp0", "pp0-tp1"):
        yield "sluice_generation", {"rank": rank, "kind": "desired"}, generation
        yield ("sluice_generation", {"rank": rank, "kind": "applied"},
               applied if rank == "pp0-tp1" else generation)  # fmt: skip
    yield "sluice_engine_paused", {}, lambda m: float(engine is DRIFTING and during("paused", m))
    for result in ("applied", "rolled_back", "failed", "tried"):
        yield ("sluice_switches_total", {"result": result},
               (lambda m: generation(m) - 1) if result == "applied" else lambda _: 0.0)  # fmt: skip
    yield "sluice_switch_seconds_total", {}, lambda m: 0.03 * (generation(m) - 1)
    yield "sluice_config_file_good", {}, lambda m: float(not (engine is STEADY and during("file broken", m)))
    yield "sluice_config_restart_needed", {}, lambda m: 2.0 * (engine is STEADY and during("file broken", m))


def _monitor(engine: Engine) -> Made:
    def age(minute: float) -> float:
        stale = engine is DRIFTING and during("stale", minute)
        return 60 * (minute - FAULTS["stale"][0]) if stale else 0.6 + 0.3 * math.sin(minute * 7)

    def errors(minute: float) -> float:
        first, last = FAULTS["probe errors"]
        return 3.0 * round((min(max(minute, first), last) - first) * 60 / STEP) if engine is BROKEN else 0.0

    def spent(share: float) -> Value:
        high = FAULTS["cost high"][0]
        return lambda m: 24 * (share * m + (4 * share * max(0.0, m - high) if engine is DRIFTING else 0.0))

    for rank in ("pp0-tp0", "pp0-tp1"):
        yield "sluice_snapshot_age_seconds", {"rank": rank}, age
    for phase, pace in (("prefill", 9000.0), ("decode", 3000.0)):
        yield "sluice_tokens_observed_total", {"phase": phase}, lambda m, p=pace: p * m
        yield "sluice_queries_sampled_total", {"phase": phase}, lambda m, p=pace: p / 60 * m
    yield "sluice_start_tokens_observed_total", {}, lambda m: 30 * m
    for probe, share in (("residual", 0.008), ("attention", 0.014), ("gate", 0.001), ("quantization", 0.006)):
        yield "sluice_probe_enabled", {"probe": probe}, lambda _: 1.0
        yield "sluice_probe_failed", {"probe": probe}, lambda _: 0.0
        yield "sluice_probe_errors_total", {"probe": probe}, errors if probe == "attention" else lambda _: 0.0
        yield "sluice_probe_seconds_total", {"probe": probe}, spent(share)
    yield "sluice_start_timestamp_seconds", {}, lambda _: 1_000.0
    yield "sluice_forward_seconds_total", {}, lambda m: 24 * m
    yield "sluice_serving_dtype_max", {}, lambda _: engine.dtype_max
    yield "sluice_telemetry_interval_seconds", {}, lambda _: 1.0
    yield "sluice_telemetry_window_seconds", {}, lambda _: 60.0
    yield "sluice_baseline_good", {}, lambda _: 1.0
    yield "sluice_exported_series", {}, lambda _: float(40 + 60 * engine.layers)
    versions = {"version": "0.1.0", "vllm_version": "0.32.0", "fingerprint": f"{engine.layers:08x}"}
    yield "sluice_info", versions, lambda _: 1.0


def _vllm(engine: Engine) -> Made:
    for name, bounds, middle in (
        ("vllm:time_to_first_token_seconds", (0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1.0, math.inf), 0.07),
        ("vllm:inter_token_latency_seconds", (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, math.inf), 0.024),
    ):
        for bound in bounds:
            share = 1.0 if math.isinf(bound) else 1 / (1 + (middle / bound) ** 4)
            labels = {"le": "+Inf" if math.isinf(bound) else repr(bound)}
            yield f"{name}_bucket", labels, lambda m, s=share: round(600 * m * s)
    yield "vllm:generation_tokens_total", {}, lambda m: 3000 * m
    yield "vllm:prompt_tokens_total", {}, lambda m: 9600 * m
    yield "vllm:num_requests_running", {}, _window(engine, lambda m: float(round(4 + 2 * math.sin(m))))


def _alerts() -> Iterator[Series]:
    """Yield what Prometheus stores of alerts that fire; which rule makes them is not the business of the boards."""
    for alert, severity, engine, first in (
        ("SluiceNonFiniteValues", "critical", BROKEN, 41.0),
        ("SluiceActivationDrift", "warning", DRIFTING, 55.0),
        ("SluiceProbeCostHigh", "info", DRIFTING, 80.0),
        ("SluiceServingRangeSaturated", "critical", DRIFTING, 81.0),
        ("SluiceConfigFileBroken", "warning", STEADY, 83.0),
    ):
        last = 60.0 if engine is BROKEN else float(MINUTES)
        labels = {**engine.labels, "alertname": alert, "alertstate": "firing", "severity": severity}
        if alert == "SluiceConfigFileBroken":
            del labels["engine"]  # a file is the server's
        yield Series("ALERTS", labels, lambda m, a=first, b=last: 1.0 if a <= m <= b else None)


def family(name: str) -> str:
    """Return the name of a metric's family."""
    return name.removesuffix("_bucket").removesuffix("_total")


def kind(name: str) -> str:
    """Return a metric's type."""
    if name.endswith("_bucket"):
        return "histogram"
    return "counter" if name.endswith("_total") else "gauge"


def names() -> set[str]:
    """Return the names of Sluice's metrics in the history; a test compares them with the catalogue."""
    return {series.name for series in all_series()} & METRICS.keys()


if __name__ == "__main__":
    write(sys.stdout)
