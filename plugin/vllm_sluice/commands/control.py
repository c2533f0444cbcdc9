"""The commands that talk to a running server: their arguments; what they do is in the modules that they import."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sluice.commands.client import Client

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_URL = "http://127.0.0.1:8000"
_PAGE = "/plugins/sluice"
_KEY = re.compile(r"(patches|probes)\.([a-z0-9_]+)\.([a-z0-9_]+)")
_KIND = re.compile(r"[A-Za-z0-9_-]+")
_MOST_CHANGES = 500
_CHANGE_TIMEOUT = 60.0
_READ_TIMEOUT = 10.0
_READING = "exit status: 0 done, 1 refused by the server or no server there, 2 the arguments cannot be used"
_CHANGING = f"""\
The token is that of the server's setting control.token_file or of its variable SLUICE_ADMIN_TOKEN.

{_READING},
3 a conflict: the generation moved on, or somebody else keeps the engine paused
"""


def add_commands(subparsers: Subparsers) -> None:
    """Add `state`, `enable`, `disable`, `set`, `changes`, `watch` and `top` to the command line."""
    _add_state(subparsers)
    for word, on in (("enable", True), ("disable", False)):
        _add_switch(subparsers, word, on)
    _add_set(subparsers)
    _add_changes(subparsers)
    _add_watch(subparsers)
    _add_top(subparsers)


def _add_state(subparsers: Subparsers) -> None:
    parser = _reading(
        subparsers, "state", _state,
        "show a running server's engines, ranks, patches and run-time values",
        "Lines marked ! say what is not as it should be.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the server's answer as JSON")


def _add_switch(subparsers: Subparsers, word: str, on: bool) -> None:
    acts = "act" if on else "no longer act"
    parser = _changing(
        subparsers, word, _switch,
        f"let an installed patch of a running server {acts}",
        "No restart, and no token mixes two states.",
    )  # fmt: skip
    parser.add_argument("patch", type=_patch, metavar="PATCH", help="name of the patch, such as gate")
    parser.set_defaults(on=on)


def _add_set(subparsers: Subparsers) -> None:
    parser = _changing(
        subparsers, "set", _set,
        "change run-time values of a running server",
        "`sluice state` lists the keys. Each patch and each probe is one request and one generation of its own; "
        "with several, all are checked before the first is changed.",
    )  # fmt: skip
    parser.add_argument(
        "settings", nargs="+", type=_setting, action=_Settings, metavar="KEY=VALUE",
        help="such as patches.gate.temperature=1.5; the value is YAML; without one (KEY=) what an admin set is dropped "
        "and file, environment or default count again",
    )  # fmt: skip


def _add_changes(subparsers: Subparsers) -> None:
    parser = _reading(
        subparsers, "changes", _changes,
        "list the latest changes of a running server's run-time values",
        "Oldest first: who made them, what changed, how it ended.",
    )  # fmt: skip
    parser.add_argument("--limit", type=_count, default=50, metavar="N", help="at most so many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the server's answer as JSON")


def _add_watch(subparsers: Subparsers) -> None:
    parser = _reading(
        subparsers, "watch", _watch,
        "print each change of a running server's state as it happens, until Ctrl-C",
        "A line for each change of run-time values and each time that requests are paused, the file breaks, or a rank "
        "lags or disappears.",
    )  # fmt: skip
    _add_interval(parser)


def _add_top(subparsers: Subparsers) -> None:
    parser = _reading(
        subparsers, "top", _top,
        "watch activations, attention sinks and gates layer by layer",
        "Shows what the live page shows, in the terminal. q or Ctrl-C ends it.",
    )  # fmt: skip
    _add_interval(parser)
    parser.add_argument("--engine", metavar="NAME", help="the engine to look at (default: the first)")
    parser.add_argument("--once", action="store_true", help="print all layers once and end; for pipes and files too")


def _reading(
    subparsers: Subparsers, name: str, action: Callable[[argparse.Namespace], int], text: str, more: str
) -> argparse.ArgumentParser:
    return _command(subparsers, name, action, text, more, _READING)


def _changing(
    subparsers: Subparsers, name: str, action: Callable[[argparse.Namespace], int], text: str, more: str
) -> argparse.ArgumentParser:
    parser = _command(subparsers, name, action, text, more, _CHANGING)
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    parser.add_argument(
        "--if-generation", type=_generation, metavar="N", help="only if the server is at this generation"
    )
    parser.add_argument("--no-guard", action="store_true", help="for all requests at once, even where a guard is set")
    parser.add_argument(
        "--timeout", type=duration, default=_CHANGE_TIMEOUT, metavar="S",
        help="wait so many seconds for each answer (default: %(default)g)",
    )  # fmt: skip
    return parser


def _command(
    subparsers: Subparsers, name: str, action: Callable[[argparse.Namespace], int], text: str, more: str, epilog: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}. {more}",
        epilog=epilog,
        formatter_class=_Formatter,
    )
    parser.add_argument("--url", type=server_url, default=DEFAULT_URL, help="the server (default: %(default)s)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help="file with the admin token, or with a NAME: TOKEN a line (default: the variable SLUICE_ADMIN_TOKEN)",
    )  # fmt: skip
    parser.add_argument("--as", dest="token_name", metavar="NAME", help="which token of the file")
    parser.set_defaults(run=_run, action=action, timeout=_READ_TIMEOUT, parser=parser)
    return parser


def _add_interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval", type=duration, default=2.0, metavar="S", help="look every so many seconds (default: %(default)g)"
    )


class _Formatter(argparse.HelpFormatter):
    """Wraps the description, and leaves the lines of the epilog as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "exit status:" in text:
            return text
        return super()._fill_text(text, width, indent)


class _Settings(argparse.Action):
    """Gathers `KEY=VALUE` in a dict, and refuses a key that comes twice."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        gathered: dict[str, Any] = {}
        for key, value in values:
            if key in gathered:
                parser.error(f"{key} is set twice; name it once")
            gathered[key] = value
        setattr(namespace, self.dest, gathered)


# ------------------------------------------------------------------------------------------------ actions
def _run(args: argparse.Namespace) -> int:
    if args.token_name is not None and args.token_file is None:
        args.parser.error("--as picks a token of a file; name that with --token-file")
    from vllm_sluice.commands.client import Conflict

    try:
        status: int = args.action(args)
    except Conflict as error:
        print(f"sluice: {error}", file=sys.stderr)
        return 3
    return status


def _state(args: argparse.Namespace) -> int:
    from vllm_sluice.commands import answers, state, terminal

    client = _client(args)
    data = client.get("state")
    if args.json:
        print(json.dumps(data, indent=2))
    else:
        terminal.say(state.report(client.checked(answers.State, data), client.url))
    return 0


def _switch(args: argparse.Namespace) -> int:
    return _change(args, {f"patches.{args.patch}.enabled": args.on})


def _set(args: argparse.Namespace) -> int:
    return _change(args, args.settings)


def _change(args: argparse.Namespace, edits: dict[str, Any]) -> int:
    from vllm_sluice.commands import change

    if args.dry_run:
        change.preview(_client(args), edits, args.if_generation)
    else:
        change.make(_client(args), edits, args.if_generation, guarded=not args.no_guard)
    return 0


def _changes(args: argparse.Namespace) -> int:
    from vllm_sluice.commands import answers, changes, terminal

    client = _client(args)
    data = client.get("changes", limit=args.limit)
    if args.json:
        print(json.dumps(data, indent=2))
    else:
        terminal.say(changes.report(client.checked(answers.Changes, data).changes))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from vllm_sluice.commands import watch

    watch.run(_client(args), args.interval)
    return 0


def _top(args: argparse.Namespace) -> int:
    from vllm_sluice.commands import top

    if args.once:
        top.once(_client(args), args.engine)
    else:
        top.run(_client(args), args.engine, args.interval)
    return 0


def _client(args: argparse.Namespace) -> Client:
    from vllm_sluice.commands.client import Client, read_token

    return Client(args.url, read_token(args.token_file, args.token_name), args.timeout)


# ------------------------------------------------------------------------------------------------ types of arguments
def server_url(text: str) -> str:
    """Return a base address; that of the live page will do, too."""
    example = f"write it like {DEFAULT_URL}"
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no address: {error}; {example}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server; {example}")
    if parts.username is not None or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} has more than scheme, host, port and path; {example}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix(_PAGE)}".rstrip("/")


def _patch(text: str) -> str:
    name = text.removeprefix("patches.").removesuffix(".enabled")
    if _KIND.fullmatch(name) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a patch; `sluice state` lists them")
    return name


def _setting(text: str) -> tuple[str, Any]:
    """Return key and value of `KEY=VALUE`; no value is None."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as patches.gate.temperature=1.5")
    if _KEY.fullmatch(key) is None:
        raise argparse.ArgumentTypeError(
            f"{key!r} is no run-time key; they look like patches.gate.temperature and "
            "probes.attention.interval_seconds, and `sluice state` lists them"
        )
    try:
        parsed = yaml.safe_load(value)
        json.dumps(parsed, allow_nan=False)
    except (yaml.YAMLError, TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{key}: {value!r} is no plain YAML value, such as true, 1.5 or [a, b]"
        ) from None
    return key, parsed


def duration(text: str) -> float:
    """Return a time in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no time of 0.1 to 3600 seconds")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_CHANGES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {_MOST_CHANGES}, which the server keeps")
    return int(text)


def _generation(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no generation, a number from 0 on; `sluice state` shows it")
    return int(text)
