"""Sinks, massive activations, gates and loss of a twin on held-out text: one code for both twins.

Definitions, at rows of 64 tokens and over queries t >= 1 (query 0 can only attend to itself):

- Gu sink rate: share of (row, layer, head) whose mean attention to position 0 exceeds 0.3
  (Gu et al., arXiv 2410.10781, Sink_1 with eps = 0.3).
- F-Attn: attention to position 0 averaged over rows, layers, heads and queries (Qiu et al., arXiv 2505.06708).
- |h|: absolute value of the residual stream after a decoder layer; the median is over all tokens and channels of
  that layer (Sun et al., arXiv 2402.17762).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from vllm_sluice.lab.corpus import Rows
from vllm_sluice.lab.twin import Trace, Twin

SINK_LENGTH = 64
SINK_THRESHOLD = 0.3
_EVALUATION_SEED = 20_260_000


@dataclass(frozen=True)
class Evaluation:
    """What was measured; lists have one entry a layer, from the first layer to the last.

    Attributes
    ----------
    loss
        Mean next-token cross-entropy in nats on full-context rows.
    sink_rate, first_token_attention
        Gu sink rate and F-Attn, both in 0..1.
    layer_first_token_attention
        F-Attn of each layer.
    first_token_abs_max, other_token_abs_max, median
        max |h| of token 0, of the other tokens, and the median of |h| over all.
    first_token_ratio
        Largest over layers of `first_token_abs_max / median`.
    kurtosis
        Non-excess kurtosis of h over tokens and channels (a Gaussian has 3).
    gate_mean, gate_closed
        Mean gate and share of gates below 0.1; None for the ungated twin.
    """

    loss: float
    sink_rate: float
    first_token_attention: float
    layer_first_token_attention: list[float]
    first_token_abs_max: list[float]
    other_token_abs_max: list[float]
    median: list[float]
    kurtosis: list[float]
    first_token_ratio: float
    gate_mean: float | None
    gate_closed: float | None

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    twin: Twin,
    held_out: Rows,
    *,
    loss_batches: int,
    loss_rows: int = 8,
    trace_rows: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Measure a twin on held-out rows, the same rows for every twin.

    Parameters
    ----------
    twin
        Model to measure, used in its own dtype.
    held_out
        Rows of the held-out text with the full training context.
    loss_batches, loss_rows
        Number of batches and rows a batch for the loss.
    trace_rows
        Number of rows of 64 tokens for everything else.
    progress
        Show a progress bar over the batches of the loss.
    """
    was_training = twin.training
    twin.eval()
    losses = []
    for index in tqdm(range(loss_batches), desc="loss", unit="batch", disable=not progress):
        ids, targets = held_out.batch(_EVALUATION_SEED, index, loss_rows)
        logits = twin(ids).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())

    ids, _ = Rows(held_out.tokens, SINK_LENGTH).batch(_EVALUATION_SEED, 0, trace_rows)
    trace = Trace()
    twin(ids, trace)
    twin.train(was_training)

    received = torch.stack([a[:, :, 1:, 0].double().mean(dim=2) for a in trace.attention])  # [layers, rows, heads]
    hidden = [h.double() for h in trace.hidden]
    first = [h[:, 0].abs().max().item() for h in hidden]
    median = [h.abs().median().item() for h in hidden]
    gates = torch.cat([g.double().flatten() for g in trace.gate]) if trace.gate else None
    return Evaluation(
        loss=sum(losses) / len(losses),
        sink_rate=(received > SINK_THRESHOLD).double().mean().item(),
        first_token_attention=received.mean().item(),
        layer_first_token_attention=received.mean(dim=(1, 2)).tolist(),
        first_token_abs_max=first,
        other_token_abs_max=[h[:, 1:].abs().max().item() for h in hidden],
        median=median,
        kurtosis=[_kurtosis(h) for h in hidden],
        first_token_ratio=max(f / m for f, m in zip(first, median, strict=True)),
        gate_mean=None if gates is None else gates.mean().item(),
        gate_closed=None if gates is None else (gates < 0.1).double().mean().item(),
    )


def _kurtosis(x: torch.Tensor) -> float:
    centred = x - x.mean()
    return (centred.pow(4).mean() / centred.pow(2).mean().pow(2)).item()
