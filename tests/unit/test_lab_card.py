"""The bars' verdict and the model card."""

from dataclasses import replace

import pytest

from vllm_sluice.lab.card import Measured, bars, bars_table, model_card
from vllm_sluice.lab.evaluate import Evaluation
from vllm_sluice.lab.train import Recipe
from vllm_sluice.lab.twin import TwinConfig

VANILLA = Evaluation(
    loss=3.5,
    sink_rate=0.5,
    first_token_attention=0.4,
    layer_first_token_attention=[0.1, 0.7],
    first_token_abs_max=[20.0, 400.0],
    other_token_abs_max=[3.0, 5.0],
    median=[0.5, 1.0],
    kurtosis=[4.0, 900.0],
    first_token_ratio=400.0,
    gate_mean=None,
    gate_closed=None,
)
GATED = replace(
    VANILLA,
    sink_rate=0.01,
    first_token_attention=0.1,
    layer_first_token_attention=[0.05, 0.15],
    first_token_abs_max=[4.0, 9.0],
    first_token_ratio=9.0,
    gate_mean=0.25,
    gate_closed=0.125,
)


def missed(vanilla, gated):
    return [bar.name for bar in bars(vanilla, gated) if not bar.met]


def test_a_pair_that_clears_every_bar():
    assert missed(VANILLA, GATED) == []
    assert len(bars(VANILLA, GATED)) == 9


@pytest.mark.parametrize(
    ("side", "change", "name"),
    [
        ("vanilla", {"sink_rate": 0.24}, "vanilla: Gu sink rate"),
        ("vanilla", {"first_token_attention": 0.19}, "vanilla: F-Attn"),
        ("vanilla", {"layer_first_token_attention": [0.29, 0.1]}, "vanilla: F-Attn of the strongest layer"),
        ("vanilla", {"first_token_ratio": 99.0}, "vanilla: max abs(h) of token 0 over the layer's median"),
        ("gated", {"sink_rate": 0.051}, "gated: Gu sink rate"),
        ("gated", {"first_token_attention": 0.241}, "gated: F-Attn"),
        ("gated", {"first_token_abs_max": [4.0, 201.0]}, "gated: max abs(h) of token 0"),
        ("gated", {"loss": 3.5201}, "gated: held-out loss"),
        ("gated", {"gate_mean": 0.6}, "gated: mean gate"),
        ("gated", {"loss": float("nan")}, "gated: held-out loss"),
    ],
)
def test_each_bar_fails_alone(side, change, name):
    vanilla = replace(VANILLA, **change) if side == "vanilla" else VANILLA
    gated = replace(GATED, **change) if side == "gated" else GATED
    assert missed(vanilla, gated) == [name]


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("vanilla", {"sink_rate": 0.25}),
        ("vanilla", {"first_token_attention": 0.2}),
        ("vanilla", {"layer_first_token_attention": [0.3, 0.1]}),
        ("vanilla", {"first_token_ratio": 100.0}),
        ("gated", {"sink_rate": 0.05}),
        ("gated", {"first_token_abs_max": [4.0, 200.0]}),
        ("gated", {"loss": 3.52}),
    ],
)
def test_a_value_at_the_bar_clears_it(side, change):
    vanilla = replace(VANILLA, **change) if side == "vanilla" else VANILLA
    gated = replace(GATED, **change) if side == "gated" else GATED
    assert missed(vanilla, gated) == []


def test_bars_state_requirement_and_measurement():
    by_name = {bar.name: bar for bar in bars(VANILLA, GATED)}
    assert by_name["gated: Gu sink rate"].required == "<= a tenth of vanilla's (5.00 %)"
    assert by_name["gated: Gu sink rate"].measured == "1.00 %"
    assert by_name["vanilla: max abs(h) of token 0 over the layer's median"].measured == "400 x"
    assert by_name["gated: held-out loss"].required == "<= vanilla's + 0.02 (3.5200)"


def test_bars_want_the_gated_twin_second():
    with pytest.raises(ValueError, match="the second evaluation has no gate"):
        bars(GATED, VANILLA)


def pair(vanilla=VANILLA, gated=GATED, step=12_000):
    recipe = Recipe()
    return (
        Measured(TwinConfig(), recipe, step, 6_000_000, vanilla),
        Measured(TwinConfig(gate="head"), recipe, step, 6_100_000, gated),
    )


def card(this, vanilla, gated):
    return model_card(this, vanilla, gated, loss_rows=128, trace_rows=64, data="some books")


def test_cards_hold_both_twins_measurements():
    vanilla, gated = pair()
    for this in (vanilla, gated):
        text = card(this, vanilla, gated)
        for line in (
            "| held-out loss, nats a token | 3.5000 | 3.5000 |",
            "| Gu sink rate | 50.00 % | 1.00 % |",
            "| F-Attn | 0.400 | 0.100 |",
            "| max abs(h) of token 0 over the median, largest layer | 400 x | 9 x |",
            "| mean gate | - | 0.250 |",
            "| gates below 0.1 | - | 12.50 % |",
            "| 1 | 0.700 / 0.150 | 400.0 / 9.0 | 5.0 / 5.0 | 1.000 / 1.000 | 900.0 / 900.0 |",
            "- Data: some books. The last 2,000,000 bytes were held out.",
        ):
            assert line in text, line
        assert bars_table(bars(VANILLA, GATED)) in text
        assert "All are met." in text
        assert "sluice serve ./twin-" in text
    assert "6,000,000 parameters" in card(vanilla, vanilla, gated)
    assert "6,100,000 parameters" in card(gated, vanilla, gated)


def test_only_the_gated_card_explains_the_gate():
    vanilla, gated = pair()
    assert "sluice serve ./twin-gated" in card(gated, vanilla, gated)
    assert '`"sluice_gate": {"granularity": "head"}`' in card(gated, vanilla, gated)
    assert "bias started at -1" in card(gated, vanilla, gated)
    assert "output_gate" not in card(vanilla, vanilla, gated)


def test_a_card_says_which_bars_are_missed():
    vanilla, gated = pair(gated=replace(GATED, sink_rate=0.3, gate_mean=0.7))
    text = card(gated, vanilla, gated)
    assert "**2 of 9 are missed**: gated: Gu sink rate; gated: mean gate." in text
    assert "| gated: mean gate | < 0.6 | 0.700 | **no** |" in text
    assert "All are met" not in text


def test_a_card_tells_of_short_rows():
    vanilla, gated = pair()
    assert "3 rows of 512 tokens each, 18,432,000 tokens in all" in card(gated, vanilla, gated)
    short = replace(gated, recipe=Recipe(short_context=128, short_share=0.8))
    assert "each (12 of 128 in 80% of the steps, spread evenly), 18," in card(short, vanilla, short)


def test_a_card_says_that_training_stopped_early():
    vanilla, gated = pair(step=3000)
    assert "Steps: 3000 of the 12000 that the recipe plans (stopped early)" in card(gated, vanilla, gated)
    vanilla, gated = pair()
    assert "stopped early" not in card(gated, vanilla, gated)
