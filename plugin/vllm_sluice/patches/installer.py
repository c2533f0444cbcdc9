"""Installs what the configuration asks for: begin, divert weights, plan and check everything, then install."""

from __future__ import annotations

import torch
from torch import nn

from vllm_sluice import compat
from vllm_sluice.compat import Load
from vllm_sluice.config import Config
from vllm_sluice.patches.base import InstalledPatch, PatchError, PatchKind
from vllm_sluice.patches.gate import GateKind

_PER_REQUEST_REMEDY = (
    "Change that, or set control.per_request and control.guard.enabled to false; patches are then switched for all "
    "requests at once."
)


def patch_kinds(config: Config) -> list[PatchKind]:
    """Return the patch kinds in the order in which they are installed. The registry: one line a kind."""
    return [GateKind(config.patches.gate)]


class Installer:
    """Carries one load of a model through all patch kinds."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._kinds = patch_kinds(config)

    def begin(self, load: Load) -> None:
        """Prepare all kinds before the model is built."""
        for kind in self._kinds:
            kind.begin(load)

    def divert(self, name: str, tensor: torch.Tensor) -> bool:
        """Offer a checkpoint tensor to the kinds."""
        return any(kind.divert(name, tensor) for kind in self._kinds)

    def install(self, model: nn.Module, load: Load) -> list[InstalledPatch]:
        """Plan everything, and only when every plan holds install it.

        Raises
        ------
        PatchError
            If any plan fails, or vLLM is a version that Sluice was not tested with.
        """
        plans = [(kind, plan) for kind in self._kinds if (plan := kind.plan(model, load)) is not None]
        version = compat.vllm_version()
        if plans and not compat.is_tested_version(version) and not self._config.allow_untested_vllm:
            raise PatchError(
                plans[0][0].name,
                [f"vLLM {version} is installed; Sluice patches models of vLLM {compat.TESTED_VLLM}"],
                "Install that vLLM, or set allow_untested_vllm: true and check the outputs yourself.",
            )
        if plans and self._config.control.chooses_rows and (problem := load.rows_problem):
            raise PatchError(plans[0][0].name, [f"requests are to choose patches, but {problem}"], _PER_REQUEST_REMEDY)
        installed = [kind.install(plan) for kind, plan in plans]
        for patch in installed:
            compat.logger.info("sluice: patch %s installed: %s", patch.name, patch.report.detail)
        return installed
