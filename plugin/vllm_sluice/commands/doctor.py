"""`sluice doctor`: what is installed, allowed and configured, what would be patched, and what is wrong."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vllm_sluice import __version__, config
from vllm_sluice.checkpoints import names
from vllm_sluice.commands import allowlist, distribution, gatefile, serve
from vllm_sluice.commands.distribution import VllmDistribution
from vllm_sluice.commands.gatefile import GatePair, Shape
from vllm_sluice.commands.problem import Problem
from vllm_sluice.control.tokens import read_tokens

Verdict = Literal["good", "note", "wrong"]

CPU_MEMORY_GIB = 4.0
"""Free memory that serving a small model on the CPU takes."""
_SHARED_MEMORY_MIB = 256
_MARKS: dict[Verdict, str] = {"good": " ", "note": "-", "wrong": "!"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do about a note or a wrong thing."""

    section: str
    name: str
    value: str
    verdict: Verdict = "good"
    remedy: str = ""


def run(model: str | None, config_path: str | None, *, as_json: bool) -> int:
    """Print the report; return 1 if something is wrong."""
    findings = list(examine(model, config_path, os.environ))
    wrong = [finding for finding in findings if finding.verdict == "wrong"]
    if as_json:
        print(json.dumps({"wrong": len(wrong), "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print("\n".join(_report(findings, len(wrong))))
    return 1 if wrong else 0


def examine(model: str | None, config_path: str | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield everything that is found, section by section."""
    vllm = distribution.installed()
    yield from _installed(vllm)
    yield from _allowed(environ)
    settings = None
    try:
        loaded = config.load(config_path, environ)
        settings = loaded.config
        yield from _configured(loaded, config_path or environ.get(config.CONFIG_VARIABLE), environ)
    except config.ConfigError as error:
        yield Finding("configuration", "settings", str(error), "wrong", "see `sluice config schema` for the keys")
    yield from _environment(vllm, environ)
    if model is not None:
        yield from _model(model, settings)


def free_memory_gib() -> float | None:
    """Return the memory that new processes can have, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except (OSError, ValueError, IndexError):
        pass
    return None


# ------------------------------------------------------------------------------------------------ sections
def _installed(vllm: VllmDistribution | None) -> Iterator[Finding]:
    section = "installed"
    yield Finding(section, "python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")
    torch_found = _torch_version()
    if torch_found is None:
        yield Finding(section, "torch", "not installed", "wrong", "install vLLM, which brings it (see below)")
    else:
        yield Finding(section, "torch", *torch_found)
    if vllm is None:
        remedy = "on a GPU: pip install vllm; on a CPU: make install in a clone of Sluice"
        yield Finding(section, "vllm", "not installed", "wrong", remedy)
    else:
        yield _vllm_finding(vllm)
    yield Finding(section, "sluice", __version__)
    plugins = allowlist.installed_plugins()
    missing = [g for g in ("vllm.general_plugins", "vllm.endpoint_plugins") if allowlist.PLUGIN not in plugins[g]]
    if missing:
        remedy = "pip install vllm-sluice (in a clone: make install); a folder on PYTHONPATH is not enough"
        yield Finding(section, "entry points", f"none for Sluice in {', '.join(missing)}", "wrong", remedy)
    else:
        yield Finding(section, "entry points", "general and endpoint plugin")


def _vllm_finding(vllm: VllmDistribution) -> Finding:
    shown = f"{vllm.version}, distribution {vllm.name}"
    try:
        from vllm_sluice import compat
    except Exception as error:
        return Finding("installed", "vllm", f"{shown}; torch fails: {error}", "wrong", "reinstall torch and vLLM")
    if compat.is_tested_version(vllm.version):
        return Finding("installed", "vllm", shown)
    remedy = f"install vLLM {compat.TESTED_VLLM}, or set allow_untested_vllm: true and check the outputs yourself"
    return Finding("installed", "vllm", f"{shown}; tested is {compat.TESTED_VLLM}", "wrong", remedy)


def _torch_version() -> tuple[str, Verdict, str] | None:
    """Return version, verdict and remedy; imports torch, because a version alone does not mean that it loads."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        importlib.import_module("torch")
    except Exception as error:
        return f"{version}, cannot be imported: {error}", "wrong", "reinstall torch in the version that vLLM asks for"
    return version, "good", ""


def _allowed(environ: Mapping[str, str]) -> Iterator[Finding]:
    names = allowlist.listed(environ)
    plugins = allowlist.installed_plugins()
    wanted = allowlist.with_sluice(environ, plugins)
    command = f"use `sluice serve`, or {allowlist.VARIABLE}={wanted.value} vllm serve"
    if names is None:
        value = (
            "not set: `vllm serve` would load the general plugin (patches and probes) but neither metrics nor page; "
            "`sluice serve` sets it"
        )
        yield Finding("allow-list", allowlist.VARIABLE, value, "note", command)
        return
    shown = ",".join(names) or "(empty)"
    if allowlist.PLUGIN not in names:
        yield Finding("allow-list", allowlist.VARIABLE, f"{shown}: vllm serve drops Sluice", "note", command)
        return
    default = allowlist.with_sluice({}, plugins)
    dropped = [name for name in default.names if name not in names]
    if dropped:
        remedy = f"if that is not meant: {allowlist.VARIABLE}={default.value}"
        yield Finding("allow-list", allowlist.VARIABLE, f"{shown}: drops {', '.join(dropped)}", "note", remedy)
        return
    yield Finding("allow-list", allowlist.VARIABLE, f"{shown}: Sluice loads, nothing is dropped")


def _configured(loaded: config.Loaded, path: str | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    section = "configuration"
    yield Finding(section, "file", path or "none; every setting has its default")
    yield from _tokens(loaded.config.control, environ)
    for key, origin in sorted(loaded.origins.items()):
        yield Finding(section, key, f"{_value_at(loaded.config, key)}, from {origin}")
    if not loaded.config.enabled:
        yield Finding(section, "enabled", "false: Sluice does nothing", "note", "set enabled: true")
    yield Finding(section, "structural fingerprint", loaded.config.structural_fingerprint())


def _tokens(control: config.Control, environ: Mapping[str, str]) -> Iterator[Finding]:
    name = "admin tokens"
    if not control.enabled:
        yield Finding("configuration", name, "control.enabled is false: run-time values cannot be changed")
        return
    try:
        count = len(read_tokens(control.token_file, environ))
    except config.ConfigError as error:
        yield Finding("configuration", name, str(error), "wrong", "correct it; the server would not start")
        return
    text = f"{count}" if count else "none: run-time values can be read and not be changed over HTTP"
    yield Finding("configuration", name, text)


def _value_at(settings: object, key: str) -> object:
    for part in key.split("."):
        settings = getattr(settings, part, None)
    return settings


def _environment(vllm: VllmDistribution | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    section = "environment"
    run_dir = Path(environ.get(config.RUN_DIR_VARIABLE) or environ.get("SLUICE_TELEMETRY__RUN_DIR") or "/dev/shm")
    existing = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if os.access(existing, os.W_OK):
        yield Finding(section, "run folder", f"{run_dir}, writable")
    else:
        remedy = f"set {config.RUN_DIR_VARIABLE} or telemetry.run_dir to a folder that you may write to"
        yield Finding(section, "run folder", f"{existing} is not writable", "wrong", remedy)
    if vllm is not None and not vllm.is_cpu and environ.get(serve.RUNNER_VARIABLE) != "0":
        yield Finding(
            section, "model runner", f"{serve.RUNNER_VARIABLE} is not 0: `vllm serve` takes a runner without probes",
            "note", f"set {serve.RUNNER_VARIABLE}=0, as `sluice serve` does unless it is set; patches work with both",
        )  # fmt: skip
    yield from _memory(vllm)
    for name, package, purpose in (
        ("prometheus", "prometheus", "graphs in the demo, tests"),
        ("chromium", "chromium", "tests of the live page"),
    ):
        found = shutil.which(name)
        remedy = f"optional, for {purpose}: apt-get install {package}"
        yield Finding(section, name, found or "not found", "good" if found else "note", "" if found else remedy)
    if vllm is not None and vllm.is_cpu:
        yield from _compiler()


def _memory(vllm: VllmDistribution | None) -> Iterator[Finding]:
    section = "environment"
    free = free_memory_gib()
    if free is not None:
        short = vllm is not None and vllm.is_cpu and free < CPU_MEMORY_GIB
        remedy = f"free some: serving on the CPU takes {CPU_MEMORY_GIB:g} GiB and the model" if short else ""
        yield Finding(section, "free memory", f"{free:.1f} GiB", "wrong" if short else "good", remedy)
    try:
        shared = shutil.disk_usage("/dev/shm").free / 2**20
    except OSError:
        return
    short = shared < _SHARED_MEMORY_MIB
    remedy = "vLLM's processes talk through it; in a container start with --shm-size=2g" if short else ""
    yield Finding(section, "/dev/shm", f"{shared / 1024:.1f} GiB free", "wrong" if short else "good", remedy)


def _compiler() -> Iterator[Finding]:
    section = "environment"
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found:
        yield Finding(section, "C++ compiler", found)
    else:
        remedy = "apt-get install g++ python3-dev, or serve with --enforce-eager"
        yield Finding(section, "C++ compiler", "not found; vLLM compiles the model with it", "wrong", remedy)
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        yield Finding(section, "libnuma", "not found; vLLM's CPU kernels need it", "wrong", "apt-get install libnuma1")


# ------------------------------------------------------------------------------------------------ a model
def _model(model: str, settings: config.Config | None) -> Iterator[Finding]:
    section = f"model {model}"
    try:
        serve.check_model(model)
        folder = Path(model).expanduser()
        if not folder.is_dir():
            cached = serve.hugging_face_folder(model)
            if cached is None:
                remedy = "serve it once, which downloads it; or download it and name the folder"
                yield Finding(section, "folder", "not downloaded, so nothing can be said about it", "note", remedy)
                return
            folder = cached
        shape = gatefile.read_shape(folder)
    except Problem as error:
        yield Finding(section, "folder", str(error), "wrong", "name a folder with config.json and .safetensors files")
        return
    yield Finding(section, "architecture", _architecture(shape))
    try:
        pairs = gatefile.gates(gatefile.read_folder(folder).tensors.values())
        yield from _checkpoint_gates(section, shape, pairs)
    except Problem as error:
        pairs = []
        yield Finding(section, "gate tensors", str(error), "note", "only .safetensors checkpoints can be looked into")
    if settings is not None:
        yield from _plan(section, shape, pairs, settings)


def _architecture(shape: Shape) -> str:
    layers = f"{shape.layers} layers"
    if shape.attention_layers is not None and len(shape.attention_layers) != shape.layers:
        layers += f", {len(shape.attention_layers)} of them with softmax attention"
    return f"{shape.architecture}, {layers}, {shape.heads} heads of {shape.head_size}, hidden size {shape.hidden}"


def _checkpoint_gates(section: str, shape: Shape, pairs: list[GatePair]) -> Iterator[Finding]:
    yield from _declaration(section, shape, pairs)
    if not pairs:
        if shape.declared is None:
            yield Finding(section, "gate tensors", "none")
        else:
            remedy = f"complete the checkpoint, or drop {names.DECLARATION} from its config.json"
            yield Finding(section, "gate tensors", "none, but config.json declares gates", "wrong", remedy)
        return
    yield from _coverage(section, "gate tensors", shape, pairs)


def _declaration(section: str, shape: Shape, pairs: list[GatePair]) -> Iterator[Finding]:
    name = names.DECLARATION
    declared = shape.declared
    if declared is None and not pairs:
        yield Finding(section, name, "not declared: no gated checkpoint")
        return
    kinds = {gatefile.granularity(pair, shape, {})[0] for pair in pairs} - {None}
    found = kinds.pop() if len(kinds) == 1 else None
    example = f'"{name}": {{"granularity": "{found or "head"}"}}'
    if declared is None:
        remedy = f"add {example} to config.json, or set patches.gate.source: checkpoint"
        yield Finding(section, name, "not declared, but gate tensors are there; vLLM refuses them", "wrong", remedy)
    elif not isinstance(declared, dict) or declared.get("granularity", "auto") not in ("auto", "head", "element"):
        yield Finding(section, name, f"{json.dumps(declared)} is no declaration", "wrong", f"write {example}")
    elif found and declared.get("granularity", "auto") not in ("auto", found):
        value = f"declares {declared['granularity']}-wise gates, the tensors are {found}-wise"
        yield Finding(section, name, value, "wrong", f"write {example}")
    else:
        yield Finding(section, name, json.dumps(declared))


def _coverage(section: str, name: str, shape: Shape, pairs: list[GatePair]) -> Iterator[Finding]:
    """Say whether gates fit the model: names, shapes, and one for every attention layer."""
    expected = set(shape.attention_layers or ())
    layers = {pair.layer for pair in pairs}
    wrong = gatefile.problems(pairs, shape, {})
    if expected - layers:
        wrong.append(f"no gate for layer {', '.join(map(str, sorted(expected - layers)))}")
    unknown = sorted(pair.module for pair in pairs if expected and pair.layer not in expected)
    if unknown:
        wrong.append(f"gates for what the model has no attention layer for: {', '.join(unknown)}")
    weights = sorted({" x ".join(map(str, pair.weight.shape)) for pair in pairs if pair.weight is not None})
    biases = sum(pair.bias is not None for pair in pairs)
    yield Finding(section, name, f"{len(pairs)} for {shape.layers} layers, {' and '.join(weights)}, {biases} with bias")
    for line in wrong:
        yield Finding(section, name, line, "wrong", "`sluice gates inspect` lists them; the server would not start")


def _plan(section: str, shape: Shape, pairs: list[GatePair], settings: config.Config) -> Iterator[Finding]:
    """Say what the settings would build into this model."""
    if not settings.enabled:
        yield Finding(section, "would install", "nothing: enabled is false")
        return
    layers = len(shape.attention_layers or ())
    gate = settings.patches.gate
    gated = False
    if gate.source.endswith(".safetensors"):
        try:
            sidecar = gatefile.gates(gatefile.read_header(Path(gate.source)).tensors.values())
            yield from _coverage(section, "sidecar gates", shape, sidecar)
            gated = bool(sidecar)
        except Problem as error:
            yield Finding(section, "sidecar gates", str(error), "wrong", "correct patches.gate.source")
    elif gate.source == "checkpoint" and not pairs:
        remedy = "set patches.gate.source: auto, or name a sidecar file"
        yield Finding(section, "patch gate", "the checkpoint has no gates, but source is checkpoint", "wrong", remedy)
    elif gate.source == "none" and pairs:
        remedy = "set patches.gate.source: auto"
        yield Finding(section, "patch gate", "source is none, so vLLM refuses the gate tensors", "wrong", remedy)
    else:
        gated = bool(pairs) and (gate.source == "checkpoint" or shape.declared is not None)
    origin = gate.source if gate.source.endswith(".safetensors") else "the checkpoint"
    state = "on" if gate.enabled else "off until switched on"
    yield Finding(section, "patch gate", f"{layers} layers from {origin}, {state}" if gated else "not installed")
    probes = settings.probes
    residual = f"residual ({shape.layers} layers)" if probes.residual.install else ""
    attention = f"attention ({layers} layers)" if probes.attention.install else ""
    gates = f"gate ({layers} layers)" if probes.gate.install and gated else ""
    quantization = f"quantization ({shape.layers} layers)" if probes.quantization.install else ""
    yield Finding(section, "probes", ", ".join(filter(None, (residual, attention, gates, quantization))) or "none")
    for kind in probes.enabled_in_vain:
        remedy = f"set probes.{kind}.install: true"
        yield Finding(section, f"probe {kind}", "enabled is true, but it is not built into the model", "note", remedy)


def _report(findings: list[Finding], wrong: int) -> list[str]:
    lines: list[str] = []
    section = ""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.section != section:
            lines += ["", finding.section.capitalize() if " " not in finding.section else finding.section]
            section = finding.section
        value = finding.value.replace("\n", "\n" + " " * (width + 6))
        lines.append(f"  {_MARKS[finding.verdict]} {finding.name.ljust(width)}  {value}")
        if finding.remedy:
            lines.append(f"    {' ' * width}  -> {finding.remedy}")
    verdict = "nothing is wrong" if not wrong else f"{wrong} thing{'' if wrong == 1 else 's'} wrong, marked !"
    return [*lines[1:], "", verdict]
