"""`VLLM_PLUGINS`: names Sluice without dropping what vLLM would load anyway.

vLLM filters every plugin group by entry-point name (vllm/plugins/__init__.py). Unset, the variable loads all groups
but the endpoint plugins, which have to be named; set, it drops whatever it does not name.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

VARIABLE = "VLLM_PLUGINS"
PLUGIN = "sluice"
_ENDPOINT_GROUP = "vllm.endpoint_plugins"
_DEFAULT_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.io_processor_plugins",
)


@dataclass(frozen=True)
class AllowList:
    """A value for `VLLM_PLUGINS`.

    Attributes
    ----------
    names
        Entry-point names, in the order in which they are listed.
    routes_opened
        Other plugins that this list allows to add HTTP routes while without it they could not: they have the same
        name in a group that loads by default.
    """

    names: tuple[str, ...]
    routes_opened: tuple[str, ...] = ()

    @property
    def value(self) -> str:
        """Text of the variable."""
        return ",".join(self.names)


def installed_plugins() -> dict[str, list[str]]:
    """Return the entry-point names of every vLLM plugin group."""
    return {
        group: sorted({entry.name for entry in importlib.metadata.entry_points(group=group)})
        for group in (*_DEFAULT_GROUPS, _ENDPOINT_GROUP)
    }


def listed(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the names in `VLLM_PLUGINS`, or None if it is not set."""
    text = environ.get(VARIABLE)
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def with_sluice(environ: Mapping[str, str], plugins: Mapping[str, Iterable[str]]) -> AllowList:
    """Return the list that loads Sluice and everything that would be loaded without it.

    Parameters
    ----------
    environ
        Environment that may hold `VLLM_PLUGINS`.
    plugins
        Names by group, as `installed_plugins` returns them.
    """
    names = listed(environ)
    if names is not None:
        return AllowList(names if PLUGIN in names else (*names, PLUGIN))
    defaults = sorted({name for group in _DEFAULT_GROUPS for name in plugins.get(group, ())} - {PLUGIN})
    opened = tuple(name for name in defaults if name in plugins.get(_ENDPOINT_GROUP, ()))
    return AllowList((*defaults, PLUGIN), opened)
