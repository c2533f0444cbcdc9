"""Quantization: headroom, clipped share and signal-to-noise ratio, by format and scale."""

from __future__ import annotations

from typing import Any

from sluice_boards import needs
from sluice_boards.board import Row, board, query_variable
from sluice_boards.panels import Panel, bar_gauge, below, column, layer_heatmap, stat, steps, table, timeseries
from sluice_boards.queries import equal, now, of, of_layers, rate, rows, series

_SITE = 'site=~"$site"'
_FORMAT = equal("format", "$format")
_CHOSEN = (_FORMAT, equal("scale", "$scale"))
_WHERE = (
    "Sites: hidden is the hidden state, attention_input and mlp_input are what the projections multiply, "
    "which is what a quantized model rounds."
)
_DECIBELS = "suffix:dB"
_GOOD_SNR = 30.0
_POOR_SNR = 20.0
_STATIC_ROOM = below(0.8, 0.95)
"""A static scale ends at the baseline's largest value, so healthy is about 1; below 0.8 is the alert's bound."""
_ABOUT_ONE = "About 1, where the baseline's range ends. Below 0.8, a quarter too large, the alert tells."


def build() -> dict[str, Any]:
    """Return the board."""
    snr = of("sluice_quantization_snr_decibels")
    return board(
        "sluice-quantization", "Quantization",
        "What INT8 and FP8 would do to the activations of the live traffic: room, clipping and noise. "
        "Needs the quantization probe.",
        [
            Row("Now, worst layer (needs the quantization probe)", _tiles()),
            Row("Signal to noise", [_snr_heatmap(), _snr_formats(), _snr_now(), _snr_table()]),
            Row("Room without scaling", [_room("serving", "none"), _room("fp8_e4m3", "none")]),
            Row("Static scales (needs a baseline)", _static()),
        ],
        layer=True,
        variables=[
            query_variable("site", "Site", f"label_values({snr}, site)"),
            query_variable("format", "Format", f"label_values({snr}, format)", several=False),
            query_variable("scale", "Scale", f"label_values({of('sluice_quantization_snr_decibels', _FORMAT)}, scale)",
                           several=False),
        ],
    )  # fmt: skip


def _headroom(form: str, scale: str) -> str:
    return of_layers("sluice_quantization_headroom_ratio", _SITE, equal("format", form), equal("scale", scale))


def _snr(*matchers: str) -> str:
    return of_layers("sluice_quantization_snr_decibels", _SITE, *matchers)


def _clipped_share(labels: str) -> str:
    clipped, seen = (
        f"sum by ({labels}) ({rate(of_layers(f'sluice_quantization_{name}_total', _SITE))})"
        for name in ("clipped", "elements")
    )
    return f"{clipped} / ({seen} > 0)"


def _tiles() -> list[Panel]:
    def room(title: str, form: str, scale: str, what: str, need: needs.Need = needs.QUANTIZATION) -> Panel:
        static = scale == "static"
        return stat(
            title, f"Largest number that {what} can hold, divided by the largest absolute value seen.",
            _ABOUT_ONE if static else "Above 1; below, values are clipped.",
            now(f"min({_headroom(form, scale)})", "headroom"), "suffix:×",
            colours=_STATIC_ROOM if static else below(1, 2), need=need, decimals=2, width=4, plenty=("> 1000 ×", 1000),
            alert="SluiceServingRangeSaturated" if form == "serving" else "SluiceQuantizationRangeExceeded",
        )  # fmt: skip

    def noise(form: str, name: str) -> Panel:
        return stat(
            f"{name} SNR", f"Signal to quantization noise of {name} with one scale a tensor, worst layer and site.",
            f"Above {_GOOD_SNR:g} dB; below {_POOR_SNR:g} dB expect a worse model.",
            now(f"min({_snr(equal('format', form), equal('scale', 'per_tensor'))})", "SNR"), _DECIBELS,
            colours=below(_POOR_SNR, _GOOD_SNR), need=needs.QUANTIZATION, decimals=1, width=4,
        )  # fmt: skip

    return [
        room("Serving dtype headroom", "serving", "none", "the dtype that the model is served in"),
        room("FP8 cast headroom", "fp8_e4m3", "none", "FP8-E4M3 without a scale (448)"),
        room("INT8 static headroom", "int8", "static", "INT8 with the baseline's scale", needs.STATIC),
        stat("Clipped by static scales",
             "Share of entries beyond the baseline's range, over the selected layers and sites.",
             "0 %; a little is the price of a scale that was chosen to clip.",
             now(f"sum({rate(of_layers('sluice_quantization_clipped_total', _SITE))}) / "
                 f"(sum({rate(of_layers('sluice_quantization_elements_total', _SITE))}) > 0)", "clipped"),
             "percentunit", colours=steps(orange=1e-6, red=1e-3), alert="SluiceQuantizationRangeExceeded",
             need=needs.STATIC, width=4),
        noise("int8", "INT8"),
        noise("fp8_e4m3", "FP8"),
    ]  # fmt: skip


def _snr_heatmap() -> Panel:
    return layer_heatmap(
        "SNR by layer, chosen format and scale",
        f"Signal to quantization noise in dB of the format and scale chosen above, worst site. {_WHERE}",
        f"Above {_GOOD_SNR:g} dB. Bright rows are low: the layers to keep in a wider format.",
        series(f"min by (layer) ({_snr(*_CHOSEN)})", "{{layer}}"),
        _DECIBELS, need=needs.QUANTIZATION, decimals=1, low_is_bad=True,
    )  # fmt: skip


def _snr_formats() -> Panel:
    return timeseries(
        "SNR of the worst layer, by format and scale",
        "Lowest signal to quantization noise of the selected layers and sites. One scale a token costs more at run "
        "time and is better where few tokens are large.",
        f"Above {_GOOD_SNR:g} dB. FP8 hardly depends on outliers, INT8 with one scale a tensor does.",
        series(f"min by (format, scale) ({_snr()})", "{{format}} {{scale}}"),
        _DECIBELS, need=needs.QUANTIZATION, size=(12, 10), least=None, limit=below(_POOR_SNR, _GOOD_SNR),
    )  # fmt: skip


def _snr_now() -> Panel:
    return bar_gauge(
        "SNR now, chosen format and scale", "One bar a layer, worst site.", f"Above {_GOOD_SNR:g} dB.",
        now(f"min by (layer) ({_snr(*_CHOSEN)})", "{{layer}}"),
        _DECIBELS, colours=below(_POOR_SNR, _GOOD_SNR), need=needs.QUANTIZATION, decimals=1, most=60,
    )  # fmt: skip


def _snr_table() -> Panel:
    def one(heading: str, form: str, scale: str) -> dict[str, Any]:
        expr = f"min by (layer, site) ({_snr(equal('format', form), equal('scale', scale))})"
        return column(heading, rows(expr), _DECIBELS, decimals=1, colours=below(_POOR_SNR, _GOOD_SNR))

    return table(
        "Layers and sites now",
        f"Signal to quantization noise by layer and site, worst first. {_WHERE}",
        f"Above {_GOOD_SNR:g} dB.",
        [one("INT8 per tensor", "int8", "per_tensor"), one("INT8 per token", "int8", "per_token"),
         one("FP8 per tensor", "fp8_e4m3", "per_tensor"), one("FP8 per token", "fp8_e4m3", "per_token")],
        labels={"layer": "layer", "site": "site"}, sort="INT8 per tensor", need=needs.QUANTIZATION, size=(12, 10),
    )  # fmt: skip


def _room(form: str, scale: str) -> Panel:
    name = {"serving": "the serving dtype", "fp8_e4m3": "an FP8 cast"}[form]
    return layer_heatmap(
        f"Room in {name} by layer",
        f"Largest number that {name} can hold, divided by the largest absolute value seen, worst site. Colour is the "
        "logarithm to base 10: 0 is the limit, below it values are clipped. Bright is low.",
        "Above 0.3, which is twice.",
        series(f"log10(min by (layer) ({_headroom(form, scale)}) > 0)", "{{layer}}"),
        "none", need=needs.QUANTIZATION, low_is_bad=True, bounds=(0, 4) if form == "serving" else (-1, 2),
        alert="SluiceServingRangeSaturated" if form == "serving" else "",
    )  # fmt: skip


def _static() -> list[Panel]:
    return [
        timeseries(
            "Clipped share by site",
            "Entries beyond the range that the baseline recorded, divided by the entries looked at. The same for INT8 "
            "and FP8, whose static scales both end there.",
            "0 %.",
            series(_clipped_share("site"), "{{site}}"),
            "percentunit", need=needs.STATIC, alert="SluiceQuantizationRangeExceeded",
        ),
        table(
            "Worst static layers now",
            "Layers with the least room under the baseline's scales, and what is clipped.",
            _ABOUT_ONE,
            [
                column("INT8 headroom", rows(f"min by (layer, site) ({_headroom('int8', 'static')})"), "suffix:×",
                       decimals=2, colours=_STATIC_ROOM),
                column("FP8 headroom", rows(f"min by (layer, site) ({_headroom('fp8_e4m3', 'static')})"), "suffix:×",
                       decimals=2, colours=_STATIC_ROOM),
                column("clipped share", rows(_clipped_share("layer, site")), "percentunit", decimals=4),
            ],
            labels={"layer": "layer", "site": "site"}, sort="INT8 headroom", need=needs.STATIC, size=(12, 8),
            alert="SluiceQuantizationRangeExceeded",
        ),
    ]  # fmt: skip
