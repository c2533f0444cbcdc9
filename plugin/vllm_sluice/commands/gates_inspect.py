"""`sluice gates inspect`: what gates a sidecar or a checkpoint holds, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sluice.checkpoints.names import MODULE
from vllm_sluice.commands import gatefile
from vllm_sluice.commands.gatefile import GatePair, Header, Shape, Summary
from vllm_sluice.commands.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


@dataclass(frozen=True)
class Row:
    """One gate and its values; `gate_at_zero` is the mean of sigmoid(bias)."""

    pair: GatePair
    granularity: str
    known_from: str
    weight: Summary | None
    bias: Summary | None
    gate_at_zero: float | None


def add_command(subparsers: Subparsers) -> None:
    """Add `gates` with `inspect` to the command line."""
    parser = subparsers.add_parser("gates", help="look into files with gate weights")
    commands = parser.add_subparsers(dest="gates_command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="list the gates in a safetensors file or a checkpoint folder and check them",
        description="List the gates in a safetensors file (sidecar or checkpoint) or in a checkpoint folder, with "
        "shapes and values, and check them. The exit status is 1 if something is wrong.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help=".safetensors file, or folder of a checkpoint")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the gates; return 1 if something is wrong with them.

    Raises
    ------
    Problem
        If the file cannot be read or holds no gate.
    """
    header, shape = read(args.file)
    pairs = gatefile.gates(header.tensors.values())
    if not pairs:
        raise Problem(_no_gates(args.file, header))
    rows = [_row(pair, shape, header) for pair in pairs]
    wrong = gatefile.problems(pairs, shape, header.metadata) + _bad_values(rows)
    if args.json:
        print(json.dumps({"file": str(args.file), "gates": [_plain(row) for row in rows], "problems": wrong}, indent=2))
    else:
        print("\n".join(_report(args.file, rows, wrong)))
    return 1 if wrong else 0


def read(path: Path) -> tuple[Header, Shape | None]:
    """Read a file or a checkpoint folder, and the config.json beside it if there is one.

    Raises
    ------
    Problem
        If neither can be read.
    """
    folder = path if path.is_dir() else path.parent
    header = gatefile.read_folder(path) if path.is_dir() else gatefile.read_header(path)
    return header, gatefile.read_shape(folder) if (folder / "config.json").is_file() else None


def _row(pair: GatePair, shape: Shape | None, header: Header) -> Row:
    kind, known_from = gatefile.granularity(pair, shape, header.metadata)
    return Row(
        pair,
        kind or "?",
        known_from,
        gatefile.summarize(pair.weight) if pair.weight else None,
        gatefile.summarize(pair.bias) if pair.bias else None,
        gatefile.mean_gate_at_zero(pair.bias),
    )


def _bad_values(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.pair.module}: {MODULE}.{part} has {summary.bad} NaN or infinite values"
        for row in rows
        for part, summary in (("weight", row.weight), ("bias", row.bias))
        if summary is not None and summary.bad
    ]


def _no_gates(path: Path, header: Header) -> str:
    names = sorted(header.tensors)
    shown = f"its {len(names)} tensors are named like {names[0]}" if names else "it holds no tensor at all"
    return f"{path} has no gate: a name ending in .{MODULE}.weight is needed, {shown}"


def _report(path: Path, rows: Sequence[Row], wrong: Sequence[str]) -> list[str]:
    known = sorted({row.known_from for row in rows if row.granularity != "?"})
    source = f"; head or element known from the {' and '.join(known)}" if known else ""
    lines = [f"{path}: {len(rows)} gates{source}", ""]
    table = [
        ("module", "gate", "weight", "dtype", "min", "mean", "max", "bias", "min", "mean", "max", "gate at x = 0"),
        *(_cells(row) for row in rows),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    if wrong:
        lines += ["", *(f"wrong: {line}" for line in wrong)]
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    weight = row.pair.weight
    bias = "missing" if row.pair.bias is None else " x ".join(map(str, row.pair.bias.shape))
    at_zero = "?" if row.gate_at_zero is None else f"{row.gate_at_zero:.3f}"
    return (
        row.pair.module,
        row.granularity,
        "missing" if weight is None else " x ".join(map(str, weight.shape)),
        "" if weight is None else weight.dtype,
        *_numbers(row.weight),
        bias,
        *_numbers(row.bias),
        at_zero,
    )


def _numbers(summary: Summary | None) -> tuple[str, str, str]:
    if summary is None:
        return "", "", ""
    if not summary.read:
        return "?", "?", "?"
    return f"{summary.least:.3g}", f"{summary.mean:.3g}", f"{summary.greatest:.3g}"


def _plain(row: Row) -> dict[str, Any]:
    def tensor(part: gatefile.Tensor | None, summary: Summary | None) -> dict[str, Any] | None:
        if part is None or summary is None:
            return None
        values = {"min": summary.least, "mean": summary.mean, "max": summary.greatest, "not_finite": summary.bad}
        finite = {key: None if math.isnan(value) else value for key, value in values.items()}  # NaN is no JSON
        return {"shape": list(part.shape), "dtype": part.dtype, **(finite if summary.read else {})}

    at_zero = None if row.gate_at_zero is None or math.isnan(row.gate_at_zero) else row.gate_at_zero
    return {
        "module": row.pair.module,
        "layer": row.pair.layer,
        "granularity": None if row.granularity == "?" else row.granularity,
        "known_from": row.known_from,
        "weight": tensor(row.pair.weight, row.weight),
        "bias": tensor(row.pair.bias, row.bias),
        "gate_at_zero": at_zero,
    }
