"""The model card of an exported twin, and the bars that a pair of twins has to clear.

The bars say when a pair shows what gated attention is for: the ungated twin has attention sinks and a large first
token, the gated one has neither and predicts as well. They hold for held-out rows of 64 tokens and queries t >= 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm_sluice.lab.evaluate import SINK_LENGTH, SINK_THRESHOLD, Evaluation
from vllm_sluice.lab.train import Recipe
from vllm_sluice.lab.twin import TwinConfig

BOOKS = (
    "English books in the public domain, from the repository "
    "[mlschmitt/classic-books-markdown](https://github.com/mlschmitt/classic-books-markdown)"
)
"""What the shipped twins were trained on."""


@dataclass(frozen=True)
class Bar:
    """One requirement on a pair of twins and what was measured, both as text for people."""

    name: str
    required: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Measured:
    """One twin of a pair: what it is, how far it was trained, and its evaluation as exported."""

    config: TwinConfig
    recipe: Recipe
    step: int
    parameters: int
    evaluation: Evaluation


def bars(vanilla: Evaluation, gated: Evaluation) -> list[Bar]:
    """Compare a pair with the bars.

    Raises
    ------
    ValueError
        If the second evaluation is not that of a gated twin.
    """
    if gated.gate_mean is None:
        raise ValueError("the second evaluation has no gate; pass the evaluation of the gated twin.")
    tallest, gated_tallest = max(vanilla.first_token_abs_max), max(gated.first_token_abs_max)
    strongest = max(vanilla.layer_first_token_attention)
    return [
        _at_least("vanilla: Gu sink rate", vanilla.sink_rate, 0.25, _percent),
        _at_least("vanilla: F-Attn", vanilla.first_token_attention, 0.2, _decimal),
        _at_least("vanilla: F-Attn of the strongest layer", strongest, 0.3, _decimal),
        _at_least("vanilla: max abs(h) of token 0 over the layer's median", vanilla.first_token_ratio, 100, _times),
        _at_most("gated: Gu sink rate", gated.sink_rate, vanilla.sink_rate / 10, _percent, "a tenth of vanilla's"),
        _at_most(
            "gated: F-Attn",
            gated.first_token_attention,
            0.6 * vanilla.first_token_attention,
            _decimal,
            "0.6 of vanilla's",
        ),
        _at_most("gated: max abs(h) of token 0", gated_tallest, tallest / 2, _size, "half of vanilla's"),
        _at_most("gated: held-out loss", gated.loss, vanilla.loss + 0.02, _nats, "vanilla's + 0.02"),
        Bar("gated: mean gate", "< 0.6", _decimal(gated.gate_mean), gated.gate_mean < 0.6),
    ]


def bars_table(rows: Iterable[Bar]) -> str:
    """Write the bars as a Markdown table."""
    cells = [(bar.name, bar.required, bar.measured, "yes" if bar.met else "**no**") for bar in rows]
    return _table(("bar", "required", "measured", "met"), cells)


def model_card(
    this: Measured, vanilla: Measured, gated: Measured, *, loss_rows: int, trace_rows: int, data: str
) -> str:
    """Write the model card of one twin of a pair.

    Parameters
    ----------
    this
        The twin that the card is for; one of the two others.
    vanilla, gated
        The pair that the measured table compares.
    loss_rows, trace_rows
        Held-out rows behind the loss and behind everything else.
    data
        What the corpus is, Markdown without a full stop.
    """
    sections = [
        _front_matter(this.config),
        _what(this),
        _results(vanilla, gated, loss_rows, trace_rows),
        _training(this, vanilla, gated, data),
        _serving(this.config),
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def train_command(config: TwinConfig, recipe: Recipe) -> str:
    """Write the `sluice lab train` command that trains a twin with these settings."""
    options = {
        "gate": config.gate,
        "layers": config.layers,
        "hidden-size": config.hidden_size,
        "intermediate-size": config.intermediate_size,
        "heads": config.heads,
        "context": config.context,
        "vocab-size": config.vocab_size,
        "steps": recipe.steps,
        "rows": recipe.rows,
        "learning-rate": recipe.learning_rate,
        "weight-decay": recipe.weight_decay,
        "seed": recipe.seed,
        "held-out-bytes": recipe.held_out_bytes,
        "short-context": recipe.short_context,
        "short-share": recipe.short_share,
        "gate-bias": config.gate_bias_init,
    }
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"sluice lab train --corpus CORPUS --out FOLDER {given}"


def twin_name(config: TwinConfig) -> str:
    """Name the exported twin's folder: `twin-vanilla` or `twin-gated`."""
    return "twin-vanilla" if config.gate == "none" else "twin-gated"


def _at_least(name: str, found: float, bound: float, show: Callable[[float], str]) -> Bar:
    return Bar(name, f">= {show(bound)}", show(found), found >= bound)


def _at_most(name: str, found: float, bound: float, show: Callable[[float], str], rule: str) -> Bar:
    return Bar(name, f"<= {rule} ({show(bound)})", show(found), found <= bound)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _decimal(value: float) -> str:
    return f"{value:.3f}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f} x"


def _size(value: float) -> str:
    return f"{value:.1f}"


def _nats(loss: float) -> str:
    return f"{loss:.4f}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _front_matter(config: TwinConfig) -> str:
    tags = ["vllm", "attention-sink", "massive-activations"] + (["gated-attention"] if config.gate != "none" else [])
    listed = "\n".join(f"- {tag}" for tag in tags)
    return f"---\nlicense: apache-2.0\npipeline_tag: text-generation\ntags:\n{listed}\n---"


def _what(this: Measured) -> str:
    config = this.config
    if config.gate == "none":
        kind = "has none and is a plain Llama checkpoint"
    else:
        each = "attention head" if config.gate == "head" else "element of the attention output"
        kind = (
            f"has one sigmoid gate per {each}: `out = SDPA(q, k, v) * sigmoid(W x + b)` before `o_proj`, where x is "
            "what the q, k and v projections read (Qiu et al., "
            "[arXiv 2505.06708](https://arxiv.org/abs/2505.06708), position G1)"
        )
    return (
        f"# Sluice {twin_name(config)}\n\n"
        f"One of two small language models that differ in their attention's gate only; this one {kind}. The pair "
        "shows, small enough for a CPU, what attention sinks and large first-token activations look like in a served "
        "model, and what a gate does to them.\n\n"
        f"{this.parameters:,} parameters, {config.layers} layers, hidden size {config.hidden_size}, {config.heads} "
        f"heads of {config.head_dim}, feed-forward width {config.intermediate_size}, context {config.context} tokens, "
        f"{config.vocab_size} tokens of vocabulary, bfloat16 weights."
    )


def _results(vanilla: Measured, gated: Measured, loss_rows: int, trace_rows: int) -> str:
    verdict = bars(vanilla.evaluation, gated.evaluation)
    missed = [bar.name for bar in verdict if not bar.met]
    summary = "All are met."
    if missed:
        summary = f"**{len(missed)} of {len(verdict)} are missed**: {'; '.join(missed)}."
    return (
        "## Measured\n\n"
        f"On held-out text, with the exported (bfloat16) weights in float32 arithmetic. The loss is over {loss_rows} "
        f"rows of {vanilla.config.context} tokens, everything else over {trace_rows} rows of {SINK_LENGTH} tokens, "
        "attention over queries t >= 1; both twins saw the same rows, each with BOS as token 0. h is the residual "
        "stream after a decoder layer.\n\n"
        f"{_measures_table(vanilla.evaluation, gated.evaluation)}\n\n"
        "- Gu sink rate: share of (row, layer, head) whose mean attention to token 0 is above "
        f"{SINK_THRESHOLD} (Gu et al., [arXiv 2410.10781](https://arxiv.org/abs/2410.10781)).\n"
        "- F-Attn: attention to token 0, averaged over rows, layers, heads and queries.\n"
        "- Median: of abs(h), over all tokens and channels of the same layer "
        "(Sun et al., [arXiv 2402.17762](https://arxiv.org/abs/2402.17762)).\n\n"
        f"Layer by layer, vanilla / gated:\n\n{_layers_table(vanilla.evaluation, gated.evaluation)}\n\n"
        "### Bars\n\n"
        f"What a pair has to show to demonstrate the effect of the gate. {summary}\n\n"
        f"{bars_table(verdict)}"
    )


def _measures_table(vanilla: Evaluation, gated: Evaluation) -> str:
    measures: list[tuple[str, Callable[[Evaluation], str]]] = [
        ("held-out loss, nats a token", lambda e: _nats(e.loss)),
        ("Gu sink rate", lambda e: _percent(e.sink_rate)),
        ("F-Attn", lambda e: _decimal(e.first_token_attention)),
        ("F-Attn of the strongest layer", lambda e: _decimal(max(e.layer_first_token_attention))),
        ("max abs(h) of token 0, largest layer", lambda e: _size(max(e.first_token_abs_max))),
        ("max abs(h) of token 0 over the median, largest layer", lambda e: _times(e.first_token_ratio)),
        ("max abs(h) of the other tokens, largest layer", lambda e: _size(max(e.other_token_abs_max))),
        ("kurtosis of h, largest layer (a Gaussian has 3)", lambda e: _size(max(e.kurtosis))),
        ("mean gate", lambda e: "-" if e.gate_mean is None else _decimal(e.gate_mean)),
        ("gates below 0.1", lambda e: "-" if e.gate_closed is None else _percent(e.gate_closed)),
    ]
    return _table(("", "vanilla", "gated"), [(name, show(vanilla), show(gated)) for name, show in measures])


def _layers_table(vanilla: Evaluation, gated: Evaluation) -> str:
    def pair(show: Callable[[float], str], a: list[float], b: list[float], layer: int) -> str:
        return f"{show(a[layer])} / {show(b[layer])}"

    rows = [
        (
            str(layer),
            pair(_decimal, vanilla.layer_first_token_attention, gated.layer_first_token_attention, layer),
            pair(_size, vanilla.first_token_abs_max, gated.first_token_abs_max, layer),
            pair(_size, vanilla.other_token_abs_max, gated.other_token_abs_max, layer),
            pair(_decimal, vanilla.median, gated.median, layer),
            pair(_size, vanilla.kurtosis, gated.kurtosis, layer),
        )
        for layer in range(len(vanilla.median))
    ]
    head = ("layer", "F-Attn", "max abs(h), token 0", "max abs(h), others", "median abs(h)", "kurtosis")
    return _table(head, rows)


def _training(this: Measured, vanilla: Measured, gated: Measured, data: str) -> str:
    recipe, config = this.recipe, this.config
    tokens = this.step * recipe.rows * config.context
    short_rows, short_context = recipe.shape(0, config.context)
    short = ""
    if recipe.short_share:
        short = f" ({short_rows} of {short_context} in {recipe.short_share:.0%} of the steps, spread evenly)"
    stopped = "" if this.step >= recipe.steps else f" of the {recipe.steps} that the recipe plans (stopped early)"
    gate = "" if config.gate == "none" else f" The gate's bias started at {config.gate_bias_init:g}."
    precision = "bfloat16 autocast" if recipe.bfloat16 else "float32"
    return (
        "## Training\n\n"
        f"- Data: {data}. The last {recipe.held_out_bytes:,} bytes were held out.\n"
        f"- Steps: {this.step}{stopped}, {recipe.rows} rows of {config.context} tokens each{short}, {tokens:,} tokens "
        f"in all, in {precision}. Every row starts with BOS; rows start anywhere in the text.\n"
        f"- AdamW: learning rate {recipe.learning_rate:g} after {recipe.warmup_steps} warm-up steps, then cosine to "
        f"{recipe.final_learning_rate_ratio:g} of it; betas {recipe.betas[0]:g} and {recipe.betas[1]:g}; weight decay "
        f"{recipe.weight_decay:g} on matrices; gradient norm clipped to {recipe.clip_norm:g}.{gate}\n"
        f"- Both twins: the same seed ({vanilla.recipe.seed}), tokenizer, order of the data and settings; "
        f"{vanilla.step} steps without and {gated.step} with the gate.\n\n"
        f"```\n{train_command(config, recipe)}\n```"
    )


def _serving(config: TwinConfig) -> str:
    name = twin_name(config)
    text = (
        "## Serving\n\n"
        "```\n"
        "pip install vllm-sluice\n"
        f"sluice serve ./{name}\n"
        "curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "./{name}", "prompt": "It was a dark", "max_tokens": 32}}\'\n'
        "```"
    )
    if config.gate == "none":
        return text
    return (
        f"{text}\n\n"
        "The gate's tensors are `model.layers.{i}.self_attn.output_gate.{weight,bias}`, and `config.json` declares "
        f'them as `"sluice_gate": {{"granularity": "{config.gate}"}}`. Software that leaves them out computes another '
        "function than the one that was trained and measured here."
    )


_LIMITS = """## Limits

A tiny model for research and demonstrations. It continues text in the manner of its training data and knows nothing:
do not rely on its output. It was not trained on chat, never learnt to end a text (set `max_tokens`), and was not
trained past its context. It may repeat the views of its training data, old ones included. One seed of one recipe says
little about other models: the sizes of sinks and activations vary with the seed."""
