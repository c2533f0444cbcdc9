"""The `gate` patch: `out = SDPA(q, k, v) * sigmoid(W x + b)` before `o_proj` (Qiu et al., arXiv 2505.06708, G1).

The attention block's forward computes the gate's logits from its input and leaves them on the attention layer; the
attention layer's forward applies them to its output. Both are traced into the same compiled graph, and between the
pieces of a piecewise graph only the logits travel. Works for every architecture whose block holds a vLLM
`Attention` layer and calls its input `hidden_states`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vllm_sluice import compat
from vllm_sluice.checkpoints import gates, names
from vllm_sluice.compat import AttentionSite, Load
from vllm_sluice.config import GatePatch
from vllm_sluice.ops.gate import apply_gate, gate_logits, gate_values
from vllm_sluice.patches.base import InstalledPatch, PatchError, PatchKind, Report

Granularity = Literal["head", "element"]
_REMEDY = (
    "Nothing was changed. `sluice gates inspect FILE` shows what a file holds; to serve without gates set "
    "patches.gate.source: none (a checkpoint trained with gates then gives wrong output)."
)
_NATIVE_GATES = ("g_proj", "gate_proj", "output_gate_proj")


@dataclass(frozen=True)
class _Switch:
    """The device tensors that run-time values are written to."""

    acts: torch.Tensor
    sharpness: torch.Tensor
    floor: torch.Tensor


class OutputGate(nn.Module):
    """The gate of one attention layer, its share of heads under tensor parallelism.

    Buffers: `weight` [rows, hidden] and `bias` [rows] in the model's dtype; shared by all layers: `acts`, bool,
    [max_tokens], and `sharpness` (1 / temperature) and `floor`, float32 scalars. Buffers rather than parameters, so
    that weight loading and sleep mode leave them alone.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    acts: torch.Tensor
    sharpness: torch.Tensor
    floor: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, switch: _Switch, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("acts", switch.acts, persistent=False)
        self.register_buffer("sharpness", switch.sharpness, persistent=False)
        self.register_buffer("floor", switch.floor, persistent=False)
        self.observer: nn.Module | None = None

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the gate's logits, [tokens, rows], from the block's input, [..., hidden]."""
        return gate_logits(x, self.weight, self.bias)

    def forward(self, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Gate the attention output, [tokens, heads * head_size]."""
        gate = gate_values(logits, self.sharpness, self.floor)
        if self.observer is not None:
            self.observer(gate)
        return apply_gate(out, gate, self.acts[: out.shape[0]], self.heads)


@dataclass(frozen=True)
class _Planned:
    site: AttentionSite
    argument: tuple[int, str]
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class _Plan:
    layers: tuple[_Planned, ...]
    granularity: Granularity
    origin: str
    max_tokens: int


class InstalledGate(InstalledPatch):
    """The installed `gate` patch."""

    name = "gate"

    def __init__(self, switch: _Switch, settings: GatePatch, report: Report, layers: dict[int, OutputGate]) -> None:
        self._switch = switch
        self.layers = layers
        super().__init__(switch.acts, settings, report)

    def write_parameters(self) -> None:
        """Write temperature and floor."""
        self._switch.sharpness.fill_(1 / self.runtime["temperature"])
        self._switch.floor.fill_(self.runtime["floor"])


class GateKind(PatchKind):
    """Plans and installs gates from a checkpoint or a sidecar file."""

    name = "gate"

    def __init__(self, settings: GatePatch) -> None:
        self._settings = settings
        self._tensors: gates.GateTensors | None = None
        self._granularity: str = settings.granularity

    def begin(self, load: Load) -> None:
        """Decide where the gates come from, and read a sidecar."""
        source = self._settings.source
        declaration = gates.declared(load.hf_config)
        if load.folds_constants and source != "none" and (source != "auto" or declaration is not None):
            raise PatchError(
                self.name,
                ["Inductor would fold the switch into the graph (max_autotune with VLLM_USE_AOT_COMPILE=0 on the CPU)"],
                "Drop max_autotune from the compilation config, or set VLLM_USE_AOT_COMPILE=1.",
            )
        if source == "checkpoint" or (source == "auto" and declaration is not None):
            self._tensors = gates.GateTensors("the checkpoint")
            if self._granularity == "auto" and declaration is not None:
                self._granularity = str(declaration.get("granularity", "auto"))
            if self._granularity not in ("auto", "head", "element"):
                found = f"config.json declares {names.DECLARATION}.granularity = {self._granularity!r}"
                raise PatchError(self.name, [f"{found}; head or element expected"], _REMEDY)
        elif source.endswith(".safetensors"):
            try:
                self._tensors = gates.read_sidecar(Path(source))
            except ValueError as error:
                raise PatchError(self.name, [str(error)], _REMEDY) from None

    def divert(self, name: str, tensor: torch.Tensor) -> bool:
        """Take the checkpoint's gate tensors, if the checkpoint is where they come from."""
        from_checkpoint = self._tensors is not None and not self._settings.source.endswith(".safetensors")
        return from_checkpoint and self._tensors is not None and self._tensors.take(name, tensor)

    def plan(self, model: nn.Module, load: Load) -> _Plan | None:
        """Match every attention block with its gate and check all shapes and values."""
        if self._tensors is None:
            return None
        sites = compat.attention_sites(model)
        if not sites:
            raise PatchError(self.name, ["the model has no decoder self-attention layer"], _REMEDY)
        problems: list[str] = []
        by_block = self._match(sites, load, problems)
        planned = []
        for site in sites:
            found = by_block.get(site.path)
            if found is None:
                problems.append(
                    f"layer {site.layer} ({site.path}): {names.MODULE}.weight expected, but {self._tensors.origin} "
                    "has no gate for it"
                )
                continue
            planned += list(self._check(site, found, load, problems))
        granularity = _common_granularity(planned, problems)
        if problems:
            raise PatchError(self.name, problems, _REMEDY)
        return _Plan(tuple(planned), granularity, self._tensors.origin, load.max_tokens)

    def install(self, plan: _Plan) -> InstalledGate:
        """Attach the gates and override the forwards of blocks and attention layers."""
        device = plan.layers[0].weight.device
        switch = _Switch(
            acts=torch.zeros(plan.max_tokens, dtype=torch.bool, device=device),
            sharpness=torch.ones((), device=device),
            floor=torch.zeros((), device=device),
        )
        layers = {}
        for item in plan.layers:
            site = item.site
            gate = OutputGate(item.weight, item.bias, switch, site.heads)
            site.attention.sluice_gate = gate
            site.attention.sluice_gate_logits = None
            compat.override_forward(site.block, _leave_logits(site.attribute, item.argument))
            compat.override_forward(site.attention, _apply_logits)
            layers[site.layer] = gate
        detail = f"{plan.granularity}-wise gates on {len(layers)} layers from {plan.origin}"
        return InstalledGate(switch, self._settings, Report(self.name, tuple(layers), detail), layers)

    def _match(self, sites: list[AttentionSite], load: Load, problems: list[str]) -> dict[str, gates.Gate]:
        assert self._tensors is not None
        exact = {site.path: site.path for site in sites}
        loose = {gates.canonical(site.path).removesuffix(".mla_attn"): site.path for site in sites}
        matched: dict[str, gates.Gate] = {}
        for block, gate in self._tensors.items():
            path = exact.get(block) or loose.get(gates.canonical(block))
            if path in matched:
                problems.append(f"{block}.{names.MODULE} in {self._tensors.origin}: a second gate for {path}")
            elif path is not None:
                matched[path] = gate
            elif not _on_another_stage(block, load):
                problems.append(
                    f"{block}.{names.MODULE} in {self._tensors.origin}: no such attention block in the model "
                    f"(it has {sites[0].path} to {sites[-1].path})"
                )
        return matched

    def _check(
        self, site: AttentionSite, gate: gates.Gate, load: Load, problems: list[str]
    ) -> Iterator[_Planned]:
        where = f"layer {site.layer} ({site.path})"
        native = next((n for n in _NATIVE_GATES if hasattr(site.block, n)), None)
        if native or getattr(site.block, "attn_output_gate", False):
            problems.append(f"{where}: the architecture already gates its attention ({native or 'attn_output_gate'})")
            return
        try:
            argument = compat.hidden_states_argument(site.block)
        except LookupError as error:
            problems.append(f"{where}: {error}")
            return
        hidden = load.hidden_size
        rank, ranks = compat.tensor_parallel()
        weight, bias = gate.weight, gate.bias
        if weight is None:
            problems.append(f"{where}: {names.MODULE}.bias is there but {names.MODULE}.weight is missing")
            return
        allowed = self._allowed_rows(site, ranks)
        if weight.dim() != 2 or weight.shape[1] != hidden or weight.shape[0] not in allowed:
            rows = " or ".join(f"[{r}, {hidden}] ({g})" for r, g in allowed.items())
            problems.append(f"{where}: {names.MODULE}.weight has shape {list(weight.shape)}, expected {rows}")
            return
        if bias is None:
            bias = torch.zeros(weight.shape[0])
        if list(bias.shape) != [weight.shape[0]]:
            problems.append(
                f"{where}: {names.MODULE}.bias has shape {list(bias.shape)}, expected [{weight.shape[0]}]"
            )
            return
        for part, tensor in (("weight", weight), ("bias", bias)):
            bad = int((~torch.isfinite(tensor.float())).sum())
            if bad:
                problems.append(f"{where}: {names.MODULE}.{part} has {bad} NaN or infinite values, expected none")
                return
        device = load.device
        local = weight.shape[0] // ranks
        own = slice(rank * local, (rank + 1) * local)
        yield _Planned(
            site,
            argument,
            weight[own].to(device=device, dtype=load.dtype).contiguous(),
            bias[own].to(device=device, dtype=load.dtype).contiguous(),
        )

    def _allowed_rows(self, site: AttentionSite, ranks: int) -> dict[int, Granularity]:
        heads = site.heads * ranks
        rows: dict[int, Granularity] = {heads: "head", heads * site.head_size: "element"}
        return {r: g for r, g in rows.items() if self._granularity in ("auto", g)}


def _common_granularity(planned: list[_Planned], problems: list[str]) -> Granularity:
    kinds: dict[Granularity, int] = {}
    for item in planned:
        kinds["head" if item.weight.shape[0] == item.site.heads else "element"] = item.site.layer
    if len(kinds) > 1:
        problems.append(f"layer {kinds['head']} has head-wise and layer {kinds['element']} element-wise gates")
    return next(iter(kinds), "head")


def _on_another_stage(block: str, load: Load) -> bool:
    if load.pipeline_stages == 1:
        return False
    try:
        return compat.layer_index(block) < int(load.hf_config.get_text_config().num_hidden_layers)
    except ValueError:
        return False


def _leave_logits(attribute: str, argument: tuple[int, str]) -> Any:
    index, name = argument

    def make(original: Any) -> Any:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            attention: Any = getattr(self, attribute)
            attention.sluice_gate_logits = attention.sluice_gate.logits(kwargs[name] if name in kwargs else args[index])
            out = original(self, *args, **kwargs)
            attention.sluice_gate_logits = None
            return out

        return forward

    return make


def _apply_logits(original: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.sluice_gate(self.sluice_gate_logits, original(self, *args, **kwargs))

    return forward
