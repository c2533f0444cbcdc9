"""The twin: a Llama-architecture language model, with or without a sigmoid gate on its attention output.

Parameter names are those of Hugging Face's Llama, so a checkpoint of the ungated twin is a plain Llama checkpoint;
the gated twin adds `model.layers.{i}.self_attn.output_gate.{weight,bias}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

GateGranularity = Literal["none", "head", "element"]


@dataclass(frozen=True)
class TwinConfig:
    """Shape of a twin.

    `gate_bias_init` is the logit that every gate starts from; at or below 0, because a gate that starts open
    behaves like no gate (Bondarenko et al., arXiv 2306.12929, appendix on pi_init).
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    intermediate_size: int = 704
    context: int = 512
    gate: GateGranularity = "none"
    gate_bias_init: float = -1.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden size {self.hidden_size} is not a multiple of {self.heads} heads.")
        if self.gate_bias_init > 0:
            raise ValueError(f"gate bias init {self.gate_bias_init} is above 0; a gate has to start closed or neutral.")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.heads

    @property
    def gate_rows(self) -> int:
        """Output width of the gate projection: 0, one per head, or one per attention output element."""
        return {"none": 0, "head": self.heads, "element": self.hidden_size}[self.gate]


@dataclass
class Trace:
    """What a traced forward pass leaves behind; every list has one entry a layer.

    Attributes
    ----------
    hidden
        Residual stream after the decoder layer, [rows, tokens, hidden].
    attention
        Attention probabilities, [rows, heads, tokens, tokens].
    gate
        Gate values in (0, 1), [rows, tokens, gate_rows]; empty for the ungated twin.
    """

    hidden: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)
    gate: list[torch.Tensor] = field(default_factory=list)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt scale per channel."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x`, [..., hidden]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and, if the config asks for one, the output gate."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        if config.gate_rows:
            # Without nn.Linear's own initialisation, which would move the random state of everything built after it.
            self.output_gate = nn.utils.skip_init(nn.Linear, size, config.gate_rows, bias=True)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], trace: Trace | None) -> torch.Tensor:
        """Attend within each row of the normalised hidden state `x`, [rows, tokens, hidden]."""
        rows, tokens, _ = x.shape
        shape = (rows, tokens, self.config.heads, self.config.head_dim)
        q = _rotate(self.q_proj(x).view(shape).transpose(1, 2), rope)
        k = _rotate(self.k_proj(x).view(shape).transpose(1, 2), rope)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if trace is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.config.head_dim)
            future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            probabilities = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
            trace.attention.append(probabilities)
            out = probabilities @ v
        out = out.transpose(1, 2)
        if self.config.gate_rows:
            gate = torch.sigmoid(self.output_gate(x))
            if trace is not None:
                trace.gate.append(gate)
            out = out * gate.view(rows, tokens, self.config.heads, -1)
        projected: torch.Tensor = self.o_proj(out.reshape(rows, tokens, -1))
        return projected


class SwiGLU(nn.Module):
    """The feed-forward part: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to `x`, [rows, tokens, hidden]."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward part around the residual stream."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], trace: Trace | None) -> torch.Tensor:
        """Add both parts to the residual stream `x`, [rows, tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, trace)
        x = x + self.mlp(self.post_attention_layernorm(x))
        if trace is not None:
            trace.hidden.append(x)
        return x


class Decoder(nn.Module):
    """Embedding, decoder layers and final norm; the `model.` part of the parameter names."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, ids: torch.Tensor, trace: Trace | None) -> torch.Tensor:
        """Return the final-normed hidden state of `ids`, [rows, tokens, hidden]."""
        x: torch.Tensor = self.embed_tokens(ids)
        rope = _rope_tables(ids.shape[1], self.config, x.device)
        for layer in self.layers:
            x = layer(x, rope, trace)
        normed: torch.Tensor = self.norm(x)
        return normed


class Twin(nn.Module):
    """A Llama-architecture decoder with an optional sigmoid gate between attention and `o_proj`.

    The gate reads what the q, k and v projections read (the normalised hidden state) and multiplies the attention
    output: `out = SDPA(q, k, v) * sigmoid(W x + b)` (Qiu et al., arXiv 2505.06708, position G1).
    """

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw the matrices, shared ones first, so that both twins share those weights for one torch seed."""
        gates = []
        for name, parameter in self.named_parameters():
            if ".output_gate." in name:
                gates.append((name, parameter))
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range)
        for name, parameter in gates:
            if name.endswith("bias"):
                nn.init.constant_(parameter, self.config.gate_bias_init)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def forward(self, ids: torch.Tensor, trace: Trace | None = None) -> torch.Tensor:
        """Compute the logits.

        Parameters
        ----------
        ids
            Token ids, [rows, tokens], int64.
        trace
            Filled with hidden states, attention probabilities and gates if given (slower: attention is written out).

        Returns
        -------
        torch.Tensor
            Logits, [rows, tokens, vocab_size].
        """
        logits: torch.Tensor = self.lm_head(self.model(ids, trace))
        return logits


def _rope_tables(tokens: int, config: TwinConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 1.0 / config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    )
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
