"""Gate tensors in safetensors files, read without torch: headers, shapes, and the values of the gates alone.

Schema (docs/gates.md): `<attention module>.output_gate.weight` of shape [rows, hidden] and optionally
`<attention module>.output_gate.bias` of shape [rows]; rows is the number of query heads, or heads * head size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vllm_sluice.checkpoints.names import DECLARATION, GATE_TENSOR, MODULE
from vllm_sluice.commands.problem import Problem

Granularity = Literal["head", "element"]

_LONGEST_HEADER = 100_000_000
_SMALLEST_HEAD = 8
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, such as a PyTorch checkpoint (.pt, .bin)",
    b"\x80": "a Python pickle, such as an old PyTorch checkpoint",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with: git lfs pull",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file; `offset` is its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    def read(self) -> np.ndarray | None:
        """Return the values as float64 of the tensor's shape, or None for a dtype without plain numbers."""
        dtype = _DTYPES.get(self.dtype)
        if dtype is None:
            return None
        count = int(np.prod(self.shape, dtype=np.int64))
        stored = np.fromfile(self.file, dtype, count, offset=self.offset).reshape(self.shape)
        if self.dtype == "BF16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float64)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself: its tensors by name, and its free-text metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class GatePair:
    """Weight and bias of the gate of one attention module; either may be missing."""

    module: str
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def layer(self) -> int | None:
        """Index of the decoder layer: the first number in the module's path."""
        return next((int(part) for part in self.module.split(".") if part.isdigit()), None)

    @property
    def rows(self) -> int | None:
        """Number of gates."""
        return self.weight.shape[0] if self.weight is not None and len(self.weight.shape) == 2 else None


@dataclass(frozen=True)
class Shape:
    """What a model's config.json says about its attention; None where it says nothing.

    Attributes
    ----------
    layers
        Number of decoder layers.
    attention_layers
        Indices of the layers with softmax attention.
    heads
        Query heads of one layer.
    head_size
        Width of one head's output.
    hidden
        Width of the hidden state.
    declared
        The declaration `sluice_gate`, as it stands in the file.
    """

    architecture: str | None = None
    layers: int | None = None
    attention_layers: tuple[int, ...] | None = None
    heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    declared: Any = None

    def rows(self, granularity: Granularity) -> int | None:
        """Return how many rows a gate weight of this model has."""
        if granularity == "head" or self.heads is None or self.head_size is None:
            return self.heads if granularity == "head" else None
        return self.heads * self.head_size


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises
    ------
    Problem
        If there is no such file or it is no safetensors file; the message says what was found instead.
    """
    try:
        with path.open("rb") as file:
            start = file.read(32)
            size = path.stat().st_size
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER) or start[8:9] != b"{":
                raise Problem(f"{path} is not a safetensors file: it is {_describe(start, size)}")
            file.seek(8)
            raw = file.read(length)
    except FileNotFoundError:
        raise Problem(f"there is no file {path}") from None
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    try:
        return _parse(json.loads(raw), path, 8 + length, size)
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} is not a safetensors file: its header cannot be read ({error})") from None


def read_folder(folder: Path) -> Header:
    """Read the headers of all safetensors files of a checkpoint as one.

    Raises
    ------
    Problem
        If the folder holds none, or one of them is damaged.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise Problem(f"{folder} holds no .safetensors file")
    headers = [read_header(path) for path in paths]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    return Header(tensors, metadata)


def gates(tensors: Iterable[Tensor]) -> list[GatePair]:
    """Return the gates among tensors, in layer order."""
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        match = GATE_TENSOR.fullmatch(tensor.name)
        if match:
            parts.setdefault(match["block"], {})[match["part"]] = tensor
    pairs = [GatePair(module, found.get("weight"), found.get("bias")) for module, found in parts.items()]
    return sorted(pairs, key=lambda pair: (pair.layer is None, pair.layer or 0, pair.module))


def read_shape(folder: Path) -> Shape:
    """Read what matters for gates from a model's config.json.

    Raises
    ------
    Problem
        If there is no config.json or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{folder} is no model: it has no config.json") from None
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise Problem(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise Problem(f"{path} holds a {type(config).__name__}; a JSON object is needed")
    return _shape(config)


def granularity(pair: GatePair, shape: Shape | None, metadata: Mapping[str, str]) -> tuple[Granularity | None, str]:
    """Return whether a gate is head-wise or element-wise, and how that is known."""
    if pair.rows is None or pair.weight is None:
        return None, "the weight is missing or no matrix"
    options: tuple[Granularity, ...] = ("head", "element")
    if shape is not None and shape.heads is not None:
        for option in options:
            if pair.rows == shape.rows(option):
                return option, "config.json"
        return None, f"config.json allows {_allowed(shape)} rows"
    for option in options:
        if metadata.get("granularity") == option:
            return option, "metadata"
    return "head" if pair.rows * _SMALLEST_HEAD <= pair.weight.shape[1] else "element", "shape"


def problems(pairs: Iterable[GatePair], shape: Shape | None, metadata: Mapping[str, str]) -> list[str]:
    """Return what is wrong with names and shapes of gates, one line each."""
    found = []
    kinds: dict[Granularity, str] = {}
    for pair in pairs:
        if pair.weight is None:
            found.append(f"{pair.module}: {MODULE}.bias is there but {MODULE}.weight is missing")
            continue
        if pair.rows is None:
            found.append(f"{pair.module}: {MODULE}.weight has shape {list(pair.weight.shape)}, expected [rows, hidden]")
            continue
        if shape is not None and shape.hidden not in (None, pair.weight.shape[1]):
            found.append(
                f"{pair.module}: {MODULE}.weight has {pair.weight.shape[1]} columns; the hidden size is {shape.hidden}"
            )
        if pair.bias is not None and pair.bias.shape != (pair.rows,):
            found.append(f"{pair.module}: {MODULE}.bias has shape {list(pair.bias.shape)}, expected [{pair.rows}]")
        kind, why = granularity(pair, shape, metadata)
        if kind is None:
            found.append(f"{pair.module}: {MODULE}.weight has {pair.rows} rows; {why}")
        else:
            kinds.setdefault(kind, pair.module)
    if len(kinds) > 1:
        found.append(f"{kinds['head']} is head-wise and {kinds['element']} element-wise; all layers have to agree")
    return found


@dataclass(frozen=True)
class Summary:
    """Values of one tensor: counts, extremes and mean of the finite ones; `read` False if the dtype has none."""

    read: bool
    bad: int = 0
    least: float = field(default=float("nan"))
    mean: float = field(default=float("nan"))
    greatest: float = field(default=float("nan"))


def summarize(tensor: Tensor) -> Summary:
    """Read a tensor and summarize it."""
    values = tensor.read()
    if values is None:
        return Summary(read=False)
    finite = values[np.isfinite(values)]
    bad = values.size - finite.size
    if finite.size == 0:
        return Summary(True, bad)
    return Summary(True, bad, float(finite.min()), float(finite.mean()), float(finite.max()))


def mean_gate_at_zero(bias: Tensor | None) -> float | None:
    """Return the mean of sigmoid(bias): the gate's mean value at a zero input; None if it cannot be read."""
    if bias is None:
        return 0.5
    values = bias.read()
    return None if values is None else float(np.mean(0.5 * (1.0 + np.tanh(0.5 * values))))


def _parse(tree: object, path: Path, body: int, size: int) -> Header:
    if not isinstance(tree, dict):
        raise TypeError("it is no JSON object")
    metadata = tree.pop("__metadata__", {})
    tensors = {}
    for name, entry in tree.items():
        start, end = entry["data_offsets"]
        if body + end > size:
            raise ValueError(f"tensor {name} ends at byte {body + end}, the file at {size}; is it cut off?")
        shape = tuple(int(n) for n in entry["shape"])
        tensors[name] = Tensor(name, str(entry["dtype"]), shape, path, body + int(start))
    return Header(tensors, {str(k): str(v) for k, v in metadata.items()})


def _describe(start: bytes, size: int) -> str:
    for magic, text in _FOREIGN.items():
        if start.startswith(magic):
            return text
    if size == 0:
        return "empty"
    if size < 8:
        return f"{size} bytes long"
    if start.isascii() and start.decode("ascii").isprintable():
        return f"text that begins {start.decode('ascii')!r}"
    return f"a file that begins with the bytes {start[:8].hex(' ')}"


def _shape(config: Mapping[str, Any]) -> Shape:
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else config

    def number(*keys: str) -> int | None:
        return next((text[key] for key in keys if isinstance(text.get(key), int)), None)

    layers = number("num_hidden_layers", "n_layer", "num_layers")
    heads = number("num_attention_heads", "n_head")
    hidden = number("hidden_size", "n_embd", "d_model")
    head_size = number("v_head_dim", "head_dim")
    if head_size is None and heads and hidden:
        head_size = hidden // heads
    architectures = config.get("architectures") or [None]
    return Shape(
        architecture=architectures[0],
        layers=layers,
        attention_layers=_attention_layers(text.get("layer_types"), layers),
        heads=heads,
        head_size=head_size,
        hidden=hidden,
        declared=config.get(DECLARATION),
    )


def _attention_layers(types: object, layers: int | None) -> tuple[int, ...] | None:
    """Return the layers with softmax attention; `layer_types` names hybrids' others `linear_attention` or `mamba`."""
    if isinstance(types, list) and len(types) == layers:
        return tuple(i for i, kind in enumerate(types) if "linear" not in str(kind) and "attention" in str(kind))
    return None if layers is None else tuple(range(layers))


def _allowed(shape: Shape) -> str:
    element = shape.rows("element")
    return f"{shape.heads} (head-wise)" + (f" or {element} (element-wise)" if element else "")
