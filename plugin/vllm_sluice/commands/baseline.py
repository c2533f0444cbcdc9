"""`sluice baseline`: record a calibration file, from a running server or from text, and show what one holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sluice.commands.control import DEFAULT_URL, duration, server_url
from vllm_sluice.commands.problem import Problem

if TYPE_CHECKING:
    from vllm_sluice.config import Site
    from vllm_sluice.telemetry.baseline import Baseline, Section

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXITS = "exit status: 0 done, 1 nothing was recorded or the file cannot be used, 2 the arguments cannot be used"
_SITES: tuple[Site, ...] = ("hidden", "attention_input", "mlp_input")


def add_command(subparsers: Subparsers) -> None:
    """Add `baseline` with `record` and `show` to the command line."""
    parser = subparsers.add_parser("baseline", help="record or show a calibration file to compare live values with")
    commands = parser.add_subparsers(dest="baseline_command", required=True, metavar="COMMAND")
    _add_record(commands)
    show = commands.add_parser("show", help="print what a calibration file holds", epilog=_EXITS)
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--json", action="store_true", help="print JSON instead of tables")
    show.set_defaults(run=_show)


def _add_record(commands: Subparsers) -> None:
    record = commands.add_parser(
        "record",
        help="write a calibration file",
        description="Write how large activations are, from what a running server sees (--url) or from text that a "
        "model reads here (--model). Name the file in telemetry.baseline, and the server exports it for comparison. "
        "With --model, what follows -- are options of vLLM.",
        epilog=_EXITS,
    )
    source = record.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", type=server_url, metavar="URL", help=f"a running server, such as {DEFAULT_URL}")
    source.add_argument("--model", metavar="MODEL", help="folder or Hugging Face name of a model, to be run here")
    record.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    record.add_argument("--append", action="store_true", help="add to FILE, in place of a section of that patch state")
    record.add_argument("--json", action="store_true", help="print the result as JSON")
    live = record.add_argument_group("with --url")
    live.add_argument("--seconds", type=duration, metavar="N", help="how long to listen (default: 60)")
    text = record.add_argument_group("with --model")
    text.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text, plain or packed with xz")
    text.add_argument("--tokens", type=_positive, metavar="N", help="read at most so many tokens (default: 65536)")
    text.add_argument("--context", type=_positive, metavar="N", help="tokens of one prompt, 2 or more (default: 512)")
    text.add_argument("--all-states", action="store_true", help="record with installed patches on, and with them off")
    text.add_argument("--sluice-config", metavar="FILE", help="settings, such as where gates come from")
    record.set_defaults(run=_record, parser=record, vllm=[])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _record(args: argparse.Namespace) -> int:
    from vllm_sluice.commands import record
    from vllm_sluice.config import ConfigError

    _check_arguments(args)
    before = _before(args.output, args.append)
    try:
        if args.url:
            model, sections = record.from_server(args.url, args.seconds or 60.0)
        else:
            model, sections = record.from_text(
                args.model, args.text, tokens=args.tokens or 65536, context=args.context or 512,
                all_states=args.all_states, sluice_config=args.sluice_config, vllm=args.vllm,
            )  # fmt: skip
    except ConfigError as error:
        print(f"sluice: the configuration cannot be used:\n{error}", file=sys.stderr)
        return 2
    _save(args.output, before, model, sections)
    if args.json:
        recorded = {state: _about(section) for state, section in sections.items()}
        print(json.dumps({"file": str(args.output), "model": model, "sections": recorded}, indent=2))
    else:
        for state, section in sections.items():
            print(f"{args.output}: {state}, {len(section.layers)} layers from {section.tokens} tokens")
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse, with exit status 2, what belongs to the other source."""
    given = {
        "--text": args.text, "--tokens": args.tokens, "--context": args.context, "--all-states": args.all_states,
        "--sluice-config": args.sluice_config, "what follows --": args.vllm,
    }  # fmt: skip
    if args.url and (wrong := next((name for name, value in given.items() if value), None)):
        args.parser.error(f"{wrong} goes with --model, not with --url")
    if args.model and args.seconds is not None:
        args.parser.error("--seconds goes with --url, not with --model")
    if args.model and not args.text:
        args.parser.error("--model needs --text FILE, the text to read")


def _before(path: Path, append: bool) -> Baseline | None:
    """Return the baseline to add to; before anything is recorded, so that no time is lost."""
    if not path.parent.is_dir():
        raise Problem(f"there is no folder {path.parent} to write {path.name} into")
    if not path.exists():
        return None
    if not append:
        raise Problem(f"{path} is there already; add to it with --append, or name another file")
    return _read(path)


def _save(path: Path, before: Baseline | None, model: str, sections: Mapping[str, Section]) -> None:
    from vllm_sluice.telemetry.baseline import Baseline

    if before is not None and before.model != model:
        raise Problem(f"{path} is of the model {before.model}, this is {model}; name another file")
    whole = before
    for state, section in sections.items():
        whole = whole.with_section(state, section) if whole else Baseline(model=model, sections={state: section})
    assert whole is not None
    try:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(whole.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
        partial.replace(path)  # a server that starts meanwhile reads the old file or the new one
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from None


def _read(path: Path) -> Baseline:
    from vllm_sluice.telemetry import baseline

    try:
        return baseline.read(path)
    except baseline.BaselineError as error:
        raise Problem(str(error)) from None


# ------------------------------------------------------------------------------------------------ show
def _show(args: argparse.Namespace) -> int:
    found = _read(args.file)
    if args.json:
        sections = {
            state: {**_about(section), "layers": section.model_dump(mode="json", exclude_none=True)["layers"]}
            for state, section in found.sections.items()
        }
        print(json.dumps({"file": str(args.file), "model": found.model, "sections": sections}, indent=2))
        return 0
    print(f"{args.file}: {found.model}")
    for state, section in found.sections.items():
        print(f"\n{state}  ({section.digest}): {section.tokens} tokens from {section.source}, {section.recorded}, "
              f"sluice {section.sluice_version}, vLLM {section.vllm_version}{_parameters(section)}")  # fmt: skip
        print("\n".join(_table(section)))
    return 0


def _about(section: Section) -> dict[str, Any]:
    return {"baseline": section.digest, **section.model_dump(mode="json", exclude={"layers"})}


def _parameters(section: Section) -> str:
    return "".join(f", {name} {value:g}" for name, value in sorted(section.parameters.items()))


def _table(section: Section) -> list[str]:
    rows: list[tuple[str, ...]] = [("layer", "abs max", "max/median", "sink mass", *_SITES)]
    for label, layer in section.layers.items():
        values = (layer.activation_abs_max, layer.activation_max_to_median_ratio, layer.attention_sink_mass)
        rows.append((label, *map(_number, values), *(_number(layer.sites.get(site)) for site in _SITES)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
