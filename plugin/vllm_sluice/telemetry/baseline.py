"""The baseline: a calibration file that says how large activations are on traffic known to be good.

One section for each patch state, since a switched patch changes the activations; see docs/quantization.md.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_sluice.config import Site
from vllm_sluice.telemetry.catalogue import layer_label
from vllm_sluice.telemetry.snapshot import Series

_STATE = re.compile(r"[a-z0-9_]+=[01](,[a-z0-9_]+=[01])*")
_LAYER = re.compile(r"\d{3,}")
_PER_LAYER = ("activation_abs_max", "activation_max_to_median_ratio", "attention_sink_mass")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

logger = logging.getLogger("vllm.sluice")


class BaselineError(ValueError):
    """A baseline cannot be used; the message names the file, the key and what was found."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Layer(_Strict):
    """What was recorded of one decoder layer; None, or a site left out, is what was not measured.

    Attributes
    ----------
    activation_abs_max, activation_max_to_median_ratio
        Largest values of the windows, see the metrics of these names.
    attention_sink_mass
        Mean over the windows.
    sites
        Largest |x| by site of the `quantization` probe: the end of the static INT8 and FP8 range.
    """

    activation_abs_max: Positive | None = None
    activation_max_to_median_ratio: Positive | None = None
    attention_sink_mass: Share | None = None
    sites: Mapping[Site, Positive] = {}


class Section(_Strict):
    """What was recorded under one patch state.

    Attributes
    ----------
    recorded
        When, UTC, ISO 8601.
    source
        Where the traffic came from.
    tokens
        Tokens seen.
    sluice_version, vllm_version
        What measured.
    parameters
        Run-time parameters of the patches that act, such as `gate.temperature`; those that are not named may have any
        value.
    layers
        By layer label, such as `007`.
    """

    recorded: str
    source: str
    tokens: Annotated[int, Field(ge=1)]
    sluice_version: str
    vllm_version: str
    parameters: Mapping[str, float] = {}
    layers: Annotated[Mapping[str, Layer], Field(min_length=1)]

    @field_validator("layers")
    @classmethod
    def _labels(cls, layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
        for label in layers:
            if _LAYER.fullmatch(label) is None or label != layer_label(int(label)):
                raise ValueError(f"a layer is named by three digits, such as 007; found {label!r}")
        return layers

    @property
    def digest(self) -> str:
        """Short hash of all that is recorded."""
        without = None if self.parameters else {"parameters"}  # files that name none keep their hash
        return hashlib.sha256(self.model_dump_json(exclude=without).encode()).hexdigest()[:12]


class Baseline(_Strict):
    """A whole file: sections by patch state, such as `gate=1`."""

    format: Literal["sluice-baseline/1"] = "sluice-baseline/1"
    model: str
    sections: Annotated[Mapping[str, Section], Field(min_length=1)]

    @field_validator("sections")
    @classmethod
    def _states(cls, sections: Mapping[str, Section]) -> Mapping[str, Section]:
        seen: dict[frozenset[str], str] = {}
        for state in sections:
            if _STATE.fullmatch(state) is None:
                raise ValueError(f"a section is named by its patch state, such as gate=1; found {state!r}")
            if other := seen.get(acting(state)):
                raise ValueError(f"{other!r} and {state!r} are the same patch state")
            seen[acting(state)] = state
        return sections

    def find(self, patches: Mapping[str, bool]) -> str | None:
        """Return the section's name for a patch state; a patch that is not named does not act."""
        wanted = frozenset(name for name, acts in patches.items() if acts)
        return next((state for state in self.sections if acting(state) == wanted), None)

    def with_section(self, state: str, section: Section) -> Baseline:
        """Return a baseline with one section more, in place of an older one of the same patch state."""
        kept = {name: old for name, old in self.sections.items() if acting(name) != acting(state)}
        return Baseline(model=self.model, sections={**kept, state: section})


def state_text(patches: Mapping[str, bool]) -> str:
    """Write a patch state, such as `gate=1`; patches that are not installed do not act."""
    return ",".join(f"{name}={int(acts)}" for name, acts in sorted(patches.items()))


def differing_parameters(recorded: Mapping[str, float], current: Mapping[str, float]) -> str:
    """Say which parameters had another value when a section was recorded; empty if none."""
    return ", ".join(
        f"{name} {value:g} (now {current[name]:g})" if name in current else f"{name} {value:g} (not known here)"
        for name, value in sorted(recorded.items())
        if current.get(name) != value
    )


def acting(state: str) -> frozenset[str]:
    """Return the patches that act in a state such as `gate=1,kv_bias=0`."""
    return frozenset(part[:-2] for part in state.split(",") if part.endswith("=1"))


def read(path: Path) -> Baseline:
    """Read a calibration file.

    Raises
    ------
    BaselineError
        If it cannot be read or is not a baseline of this format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BaselineError(f"cannot read the baseline {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BaselineError(f"the baseline {path} is no text; `sluice baseline record` writes JSON") from None
    try:
        return Baseline.model_validate_json(text)
    except ValidationError as error:
        raise BaselineError(f"the baseline {path} cannot be used:\n{_explain(error)}") from None


def check_model(baseline: Baseline, model: str, count: int) -> None:
    """Compare a baseline with the model that is served.

    Parameters
    ----------
    model
        Its name; only what follows the last slash is compared, because folders differ between machines.
    count
        Decoder layers of the whole model; 0 if that is not known.

    Raises
    ------
    BaselineError
        If the baseline is another model's.
    """
    if _base_name(baseline.model) != _base_name(model):
        raise BaselineError(f"it was recorded from the model {baseline.model}, and {model} is served")
    for state, section in baseline.sections.items():
        recorded = {int(label) for label in section.layers}
        if count and max(recorded) >= count:
            raise BaselineError(f"its section {state} has a layer {max(recorded)}, and the model has {count} layers")


def _base_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "the file"
        found = item.get("input")
        shown = "" if isinstance(found, dict) or item["type"] in ("missing", "json_invalid") else f"; found {found!r}"
        lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{shown}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ in a rank
class BaselineInForce:
    """The configured baseline in one rank: what it exports, and the section of the patch state now in force.

    A baseline that cannot be used is logged and exported as not good; the server serves.

    Parameters
    ----------
    path
        Setting `telemetry.baseline`; None: nothing is exported.
    model, count
        See `check_model`.
    layers
        Decoder layers that the probes of this rank see; those that were not recorded are compared with nothing.
    """

    def __init__(self, path: str | None, model: str, layers: Iterable[int], count: int) -> None:
        self._configured = path is not None
        self._baseline: Baseline | None = None
        self._missing: str | None = None
        self.state: str | None = None
        if path is None:
            return
        try:
            found = read(Path(path))
            check_model(found, model, count)
            self._baseline = found
            for state, section in found.sections.items():
                if missing := sorted(set(layers) - {int(label) for label in section.layers}):
                    names = ", ".join(map(str, missing))
                    logger.warning("sluice: the section %s of the baseline lacks the layers %s", state, names)
        except BaselineError as error:
            logger.error("sluice: no baseline, the server goes on: %s: %s", path, error)

    @property
    def section(self) -> Section | None:
        """What was recorded for the patch state now in force."""
        state = self.state
        return self._baseline.sections[state] if self._baseline and state else None

    def follow(self, patches: Mapping[str, bool], parameters: Mapping[str, float]) -> None:
        """Take the section of a patch state, if it was recorded with the same parameters, such as `gate.floor`."""
        if self._baseline is None:
            return
        state, missing = self._baseline.find(patches), None
        if state is None:
            missing = f"no section for {state_text(patches)}; it has: {', '.join(self._baseline.sections)}"
        elif other := differing_parameters(self._baseline.sections[state].parameters, parameters):
            missing = f"no section for the parameters in force; {state} was recorded with {other}"
        if missing is not None and missing != self._missing:
            logger.warning("sluice: the baseline has %s; nothing is compared with it", missing)
        self._missing = missing
        self.state = state if missing is None else None  # in one step: snapshots are written meanwhile

    def _labels(self) -> list[str]:
        sections = self._baseline.sections.values() if self._baseline else ()
        return sorted({label for section in sections for label in section.layers})

    def series(self) -> list[Series]:
        """Name the series that `values` fills."""
        sections = self._baseline.sections if self._baseline else {}
        return [
            Series("sluice_baseline_good"),
            *(
                Series("sluice_baseline_info", (("baseline", section.digest), ("patches", state)))
                for state, section in sections.items()
            ),
            *(
                Series(f"sluice_baseline_{name}", (("layer", label),))
                for label in self._labels() for name in _PER_LAYER
            ),
        ]  # fmt: skip

    def values(self) -> np.ndarray:
        """Return float64, [series]; NaN for what is not in force."""
        sections = self._baseline.sections if self._baseline else {}
        good = float(self._baseline is not None) if self._configured else None
        section = self.section
        in_force = [1.0 if recorded is section else None for recorded in sections.values()]
        layers = section.layers if section else {}
        values = [getattr(layers.get(label), name, None) for label in self._labels() for name in _PER_LAYER]
        return np.array([good, *in_force, *values], dtype=np.float64)  # None becomes NaN


# ------------------------------------------------------------------------------------------------ recording
@dataclass
class _Seen:
    largest: dict[str, float] = field(default_factory=dict)
    sites: dict[Site, float] = field(default_factory=dict)
    sinks: list[float] = field(default_factory=list)


class Recorder:
    """Gathers a section from exported samples, scrape by scrape: maxima of maxima, and the mean of sink masses."""

    def __init__(self) -> None:
        self._layers: dict[str, _Seen] = {}

    def add(self, samples: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
        """Add one scrape: metric, labels, value."""
        scrape = list(samples)
        dtype_max = max((value for metric, _, value in scrape if metric == "sluice_serving_dtype_max"), default=None)
        for metric, labels, value in scrape:
            if "layer" not in labels:
                continue
            name = metric.removeprefix("sluice_")
            seen = self._layers.setdefault(labels["layer"], _Seen()) if name in _WANTED else None
            if seen is None:
                continue
            if name == "attention_sink_mass":
                seen.sinks.append(min(value, 1.0))
            elif not value > 0:  # nothing but zeros was seen: no range follows from that
                continue
            elif name != "quantization_headroom_ratio":
                seen.largest[name] = max(value, seen.largest.get(name, 0.0))
            elif labels["format"] == "serving" and dtype_max is not None:
                site = cast(Site, labels["site"])
                # The peak is a float32; two divisions in float64 may miss it by a hair, and it would seem to clip.
                seen.sites[site] = max(float(np.float32(dtype_max / value)), seen.sites.get(site, 0.0))

    @property
    def empty(self) -> bool:
        """Whether no scrape has shown any activation."""
        return not any(seen.largest or seen.sites for seen in self._layers.values())

    def section(self, **about: Any) -> Section:
        """Return the section; `about` is what `Section` holds besides the layers."""
        layers = {
            label: Layer(
                **seen.largest,
                attention_sink_mass=sum(seen.sinks) / len(seen.sinks) if seen.sinks else None,
                sites=seen.sites,
            )
            for label, seen in sorted(self._layers.items())
        }
        return Section(layers=layers, **about)


_WANTED = (*_PER_LAYER, "quantization_headroom_ratio")
