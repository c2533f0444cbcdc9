"""The command `sluice`. Starts fast: what a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sluice import __version__
from vllm_sluice.commands.problem import Problem

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_CONFIG_HELP = "YAML file (default: the one named by SLUICE_CONFIG, else none)"
_EPILOG = """\
exit status: 0 done, 1 something is wrong, 2 the arguments or the configuration cannot be used,
3 a change of a running server met another one
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except Problem as error:
        print(f"sluice: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe has seen enough; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["serve"]:
        return _serve(arguments[1:])
    own, options = arguments, []
    if arguments[:1] in (["demo"], ["stack"], ["baseline"]) and "--" in arguments:
        own, options = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    args = _parser(own).parse_args(own)
    if options:
        args.vllm = options
    status: int = args.run(args)
    return status


def _serve(arguments: list[str]) -> int:
    from vllm_sluice.commands import serve
    from vllm_sluice.config import ConfigError

    try:
        return serve.run(arguments)
    except ConfigError as error:
        return _unusable(error)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice",
        description="Gated attention and live activation metrics for vLLM.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sluice {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", add_help=False, help="start vLLM's OpenAI-compatible server with Sluice")
    _add_demo(commands)
    _add_stack(commands)
    _add_doctor(commands)
    _add_config(commands)
    _add_gates(commands)
    _add_baseline(commands)
    _add_metrics(commands)
    _add_control(commands)
    _add_exporter(commands)
    if arguments[:1] == ["lab"]:
        _add_lab(commands)
    else:
        commands.add_parser("lab", add_help=False, help="train, measure and export gated and ungated twins")
    return parser


def _add_demo(commands: Subparsers) -> None:
    from vllm_sluice.demo import run as demo

    demo.add_command(commands)


def _add_stack(commands: Subparsers) -> None:
    from vllm_sluice.stack import run as stack

    stack.add_command(commands)


def _add_doctor(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, allowed and configured, what would be patched, and what is wrong",
        description="Say what is installed, allowed and configured, what would be patched in a model, and what is "
        "wrong, with the remedy. The exit status is 1 if something is wrong.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or downloaded Hugging Face name of a model")
    _add_config_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _add_config(commands: Subparsers) -> None:
    parser = commands.add_parser("config", help="show or check the configuration, print its schema")
    choices = parser.add_subparsers(dest="config_command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("show", _config_show, "print every setting in force, and where those that were set come from"),
        ("check", _config_check, "check the configuration; exit status 2 if it cannot be used"),
        ("schema", _config_schema, "print the JSON schema of the configuration"),
    ):
        command = choices.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        if name != "schema":
            command.add_argument("file", nargs="?", metavar="FILE", help=_CONFIG_HELP)
            _add_config_option(command)


def _add_gates(commands: Subparsers) -> None:
    from vllm_sluice.commands import gates_inspect

    gates_inspect.add_command(commands)


def _add_baseline(commands: Subparsers) -> None:
    from vllm_sluice.commands import baseline

    baseline.add_command(commands)


def _add_metrics(commands: Subparsers) -> None:
    parser = commands.add_parser("metrics", help="document the metrics")
    choices = parser.add_subparsers(dest="metrics_command", required=True, metavar="COMMAND")
    docs = choices.add_parser("docs", help="print docs/metrics.md, made from the catalogue of metrics")
    where = docs.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="FILE", help="write the page there")
    where.add_argument("--check", type=Path, metavar="FILE", help="exit with status 1 if FILE is not that page")
    docs.set_defaults(run=_metrics_docs)


def _add_control(commands: Subparsers) -> None:
    from vllm_sluice.commands import control

    control.add_commands(commands)


def _add_exporter(commands: Subparsers) -> None:
    from vllm_sluice.commands import exporter

    exporter.add_command(commands)


def _add_lab(commands: Subparsers) -> None:
    try:
        from vllm_sluice.lab.commands import add_commands
    except ImportError as error:
        raise Problem(f"the lab cannot be loaded: {error}; it needs torch, numpy and tokenizers") from None
    add_commands(commands)


def _add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sluice-config", metavar="FILE", help=_CONFIG_HELP)


def _doctor(args: argparse.Namespace) -> int:
    from vllm_sluice.commands import doctor

    return doctor.run(args.model, args.sluice_config, as_json=args.json)


def _config_show(args: argparse.Namespace) -> int:
    from vllm_sluice import config

    try:
        loaded = config.load(_config_file(args))
    except config.ConfigError as error:
        return _unusable(error)
    print(config.as_yaml(loaded.config), end="")
    for key, origin in sorted(loaded.origins.items()):
        print(f"# {key}: from {origin}")
    return 0


def _config_check(args: argparse.Namespace) -> int:
    from vllm_sluice import config

    path = _config_file(args)
    try:
        loaded = config.load(path)
    except config.ConfigError as error:
        return _unusable(error)
    source = path or os.environ.get(config.CONFIG_VARIABLE) or "no file"
    count = len(loaded.origins)
    print(f"{source}: good, {count} setting{'' if count == 1 else 's'}, "
          f"structural fingerprint {loaded.config.structural_fingerprint()}")  # fmt: skip
    return 0


def _config_schema(args: argparse.Namespace) -> int:
    from vllm_sluice import config

    print(json.dumps(config.schema(), indent=2))
    return 0


def _config_file(args: argparse.Namespace) -> str | None:
    if args.file and args.sluice_config and args.file != args.sluice_config:
        raise Problem(f"two configuration files were named, {args.file} and {args.sluice_config}; name one")
    named: str | None = args.file or args.sluice_config
    return named


def _metrics_docs(args: argparse.Namespace) -> int:
    from vllm_sluice.commands import metrics_docs

    page = metrics_docs.page()
    if args.output is not None:
        args.output.write_text(page, encoding="utf-8")
    elif args.check is not None:
        metrics_docs.check(args.check, page)
    else:
        print(page, end="")
    return 0


def _unusable(error: Exception) -> int:
    print(f"sluice: the configuration cannot be used:\n{error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
