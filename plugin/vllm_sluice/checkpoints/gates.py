"""Gate tensors by attention block: from the checkpoint's weight stream, or from a sidecar safetensors file.

In both, a gate is `<attention block>.output_gate.weight` of shape [rows, hidden] and optionally
`<attention block>.output_gate.bias` of shape [rows], rows = query heads (head-wise) or query heads * head size
(element-wise), whole tensors (not sharded). docs/gates.md is the schema for users.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_sluice.checkpoints.names import DECLARATION, GATE_TENSOR, MODULE


@dataclass(frozen=True)
class Gate:
    """Gate tensors of one attention block; `bias` may be absent."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None


class GateTensors:
    """Collects gate tensors by the attention block's path in the checkpoint."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self._parts: dict[str, dict[str, torch.Tensor]] = {}

    def take(self, name: str, tensor: torch.Tensor) -> bool:
        """Keep a tensor if its name is that of a gate; tell whether it was."""
        match = GATE_TENSOR.fullmatch(name)
        if match is None:
            return False
        self._parts.setdefault(match["block"], {})[match["part"]] = tensor
        return True

    def items(self) -> Iterator[tuple[str, Gate]]:
        """Yield block path and gate, in the order of their names."""
        for block, parts in sorted(self._parts.items()):
            yield block, Gate(parts.get("weight"), parts.get("bias"))


def read_sidecar(path: Path) -> GateTensors:
    """Read a sidecar file.

    Raises
    ------
    ValueError
        If the file is missing, is no safetensors file, or holds a tensor that is not a gate's.
    """
    from safetensors import SafetensorError, safe_open

    tensors = GateTensors(str(path))
    if not path.is_file():
        raise ValueError(f"patches.gate.source names {path}, but there is no such file")
    try:
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if not tensors.take(name, file.get_tensor(name)):
                    raise ValueError(
                        f"{path} holds the tensor {name!r}; a sidecar holds only names that end in "
                        f".{MODULE}.weight or .{MODULE}.bias. Try `sluice gates inspect {path}`"
                    )
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    return tensors


def sidecar_shapes(path: Path) -> dict[str, list[int]]:
    """Return name and shape of every tensor of a safetensors file without reading the tensors; {} if unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    except (OSError, SafetensorError):
        return {}


def declared(hf_config: Any) -> Mapping[str, Any] | None:
    """Return the gate declaration of a checkpoint's config.json, or None."""
    declaration = getattr(hf_config, DECLARATION, None)
    return declaration if isinstance(declaration, Mapping) else None


def canonical(block: str) -> str:
    """Drop what precedes `layers.` in a block path, so that wrapped models match their text checkpoint."""
    match = re.search(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..*)", block)
    return match[1] if match else block
