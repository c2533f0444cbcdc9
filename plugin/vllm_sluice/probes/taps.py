"""Where the hidden state after each decoder layer can be read, found by tensor identity in one dry forward pass.

vLLM keeps the residual stream in two parts and fuses their addition into the next norm, so `hidden + residual` of a
layer's output is no safe rule (a dozen architectures already return the sum). What holds for all: the norm in front
of the next layer's attention returns, or receives, the whole stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vllm_sluice import compat
from vllm_sluice.compat import Load

Kind = Literal["residual", "input", "attention"]


@dataclass(frozen=True)
class Tap:
    """Where to read the hidden state of one layer.

    Attributes
    ----------
    layer
        Index of the decoder layer whose output this is.
    module
        Module to listen at.
    kind
        `residual`: second of the module's outputs; `input`: its first argument; `attention`: an attention block's
        own input (post-norm architectures).
    """

    layer: int
    module: nn.Module
    kind: Kind


@dataclass(frozen=True)
class _Event:
    layer: int | None
    module: nn.Module
    attention_input: torch.Tensor | None = None
    output: Any = None
    kind: Kind = "attention"


def find_taps(model: nn.Module, load: Load) -> list[Tap]:
    """Locate the hidden state after every decoder layer that this rank can see.

    With pipeline stages, the output of a stage's last layer is read where it enters the next stage.

    Raises
    ------
    LookupError
        If no layer's stream can be found.
    """
    events = _record(model, load)
    layers = sorted({event.layer for event in events if event.layer is not None})
    taps = []
    for layer in layers:
        if layer > 0 and (entering := _entering(events, layer)) is not None:
            taps.append(entering)
    if compat.is_last_stage() and layers:
        final = next((e for e in reversed(events) if e.layer is None and e.attention_input is None), None)
        if final is not None:
            taps.append(Tap(layers[-1], final.module, final.kind))
    if not taps:
        raise LookupError(f"no norm or attention input carries the residual stream of {type(model).__name__}")
    return taps


def listen(tap: Tap, observer: nn.Module) -> None:
    """Call `observer(hidden)` with the tapped hidden state in every forward pass; traced into the graph."""
    tap.module.sluice_residual = observer
    if tap.kind == "attention":
        index, name = compat.hidden_states_argument(tap.module)
        compat.override_forward(tap.module, _observe_argument(index, name))
    else:
        compat.override_forward(tap.module, _observe_residual if tap.kind == "residual" else _observe_input)


def _record(model: nn.Module, load: Load) -> list[_Event]:
    sites = compat.attention_sites(model)
    blocks = {id(site.block) for site in sites}
    owner: dict[int, int] = {}
    for path, layer in compat.decoder_layers(model):
        for module in layer.modules():
            owner[id(module)] = compat.layer_index(path)
    events: list[_Event] = []
    handles: list[Any] = []

    def on_block(index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = kwargs[name] if name in kwargs else args[index]
            events.append(_Event(owner.get(id(module)), module, attention_input=x))

        return hook

    entering: dict[int, list[torch.Tensor]] = {}

    def before_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        entering[id(module)] = [t.clone() for t in tensors[:2]]  # fused norms overwrite their arguments

    def on_norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kind = _kind(entering.pop(id(module)), output)
        events.append(_Event(owner.get(id(module)), module, output=output, kind=kind))

    def no_attention(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)  # without metadata the output is uninitialised memory

    handles += [site.attention.register_forward_hook(no_attention) for site in sites]
    for module in model.modules():
        if id(module) in blocks:
            hook = on_block(*compat.hidden_states_argument(module))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif compat.is_norm(module):
            handles.append(module.register_forward_pre_hook(before_norm, with_kwargs=True))
            handles.append(module.register_forward_hook(on_norm))
    try:
        compat.dry_forward(model, load)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _entering(events: list[_Event], layer: int) -> Tap | None:
    own = [event for event in events if event.layer == layer]
    block = next((event for event in own if event.attention_input is not None), None)
    if block is None:
        return None
    for event in own:
        if event.attention_input is None and _same(_first(event.output), block.attention_input):
            return Tap(layer - 1, event.module, event.kind)
    return Tap(layer - 1, block.module, "attention")


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _kind(entering: list[torch.Tensor], output: Any) -> Kind:
    """Tell whether a norm returns the sum of what it was given, as fused norms do, or the stream is its first input.

    A second output alone says nothing: Cohere's final norm hands an outdated residual through.
    """
    if not isinstance(output, tuple) or len(entering) < 2:
        return "input"
    total = (entering[0].float() + entering[1].float()).to(output[1].dtype)
    return "residual" if torch.allclose(output[1], total, rtol=1e-2, atol=1e-3, equal_nan=True) else "input"


def _same(first: Any, second: Any) -> bool:
    return (
        isinstance(first, torch.Tensor)
        and isinstance(second, torch.Tensor)
        and first.data_ptr() == second.data_ptr()
        and first.numel() == second.numel()
    )


def _observe_residual(original: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = original(self, x, *args, **kwargs)
        self.sluice_residual(out[1])
        return out

    return forward


def _observe_input(original: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sluice_residual(x)  # before the norm, which may overwrite its input
        return original(self, x, *args, **kwargs)

    return forward


def _observe_argument(index: int, name: str) -> Any:
    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.sluice_residual(kwargs[name] if name in kwargs else args[index])
            return original(self, *args, **kwargs)

        return forward

    return make
