"""What vLLM's entry points call. `register` runs in every process of a server, and may run more than once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_sluice import __version__, compat, config
from vllm_sluice.compat import Load

if TYPE_CHECKING:
    from vllm_sluice.control.per_request import RequestCheck


class _Loading:
    """The load of a model under way in this process, and what the last one installed."""

    installer: Any = None
    installed: Any = None


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
    try:
        _hook()
    except Exception:
        if settings.patches.gate.source not in ("auto", "none") or settings.control.chooses_rows:
            raise
        compat.logger.exception(
            "sluice: off, because it does not know this vLLM (%s; tested: %s)",
            compat.vllm_version(),
            compat.TESTED_VLLM,
        )


def _hook() -> None:
    from vllm_sluice import rank
    from vllm_sluice.control import per_request
    from vllm_sluice.telemetry import request_summary

    compat.on_compile_hash(fingerprint)
    compat.on_load_model(_before_load, _after_load)
    compat.on_checkpoint_weights(_divert)
    compat.on_forward()
    compat.on_sample()
    compat.on_request(lambda: _request_check().admit)
    compat.on_answer(per_request.ask_for_statistics, request_summary.summarise)
    compat.add_worker_method("sluice_rpc", rank.worker_method)


def endpoint() -> Any:
    """Return the endpoint plugin (entry-point group `vllm.endpoint_plugins`)."""
    from vllm_sluice.server import SluiceEndpoint

    if config.load().config.enabled:
        compat.on_openai_request(_request_check().validate_openai)
    return SluiceEndpoint()


def _request_check() -> RequestCheck:
    from vllm_sluice.control.journal import Journal
    from vllm_sluice.control.per_request import InstalledOnRanks, RequestCheck
    from vllm_sluice.patches.installer import patch_kinds
    from vllm_sluice.telemetry import rundir
    from vllm_sluice.telemetry.collector import SnapshotCollector

    settings = config.load().config
    folder = rundir.announce(settings.telemetry)
    installed = InstalledOnRanks(SnapshotCollector(folder))
    kinds = [kind.name for kind in patch_kinds(settings)]
    guarded = settings.control.enabled and settings.control.guard.enabled
    trial = Journal(folder, rundir.server()).trial if guarded else None
    return RequestCheck(settings.control.per_request, kinds, installed, trial)


def fingerprint() -> str:
    """Hash everything that shapes the compiled graph: version, structural settings, sidecar shapes, what is installed.

    vLLM asks at the first compilation, after the load. What is installed may differ from what the settings ask for,
    because a probe that cannot be installed is left out.

    Returns
    -------
    str
        16 hexadecimal digits; empty if nothing is installed, so that the stock artifacts stay valid.
    """
    from vllm_sluice.checkpoints.gates import sidecar_shapes

    settings = config.load().config
    source = settings.patches.gate.source
    if not settings.enabled or (source == "none" and not settings.probes.any_installed):
        return ""
    shapes = sidecar_shapes(Path(source)) if source.endswith(".safetensors") else {}
    parts = [__version__, settings.structural_fingerprint(), shapes, _Loading.installed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _before_load(load: Load) -> None:
    from vllm_sluice.patches.installer import Installer

    settings = config.load().config
    _Loading.installed = None
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
    _Loading.installed = [
        [[patch.name, patch.report.layers, patch.report.detail] for patch in patches.values()],
        [[probe.kind, probe.layers] for probe in probes.installed],
    ]
    if not compat.routes_are_allowed("sluice"):
        compat.logger.warning(
            "sluice: measuring, but VLLM_PLUGINS does not name sluice, so /metrics will not show it; "
            "start with `sluice serve`, or see `sluice doctor`"
        )
    folder = rundir.announce(settings.telemetry)
    try:
        rank = Rank(settings, load, patches, probes, folder, rank_info(load, __version__, fingerprint()))
    except OSError:  # no snapshot, no metrics; the model with its patches is right all the same
        compat.logger.exception("sluice: no metrics, because the snapshot folder %s cannot be used", folder)
        return
    setattr(model, compat.RUNTIME_ATTRIBUTE, rank)
