"""`sluice serve`: the stock `vllm serve` in this process, with the plugin allow-listed and mistakes caught early."""

from __future__ import annotations

import difflib
import errno
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sluice import config
from vllm_sluice.commands import allowlist, distribution, gatefile
from vllm_sluice.commands.problem import Problem

CONFIG_OPTION = "--sluice-config"
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
HELP = f"""\
usage: sluice serve MODEL [{CONFIG_OPTION} FILE] [any option of vllm serve]

Start the OpenAI-compatible server of vLLM with Sluice.

  MODEL                  folder or Hugging Face name of a model
  {CONFIG_OPTION} FILE   settings of Sluice (default: the file named by {config.CONFIG_VARIABLE}, else none)

All other options go to `vllm serve` as they are; `sluice serve --help=all` lists them.
"""

_HUGGING_FACE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_DEFAULT_PORT = 8000


@dataclass(frozen=True)
class Request:
    """What the arguments ask for, as far as the early checks need to know.

    Attributes
    ----------
    vllm
        The arguments for `vllm serve`.
    sluice_config
        File named by `--sluice-config`, or None.
    model
        Model, or None if vLLM is to use its default.
    host
        Interface, empty for all.
    port
        TCP port, or None if the server will not listen on one.
    """

    vllm: tuple[str, ...]
    sluice_config: str | None
    model: str | None
    host: str
    port: int | None


def run(arguments: Sequence[str]) -> int:
    """Serve until the server stops; return its exit status.

    Raises
    ------
    ConfigError
        If the settings of Sluice are unusable.
    Problem
        If it can be seen that the server would not start.
    """
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    request = parse(arguments)
    settings = _configure(request.sluice_config)
    if not any(argument.startswith("--help=") for argument in request.vllm):
        _check(request, settings)
    allow = allowlist.with_sluice(os.environ, allowlist.installed_plugins())
    os.environ[allowlist.VARIABLE] = allow.value
    for name in allow.routes_opened:
        _say(f"note: naming {name} in {allowlist.VARIABLE} also lets it add HTTP routes; set the variable to avoid it")
    _say(f"{allowlist.VARIABLE}={allow.value}")
    choose_runner(settings)
    distribution.provide_name()
    return _vllm_serve(request.vllm)


def parse(arguments: Sequence[str]) -> Request:
    """Split the arguments into Sluice's and vLLM's, and find model, host and port.

    Raises
    ------
    Problem
        If an option of Sluice lacks its value.
    """
    vllm, own = _take(arguments, CONFIG_OPTION)
    named = _options(vllm)
    file = _vllm_config_file(named.get("config"))
    model = vllm[0] if vllm and not vllm[0].startswith("-") else named.get("model", file.get("model"))
    port: Any = named.get("port", file.get("port", _DEFAULT_PORT))
    listens = "uds" not in named and "headless" not in named and str(port).isdigit() and int(port) > 0
    return Request(
        vllm=tuple(vllm),
        sluice_config=own,
        model=str(model) if model else None,
        host=str(named.get("host", file.get("host", "")) or ""),
        port=int(port) if listens else None,
    )


def check_port(host: str, port: int, option: str = "--port ") -> None:
    """Raise `Problem` if a server could not listen here."""
    if port > 65535:
        raise Problem(f"port {port} does not exist; the highest is 65535")
    shown = f"{host or 'all interfaces'}, port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE, family=0 if host else socket.AF_INET
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise Problem(f"cannot listen on {shown}: {error.strerror}; check --host") from None
    except PermissionError:
        raise Problem(f"cannot listen on {shown}: no permission; name one above 1023, such as {option}8000") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = f"{option}{port + 1 if port < 65535 else _DEFAULT_PORT}"
            raise Problem(f"port {port} is taken; stop what listens there or name another, such as {other}") from None
        raise Problem(f"cannot listen on {shown}: {error.strerror}; check --host") from None


def check_model(model: str) -> None:
    """Raise `Problem` if a model is neither a folder with a model in it nor what can be a Hugging Face name."""
    path = Path(model).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("config.json", "params.json")) or any(path.glob("*.gguf")):
            return
        raise Problem(f"{model} is a folder without config.json, so no model; found {_listing(path)}")
    if path.exists() or "://" in model:
        return
    siblings = _models_beside(path)
    if _HUGGING_FACE_NAME.fullmatch(model) is None:
        raise Problem(f"there is no folder {model}, and Hugging Face names look like owner/name{_hint(path, siblings)}")
    if siblings and hugging_face_folder(model) is None:
        elsewhere = "For the Hugging Face model of that name start in another folder"
        raise Problem(f"there is no folder {model}{_hint(path, siblings)}. {elsewhere}".replace("?.", "?"))


def _check(request: Request, settings: config.Config) -> None:
    if distribution.installed() is None:
        raise Problem("vLLM is not installed in this Python; on a GPU: pip install vllm, on a CPU: make install")
    if allowlist.PLUGIN not in allowlist.installed_plugins()["vllm.general_plugins"]:
        raise Problem("this Python has no entry point for Sluice, so vLLM cannot find it; run: pip install vllm-sluice")
    if request.model is not None:
        check_model(request.model)
    source = settings.patches.gate.source
    if settings.enabled and source.endswith(".safetensors"):
        gatefile.read_header(Path(source))
    if request.port is not None:
        check_port(request.host, request.port)


def choose_runner(settings: config.Config) -> None:
    """Ask for vLLM's first model runner where the second is the default: probes work with the first only."""
    found = distribution.installed()
    wanted = settings.probes.any_installed or settings.control.chooses_rows
    if found is None or found.is_cpu or not settings.enabled or not wanted or RUNNER_VARIABLE in os.environ:
        return
    os.environ[RUNNER_VARIABLE] = "0"
    _say(f"note: {RUNNER_VARIABLE}=0, because probes work with vLLM's first model runner; set the variable to choose")


def _configure(path: str | None) -> config.Config:
    """Check the settings and name their file to all processes of the server."""
    loaded = config.load(path)
    if path is not None:
        os.environ[config.CONFIG_VARIABLE] = str(Path(path).resolve())
    return loaded.config


def _vllm_serve(arguments: Sequence[str]) -> int:
    from vllm_sluice import compat

    compat.run_command(["serve", *arguments])
    return 0


def _take(arguments: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """Take an option with its value out of the arguments; the last one counts."""
    rest: list[str] = []
    value = None
    waiting = iter(arguments)
    for argument in waiting:
        if argument == option:
            value = next(waiting, "")
        elif argument.startswith(option + "="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
            continue
        if not value or value.startswith("--"):
            raise Problem(f"{option} needs the name of a YAML file, such as {option} sluice.yaml")
    return rest, value


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Return the long options and the text that follows each; vLLM takes underscores for dashes."""
    found: dict[str, str] = {}
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found[name.replace("_", "-")] = value if equals else after
    return found


def _vllm_config_file(path: str | None) -> Mapping[str, Any]:
    """Read the file of `vllm serve --config`; vLLM itself complains about a bad one."""
    import yaml

    if path is None:
        return {}
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {str(key).replace("_", "-"): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def _models_beside(path: Path) -> list[str]:
    """Return the models in the folder where a model was expected."""
    try:
        return sorted(p.name for p in path.parent.iterdir() if (p / "config.json").is_file())
    except OSError:
        return []


def hugging_face_folder(model: str) -> Path | None:
    """Return the folder of a downloaded Hugging Face model, or None."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
    try:
        revision = (hub / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = hub / "snapshots" / revision
    return folder if folder.is_dir() else None


def _hint(path: Path, siblings: list[str]) -> str:
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f"; did you mean {path.parent / close[0]}?"
    return f"; {path.parent} holds {', '.join(siblings)}" if siblings else ""


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"


def _say(text: str) -> None:
    print(f"sluice: {text}", file=sys.stderr, flush=True)
