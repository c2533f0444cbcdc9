"""Which patches act on which rows of a forward pass, where requests chose for themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from vllm_sluice.compat import Batch
from vllm_sluice.patches.base import InstalledPatch


class Choices:
    """Carries the requests' choices to the installed patches, pass by pass.

    Parameters
    ----------
    patches
        Installed patches by the request argument that chooses them.
    """

    def __init__(self, patches: Mapping[str, InstalledPatch]) -> None:
        self._patches = patches

    @contextlib.contextmanager
    def acting(self, batch: Batch, arguments: list[Mapping[str, Any]]) -> Iterator[None]:
        """Let patches act on the rows of requests that chose so in their extra arguments.

        The device is neither waited for nor read.
        """
        chosen = self._read(arguments)
        try:
            for key, acts in chosen.items():
                rows = np.repeat(np.array(acts, dtype=np.bool_), np.diff(batch.starts))
                self._patches[key].choose(torch.from_numpy(rows))
            yield
        finally:
            for key in chosen:
                self._patches[key].choose(None)

    def _read(self, arguments: list[Mapping[str, Any]]) -> dict[str, list[bool]]:
        """Say for each patch that any request names whether it acts on each request."""
        return {
            key: [bool(a.get(key, patch.enabled)) for a in arguments]
            for key, patch in self._patches.items()
            if any(key in a for a in arguments)
        }
