"""What a patch kind and an installed patch are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import nn

from vllm_sluice.compat import Load
from vllm_sluice.config import runtime_values


class PatchError(RuntimeError):
    """A requested patch cannot be installed exactly; the server must not start.

    The message names the patch, every layer concerned with what was expected and what was found, and what to do.
    """

    def __init__(self, patch: str, problems: Iterable[str], remedy: str) -> None:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"sluice: the patch {patch!r} cannot be installed:\n{lines}\n{remedy}")


@dataclass(frozen=True)
class Report:
    """What an installed patch did to the model.

    Attributes
    ----------
    patch
        Name of the patch kind.
    layers
        Decoder layers patched on this rank.
    detail
        One line for the log.
    """

    patch: str
    layers: tuple[int, ...]
    detail: str


class InstalledPatch(ABC):
    """A patch that is built into a model. Setting it changes values in device tensors and never recompiles.

    Parameters
    ----------
    acts
        Whether the patch acts on each row of a batch, bool, [max_tokens], on the device; shared by all layers.
    settings
        The kind's settings; its run-time keys are the patch's parameters.
    report
        What was done to the model.
    """

    name: ClassVar[str]

    def __init__(self, acts: torch.Tensor, settings: BaseModel, report: Report) -> None:
        self._acts = acts
        self._chosen = 0
        self.report = report
        self.runtime: dict[str, Any] = {}
        self.set(runtime_values(settings))

    @property
    def enabled(self) -> bool:
        """Whether the patch acts on requests that do not say otherwise."""
        return bool(self.runtime["enabled"])

    @property
    def parameters(self) -> dict[str, float]:
        """The kind's run-time parameters by name, in the order of its settings."""
        return {name: float(value) for name, value in self.runtime.items() if name != "enabled"}

    def set(self, values: Mapping[str, Any]) -> None:
        """Take run-time values, `enabled` and the kind's parameters, from the next forward pass on."""
        self.runtime |= values
        self._acts.fill_(self.enabled)
        self.write_parameters()

    @abstractmethod
    def write_parameters(self) -> None:
        """Write the parameters in `runtime` to the device; without a host synchronisation."""

    def choose(self, rows: torch.Tensor | None) -> None:
        """Say for each row of the coming pass whether the patch acts, bool, [tokens]; None: as `enabled` says."""
        if self._chosen:
            self._acts[: self._chosen].fill_(self.enabled)
        self._chosen = 0 if rows is None else len(rows)
        if rows is not None:
            self._acts[: len(rows)].copy_(rows, non_blocking=True)


class PatchKind(ABC):
    """One way to change a model. Used for one load: `begin`, then `divert` for every weight, then `plan`."""

    name: ClassVar[str]

    @abstractmethod
    def begin(self, load: Load) -> None:
        """Get ready for a load: read what is needed before the model is built.

        Raises
        ------
        PatchError
            If the patch is asked for and can be seen to be impossible.
        """

    @abstractmethod
    def divert(self, name: str, tensor: torch.Tensor) -> bool:
        """Take a checkpoint tensor that belongs to the patch; tell whether it was taken."""

    @abstractmethod
    def plan(self, model: nn.Module, load: Load) -> Any | None:
        """Check every layer and return what to install, or None if nothing is asked for. Changes nothing.

        Raises
        ------
        PatchError
            With every problem found.
        """

    @abstractmethod
    def install(self, plan: Any) -> InstalledPatch:
        """Carry out a plan; cannot fail."""
