"""The evaluation against a float64 loop written from the formulas alone."""

import math

import numpy as np
import pytest
import torch

from vllm_sluice.lab.corpus import Rows
from vllm_sluice.lab.evaluate import _EVALUATION_SEED, evaluate
from vllm_sluice.lab.twin import Twin, TwinConfig

LAYERS, HEADS, SIZE, HEAD_DIM = 2, 2, 8, 4
TRACE_ROWS = 3


def build(gate):
    torch.manual_seed(5)
    twin = Twin(
        TwinConfig(
            vocab_size=40, hidden_size=SIZE, layers=LAYERS, heads=HEADS, intermediate_size=12, context=24, gate=gate,
            initializer_range=0.7,
        )
    )  # fmt: skip
    for name, parameter in twin.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    # One head with a sink: BOS alone has channel 1, all else channel 0, and the slowest rotary pair matches the two.
    embedding, attention = twin.model.embed_tokens.weight.data, twin.model.layers[0].self_attn
    embedding[:, 0], embedding[:, 1] = 2.0, 0.0
    embedding[0, 0], embedding[0, 1] = 0.0, 3.0
    attention.q_proj.weight.data[1, 0] = attention.k_proj.weight.data[1, 1] = 3.0
    return twin


def rms_norm(x, weight, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * weight


def rotated(x, position, theta):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_forward(twin, ids):
    """Return logits [tokens, vocab] and per layer hidden [tokens, size], attention [heads, t, t], gate [tokens, n]."""
    w = {name: tensor.double().numpy() for name, tensor in twin.state_dict().items()}
    config, tokens = twin.config, len(ids)
    x = [w["model.embed_tokens.weight"][i] for i in ids]
    hidden, attention, gates = [], [], []
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        normed = [rms_norm(v, w[p + "input_layernorm.weight"], config.norm_eps) for v in x]
        q, k, v = ([w[p + f"self_attn.{n}_proj.weight"] @ n_t for n_t in normed] for n in "qkv")
        probabilities = np.zeros((HEADS, tokens, tokens))
        mixed = [np.zeros(SIZE) for _ in range(tokens)]
        for head in range(HEADS):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            keys = [rotated(k[t][part], t, config.rope_theta) for t in range(tokens)]
            for t in range(tokens):
                query = rotated(q[t][part], t, config.rope_theta)
                scores = [float(query @ keys[s]) / math.sqrt(HEAD_DIM) for s in range(t + 1)]
                weights = [math.exp(s - max(scores)) for s in scores]
                for s in range(t + 1):
                    probabilities[head, t, s] = weights[s] / sum(weights)
                    mixed[t][part] += probabilities[head, t, s] * v[s][part]
        if config.gate != "none":
            weight, bias = w[p + "self_attn.output_gate.weight"], w[p + "self_attn.output_gate.bias"]
            gate = [sigmoid(weight @ n_t + bias) for n_t in normed]
            gates.append(np.array(gate))
            mixed = [m * np.repeat(g, SIZE // len(g)) for m, g in zip(mixed, gate, strict=True)]
        x = [a + w[p + "self_attn.o_proj.weight"] @ m for a, m in zip(x, mixed, strict=True)]
        for t in range(tokens):
            n_t = rms_norm(x[t], w[p + "post_attention_layernorm.weight"], config.norm_eps)
            a, b = w[p + "mlp.gate_proj.weight"] @ n_t, w[p + "mlp.up_proj.weight"] @ n_t
            x[t] = x[t] + w[p + "mlp.down_proj.weight"] @ (a * sigmoid(a) * b)
        hidden.append(np.array(x))
        attention.append(probabilities)
    logits = [w["lm_head.weight"] @ rms_norm(v, w["model.norm.weight"], config.norm_eps) for v in x]
    return np.array(logits), hidden, attention, gates


def naive_evaluation(twin, rows):
    losses = []
    for index in range(2):
        ids, targets = rows.batch(_EVALUATION_SEED, index, 2)
        for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
            logits, *_ = naive_forward(twin, row)
            losses += [
                math.log(sum(math.exp(v) for v in scores)) - scores[w] for scores, w in zip(logits, wanted, strict=True)
            ]
    ids, _ = Rows(rows.tokens, 64).batch(_EVALUATION_SEED, 0, TRACE_ROWS)
    traces = [naive_forward(twin, row) for row in ids.tolist()]

    received = [
        [
            [sum(attention[layer][head][t][0] for t in range(1, 64)) / 63 for head in range(HEADS)]
            for layer in range(LAYERS)
        ]
        for _, _, attention, _ in traces
    ]  # [rows][layers][heads]
    flat = [value for row in received for layer in row for value in layer]
    assert min(abs(value - 0.3) for value in flat) > 1e-3
    found = {
        "loss": sum(losses) / len(losses),
        "sink_rate": sum(value > 0.3 for value in flat) / len(flat),
        "first_token_attention": sum(flat) / len(flat),
        "layer_first_token_attention": [
            sum(sum(row[layer]) for row in received) / (TRACE_ROWS * HEADS) for layer in range(LAYERS)
        ],
        "first_token_abs_max": [],
        "other_token_abs_max": [],
        "median": [],
        "kurtosis": [],
    }
    for layer in range(LAYERS):
        h = [hidden[layer] for _, hidden, _, _ in traces]
        values = sorted(abs(v) for row in h for v in row.flatten())
        found["first_token_abs_max"].append(max(abs(v) for row in h for v in row[0]))
        found["other_token_abs_max"].append(max(abs(v) for row in h for v in row[1:].flatten()))
        found["median"].append(values[(len(values) - 1) // 2])
        signed = [v for row in h for v in row.flatten()]
        mean = sum(signed) / len(signed)
        second, fourth = (sum((v - mean) ** power for v in signed) / len(signed) for power in (2, 4))
        found["kurtosis"].append(fourth / second**2)
    found["first_token_ratio"] = max(a / b for a, b in zip(found["first_token_abs_max"], found["median"], strict=True))
    gates = [g for *_, gate in traces for layer in gate for g in layer.flatten()]
    found["gate_mean"] = sum(gates) / len(gates) if gates else None
    found["gate_closed"] = sum(g < 0.1 for g in gates) / len(gates) if gates else None
    return found


@pytest.fixture(scope="module")
def rows():
    return Rows(np.random.default_rng(3).integers(0, 40, size=500).astype(np.uint16), 24)


@pytest.mark.parametrize("gate", ["none", "head", "element"])
def test_evaluation_equals_a_naive_float64_loop(gate, rows):
    twin = build(gate)
    found = evaluate(twin, rows, loss_batches=2, loss_rows=2, trace_rows=TRACE_ROWS).as_dict()
    expected = naive_evaluation(twin, rows)
    assert found.keys() == expected.keys()
    assert 0 < expected["sink_rate"] < 1
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            # float32 forward against float64; the worst relative difference seen is 8e-7.
            assert found[name] == pytest.approx(value, rel=1e-5), name


def test_evaluation_leaves_the_twin_as_it_was(rows):
    twin = build("head")
    twin.train()
    first = evaluate(twin, rows, loss_batches=1, loss_rows=2, trace_rows=2)
    assert twin.training
    assert evaluate(twin, rows, loss_batches=1, loss_rows=2, trace_rows=2) == first
    assert all(parameter.grad is None for parameter in twin.parameters())
