"""Where the hidden state after each decoder layer can be read, found by tensor identity in one dry forward pass.

vLLM keeps the residual stream in two parts and fuses their addition into the next norm, so `hidden + residual` of a
layer's output is no safe rule (a dozen architectures already return the sum). What holds for all: the norm in front
of the next layer's attention returns, or receives, the whole stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from vllm_sluice import compat
from vllm_sluice.compat import Load

Kind = Literal["residual", "input", "attention"]
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


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
    """A call in the dry pass: of a norm, of an attention block, or of another part of a layer that has weights."""

    layer: int | None
    module: nn.Module
    kind: Kind | Literal["part"]
    output: Any = None
    entered: torch.Tensor | None = None
    argument: tuple[int, str] = (0, "")
    path: str = ""


@dataclass(frozen=True)
class Input:
    """A module of a decoder layer whose input is of interest.

    Attributes
    ----------
    layer
        Index of the decoder layer.
    module
        The attention block or the MLP.
    index, name
        Position (without self) and name of the argument that holds the input.
    width
        Width of the input.
    """

    layer: int
    module: nn.Module
    index: int
    name: str
    width: int


@dataclass(frozen=True)
class Taps:
    """Everything that one dry forward pass finds.

    Attributes
    ----------
    hidden
        Hidden state after every decoder layer that this rank can see.
    attention_inputs
        Attention blocks: their input is what the q, k and v projections read.
    mlp_inputs
        MLPs, or mixtures of experts; layers without one are left out.
    layers
        Decoder layers of this rank.
    """

    hidden: list[Tap]
    attention_inputs: list[Input]
    mlp_inputs: list[Input]
    layers: list[int]


def find_taps(model: nn.Module, load: Load) -> Taps:
    """Locate what probes read, layer by layer, in one dry forward pass.

    With pipeline stages, the output of a stage's last layer is read where it enters the next stage.
    """
    events = _record(model, load)
    layers = sorted({event.layer for event in events if event.layer is not None})
    return Taps(
        _hidden(events, layers),
        [_input(event) for event in events if event.kind == "attention" and event.layer is not None],
        [found for layer in layers if (found := _mlp(events, layer)) is not None],
        layers,
    )


def _hidden(events: list[_Event], layers: list[int]) -> list[Tap]:
    taps = []
    for layer in layers:
        if layer > 0 and (entering := _entering(events, layer)) is not None:
            taps.append(entering)
    if compat.is_last_stage() and layers:
        final = next((e for e in reversed(events) if e.layer is None and e.kind in ("residual", "input")), None)
        if final is not None:
            taps.append(Tap(layers[-1], final.module, cast(Kind, final.kind)))
    return taps


def _mlp(events: list[_Event], layer: int) -> Input | None:
    """Find a layer's MLP: a part that is named like one, else the first part with weights after attention."""
    own = [event for event in events if event.layer == layer]
    attended = next((i for i, event in enumerate(own) if event.kind == "attention"), len(own))
    named = (event for event in own if event.kind == "part" and event.path in _MLP_NAMES)
    after = (event for event in own[attended:] if event.kind == "part")
    found = next(named, None) or next(after, None)
    return None if found is None else _input(found)


def _input(event: _Event) -> Input:
    assert event.layer is not None and event.entered is not None
    return Input(event.layer, event.module, *event.argument, event.entered.shape[-1])


def listen(tap: Tap, observer: nn.Module, attribute: str) -> None:
    """Call `observer(hidden)` with the tapped hidden state in every forward pass; traced into the graph.

    `attribute` is where the module keeps the observer; each listener of a module needs its own.
    """
    setattr(tap.module, attribute, observer)
    if tap.kind == "attention":
        make = _observe_argument(attribute, *compat.hidden_states_argument(tap.module))
    else:
        make = _observe_residual(attribute) if tap.kind == "residual" else _observe_argument(attribute, 0, "x")
    compat.override_forward(tap.module, make)


def listen_to_input(entry: Input, observer: nn.Module, attribute: str) -> None:
    """Call `observer(x)` with a module's input in every forward pass; see `listen`."""
    setattr(entry.module, attribute, observer)
    compat.override_forward(entry.module, _observe_argument(attribute, entry.index, entry.name))


def _record(model: nn.Module, load: Load) -> list[_Event]:
    sites = compat.attention_sites(model)
    blocks = {id(site.block) for site in sites}
    owner: dict[int, int] = {}
    parts: dict[int, str] = {}
    for path, layer in compat.decoder_layers(model):
        for module in layer.modules():
            owner[id(module)] = compat.layer_index(path)
        for name, part in layer.named_children():
            if next(part.parameters(), None) is not None and not any(id(module) in blocks for module in part.modules()):
                parts[id(part)] = name
    events: list[_Event] = []
    handles: list[Any] = []

    def on_block(index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = kwargs[name] if name in kwargs else args[index]
            events.append(_Event(owner.get(id(module)), module, "attention", entered=x, argument=(index, name)))

        return hook

    def on_part(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for key, x in (*enumerate(args), *kwargs.items()):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                argument = (key, "") if isinstance(key, int) else (0, str(key))
                path = parts[id(module)]
                events.append(_Event(owner[id(module)], module, "part", entered=x, argument=argument, path=path))
                return

    entering: dict[int, list[torch.Tensor]] = {}

    def before_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        entering[id(module)] = [t.clone() for t in tensors[:2]]  # fused norms overwrite their arguments

    def on_norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kind = _kind(entering.pop(id(module)), output)
        events.append(_Event(owner.get(id(module)), module, kind, output=output))

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
        elif id(module) in parts:
            handles.append(module.register_forward_pre_hook(on_part, with_kwargs=True))
    try:
        compat.dry_forward(model, load)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _entering(events: list[_Event], layer: int) -> Tap | None:
    own = [event for event in events if event.layer == layer]
    block = next((event for event in own if event.kind == "attention"), None)
    if block is None:
        return None
    for event in own:
        if event.kind in ("residual", "input") and _same(_first(event.output), block.entered):
            return Tap(layer - 1, event.module, cast(Kind, event.kind))
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


def _observe_residual(attribute: str) -> Any:
    def make(original: Any) -> Any:
        def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = original(self, x, *args, **kwargs)
            getattr(self, attribute)(out[1])
            return out

        return forward

    return make


def _observe_argument(attribute: str, index: int, name: str) -> Any:
    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Before the call: a fused norm may overwrite its input.
            getattr(self, attribute)(kwargs[name] if name in kwargs else args[index])
            return original(self, *args, **kwargs)

        return forward

    return make
