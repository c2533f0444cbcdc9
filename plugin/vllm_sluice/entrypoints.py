"""What vLLM's entry points call. `register` runs in every process of a server, and may run more than once."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from vllm_sluice import __version__, compat, config
from vllm_sluice.compat import Load


class _Loading:
    """The load of a model under way in this process."""

    installer: Any = None


def register() -> None:
    """Install Sluice's hooks in vLLM (entry-point group `vllm.general_plugins`).

    Raises
    ------
    ConfigError
        If the configuration is unusable: the server must not start with settings that nobody asked for.
    """
    settings = config.load().config
    if not settings.enabled:
        return
    from vllm_sluice.telemetry import rundir

    rundir.announce(settings.telemetry)
    compat.on_compile_hash(fingerprint)
    compat.on_load_model(_before_load, _after_load)
    compat.on_checkpoint_weights(_divert)
    compat.on_forward()
    from vllm_sluice import rank

    compat.add_worker_method("sluice_rpc", rank.worker_method)


def endpoint() -> Any:
    """Return the endpoint plugin (entry-point group `vllm.endpoint_plugins`)."""
    from vllm_sluice.server import SluiceEndpoint

    return SluiceEndpoint()


def fingerprint() -> str:
    """Hash everything that shapes the compiled graph: version, structural settings, sidecar shapes.

    Returns
    -------
    str
        16 hexadecimal digits; empty if nothing is installed, so that the stock artifacts stay valid.
    """
    from vllm_sluice.checkpoints.gates import sidecar_shapes

    settings = config.load().config
    probes = settings.probes
    source = settings.patches.gate.source
    nothing = source == "none" and not (probes.residual.install or probes.attention.install or probes.gate.install)
    if not settings.enabled or nothing:
        return ""
    shapes = sidecar_shapes(_path(source)) if source.endswith(".safetensors") else {}
    parts = [__version__, settings.structural_fingerprint(), shapes]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _path(name: str) -> Any:
    from pathlib import Path

    return Path(name)


def _before_load(load: Load) -> None:
    from vllm_sluice.patches.installer import Installer

    settings = config.load().config
    _Loading.installer = Installer(settings) if settings.enabled else None
    if _Loading.installer is not None:
        _Loading.installer.begin(load)


def _divert(name: str, tensor: torch.Tensor) -> bool:
    return _Loading.installer is not None and _Loading.installer.divert(name, tensor)


def _after_load(model: nn.Module, load: Load) -> None:
    from vllm_sluice.probes.installer import ProbeSet
    from vllm_sluice.rank import Rank, rank_info
    from vllm_sluice.telemetry import rundir

    settings = config.load().config
    installer, _Loading.installer = _Loading.installer, None
    if installer is None:
        return
    patches = {patch.name: patch for patch in installer.install(model, load)}
    probes = ProbeSet(settings, model, load, patches)
    if not (patches or probes.installed or probes.unavailable):
        return
    folder = rundir.announce(settings.telemetry)
    rank = Rank(settings, load, patches, probes, folder, rank_info(load, __version__, fingerprint()))
    setattr(model, compat.RUNTIME_ATTRIBUTE, rank)
