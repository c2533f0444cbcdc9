"""The reference forward pass: the Hugging Face Llama of a checkpoint, with its gate added by hooks.

Written from the formula and without the twin's code, so that the twin and the served model each have something
independent to be compared with: `out = SDPA(q, k, v) * sigmoid(W x + b)` before `o_proj`, where x is what the q, k
and v projections read (Qiu et al., arXiv 2505.06708, position G1).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


class _GatedLlama(LlamaForCausalLM):
    """A Llama whose attention blocks carry gate projections; nothing applies them until hooks are set."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        heads, head_dim = config.num_attention_heads, config.head_dim
        rows = {"head": heads, "element": heads * head_dim}[config.sluice_gate["granularity"]]
        for layer in self.model.layers:
            layer.self_attn.output_gate = nn.Linear(config.hidden_size, rows, bias=True)


@dataclass
class ReferenceTrace:
    """One forward pass of the reference; lists have one entry a layer.

    Attributes
    ----------
    logits
        [rows, tokens, vocab_size], in the model's dtype.
    hidden
        Residual stream after the decoder layer, before the final norm, [rows, tokens, hidden].
    attention
        Attention probabilities, [rows, heads, tokens, tokens].
    gate
        Gate values in (0, 1), [rows, tokens, heads] or [rows, tokens, heads * head_dim], float32; empty where no gate
        acts.
    """

    logits: torch.Tensor
    hidden: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)
    gate: list[torch.Tensor] = field(default_factory=list)


def reference_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, *, gate_enabled: bool = True
) -> LlamaForCausalLM:
    """Load a Llama checkpoint, gated or not, with eager attention.

    Parameters
    ----------
    folder
        Checkpoint folder; gated if its `config.json` has `sluice_gate`.
    dtype
        Of weights and arithmetic; the gate's sigmoid and product are computed in float32 in any case.
    gate_enabled
        False leaves the checkpoint's gate out, as a disabled gate in the server does.

    Raises
    ------
    ValueError
        If the checkpoint's tensors are not those that its config asks for.
    """
    config = LlamaConfig.from_pretrained(folder)
    gated = getattr(config, "sluice_gate", None) is not None
    model, report = (_GatedLlama if gated else LlamaForCausalLM).from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys") if report[kind]}
    if wrong:
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {wrong}")
    if gated and gate_enabled:
        for layer in model.model.layers:
            _apply_gate(layer.self_attn)
    return model.eval()


@torch.no_grad()
def reference_trace(model: LlamaForCausalLM, ids: torch.Tensor | list[int]) -> ReferenceTrace:
    """Run the reference once and keep what happens in every layer.

    Parameters
    ----------
    model
        From `reference_model`.
    ids
        Token ids, [rows, tokens], or [tokens] for one row; BOS included.
    """
    ids = torch.atleast_2d(torch.as_tensor(ids))
    hidden: list[torch.Tensor] = []
    attention: list[torch.Tensor] = []
    gate: list[torch.Tensor] = []
    with ExitStack() as hooks:

        def after(module: nn.Module, keep: Callable[[Any], object]) -> None:
            hooks.callback(module.register_forward_hook(lambda _module, _inputs, output: keep(output)).remove)

        for layer in model.model.layers:
            after(layer, hidden.append)
            after(layer.self_attn, lambda output: attention.append(output[1]))
            if hasattr(layer.self_attn, "output_gate"):
                after(layer.self_attn.output_gate, lambda logits: gate.append(torch.sigmoid(logits.float())))
        logits = model(input_ids=ids, use_cache=False).logits
    return ReferenceTrace(logits, hidden, attention, gate)


def _apply_gate(attention: LlamaAttention) -> None:
    """Multiply what `o_proj` reads by the gate of what the attention block reads."""
    inputs: list[torch.Tensor] = []

    def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    def multiply(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        out = args[0]
        gate = torch.sigmoid(attention.output_gate(inputs.pop()).float())
        gate = gate.repeat_interleave(out.shape[-1] // gate.shape[-1], dim=-1)
        return (out.float() * gate).to(out.dtype)

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(multiply)
