"""What a patch kind and an installed patch are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_sluice.compat import Load


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
    """A patch that is built into a model. Switching it changes a tensor's value and never recompiles."""

    name: ClassVar[str]

    def __init__(self, enabled: torch.Tensor, report: Report) -> None:
        self._flag = enabled
        self._enabled = bool(enabled.item())
        self.report = report

    @property
    def enabled(self) -> bool:
        """Whether the patch acts."""
        return self._enabled

    def switch(self, enabled: bool) -> None:
        """Make the patch act or not, from the next forward pass on."""
        self._flag.fill_(enabled)
        self._enabled = enabled


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
