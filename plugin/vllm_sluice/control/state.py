"""The run-time state: the keys that may change while the server runs, their values and where each came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_sluice import config
from vllm_sluice.config import Config, Loaded

SECTIONS = ("patches", "probes")
_ONE = {"patches": "patch", "probes": "probe"}
Origin = Literal["default", "environment", "file", "admin"]
Values = dict[str, Any]
"""Dotted key, such as `patches.gate.enabled`, to value."""


class Refused(ValueError):
    """A change that cannot be made; the message says what was asked, why not, and what to do."""


@dataclass(frozen=True)
class Installed:
    """The patch and probe kinds that every rank has built in."""

    patches: frozenset[str]
    probes: frozenset[str]

    def kinds(self, section: str) -> frozenset[str]:
        """Return the kinds of `patches` or `probes`."""
        return self.patches if section == "patches" else self.probes


def with_admin(loaded: Loaded, admin: Mapping[str, Any]) -> Loaded:
    """Put what the admin set on top of file, environment and defaults.

    Raises
    ------
    Refused
        If a value does not fit its key.
    """
    try:
        return config.with_values(loaded, admin, "admin")
    except config.ConfigError as error:
        raise Refused(str(error).replace(" (from admin)", "")) from None


def values_of(settings: Config, installed: Installed) -> Values:
    """Return the run-time values of everything that is installed."""
    found: Values = {}
    for section in SECTIONS:
        kinds = getattr(settings, section)
        for kind in type(kinds).model_fields:
            if kind in installed.kinds(section):
                for key, value in config.runtime_values(getattr(kinds, kind)).items():
                    found[f"{section}.{kind}.{key}"] = value
    return found


def origin(loaded: Loaded, key: str) -> Origin:
    """Say where the value of a key comes from."""
    source = loaded.origins.get(key)
    if source is None:
        return "default"
    if source == "admin":
        return "admin"
    return "environment" if source.startswith("SLUICE_") else "file"


def edits(section: str, kind: str, body: Mapping[str, Any], installed: Installed) -> Values:
    """Turn the body of a change into dotted keys.

    Raises
    ------
    Refused
        If a key is unknown or cannot change while the server runs.
    LookupError
        If the kind is unknown or not installed.
    """
    known = type(getattr(Config(), section)).model_fields
    if kind not in known:
        raise LookupError(f"there is no {_ONE[section]} {kind!r}; there are: {', '.join(known)}")
    if kind not in installed.kinds(section):
        have = ", ".join(sorted(installed.kinds(section))) or "none"
        raise LookupError(
            f"the {_ONE[section]} {kind!r} is not installed in this server (installed: {have}); "
            "installing it takes a setting and a restart"
        )
    model = type(getattr(getattr(Config(), section), kind))
    allowed = config.runtime_keys(model)
    for key in body:
        if key not in model.model_fields:
            raise Refused(f"{section}.{kind}.{key}: unknown key; at run time {', '.join(allowed)} may change")
        if key not in allowed:
            raise Refused(
                f"{section}.{kind}.{key} shapes the compiled model: set it in the configuration and restart the "
                f"server; at run time {', '.join(allowed)} may change"
            )
    return {f"{section}.{kind}.{key}": value for key, value in body.items()}


def payload(values: Mapping[str, Any], generation: int) -> dict[str, Any]:
    """Turn values into what a rank's `apply` takes."""
    tree: dict[str, Any] = {"generation": generation, "patches": {}, "probes": {}}
    for key, value in values.items():
        section, kind, name = key.split(".")
        tree[section].setdefault(kind, {})[name] = value
    return tree


def of_kinds(values: Mapping[str, Any], changed: Iterable[str]) -> Values:
    """Return the values of the patches and probes that a change touches; the others need not be written again."""
    kinds = {key.rpartition(".")[0] for key in changed}
    return {key: value for key, value in values.items() if key.rpartition(".")[0] in kinds}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `{key: {"from": value, "to": value}}` of the keys whose values differ."""
    return {
        key: {"from": before.get(key), "to": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def probe_enabled_by(key: str) -> str | None:
    """Return the probe that a key switches on and off, if it does that."""
    section, kind, name = key.split(".")
    return kind if section == "probes" and name == "enabled" else None


def touches_output(changed: Iterable[str]) -> bool:
    """Tell whether a change alters what the model computes, so that cached keys and values become stale."""
    return any(key.startswith("patches.") for key in changed)


def restart_needed(started: Config, now: Config) -> list[str]:
    """Return the keys that differ from those the server was started with and cannot change while it runs."""
    before, after = _fixed(started), _fixed(now)
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def schema() -> dict[str, Any]:
    """Return the JSON schema of the run-time keys: section, kind, schema."""
    found: dict[str, Any] = {}
    for section in SECTIONS:
        kinds = getattr(Config(), section)
        found[section] = {}
        for kind in type(kinds).model_fields:
            model = type(getattr(kinds, kind))
            allowed = config.runtime_keys(model)
            properties = {key: _nullable(value) for key, value in model.model_json_schema()["properties"].items()
                          if key in allowed}  # fmt: skip
            found[section][kind] = {"type": "object", "properties": properties, "additionalProperties": False}
    return found


def _nullable(schema_of_key: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in schema_of_key.items() if key != "runtime"}
    about = {key: kept.pop(key) for key in ("title", "description", "default") if key in kept}
    return {**about, "anyOf": [kept, {"type": "null", "description": "drop the admin's value"}]}


def _fixed(settings: Config) -> Values:
    everything = dict(_leaves(settings.model_dump(mode="json"), ""))
    all_kinds = Installed(frozenset(type(settings.patches).model_fields), frozenset(type(settings.probes).model_fields))
    return {key: value for key, value in everything.items() if key not in values_of(settings, all_kinds)}


def _leaves(tree: Mapping[str, Any], above: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
