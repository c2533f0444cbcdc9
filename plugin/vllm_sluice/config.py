"""The whole configuration: one strict tree, read from one YAML file and from `SLUICE_*` variables.

Nothing else in Sluice parses settings. Precedence: file over environment over default, so that an edited file
always counts. Keys are either structural
(they change what is built into the model; a change needs a restart and a new compile-cache key) or run-time (they
change a value on the device); `RUNTIME` marks the latter.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CONFIG_VARIABLE = "SLUICE_CONFIG"
RUN_DIR_VARIABLE = "SLUICE_RUN_DIR"
SERVER_VARIABLE = "SLUICE_SERVER_IDENTITY"
_PREFIX = "SLUICE_"
_NESTING = "__"
TOKEN_VARIABLE = "SLUICE_ADMIN_TOKEN"
_NOT_SETTINGS = frozenset({CONFIG_VARIABLE, RUN_DIR_VARIABLE, SERVER_VARIABLE, TOKEN_VARIABLE})

_KUBERNETES = re.compile(r"SLUICE_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP)\w*)?)")
"""What Kubernetes puts into the environment of every pod for a Service whose name begins with `sluice`."""

RUNTIME = {"runtime": True}
"""Marks a key that may change while the server runs (`json_schema_extra` of its field)."""


Site = Literal["hidden", "attention_input", "mlp_input"]
"""Where the `quantization` probe looks."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, what was found and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class GatePatch(_Strict):
    """Sigmoid gate on the attention output (Qiu et al., arXiv 2505.06708, position G1)."""

    source: str = "auto"
    """Where the gate weights are: `auto` (from the checkpoint if its config.json declares `sluice_gate`, else none),
    `checkpoint` (required in the checkpoint), `none`, or the path of a sidecar `.safetensors` file."""
    granularity: Literal["auto", "head", "element"] = "auto"
    """One gate per head, one per element of the attention output, or what the tensors' shapes say."""
    enabled: Annotated[bool, Field(json_schema_extra=RUNTIME)] = True
    """Whether the installed gate acts."""
    temperature: Annotated[float, Field(gt=0, le=100, json_schema_extra=RUNTIME)] = 1.0
    """Divides the gate's logits; 1 is the trained gate, larger values make gates more alike."""
    floor: Annotated[float, Field(ge=0, lt=1, json_schema_extra=RUNTIME)] = 0.0
    """Smallest value of a gate, `floor + (1 - floor) * sigmoid(...)`; 0 is the trained gate."""

    @model_validator(mode="after")
    def _source_is_known(self) -> GatePatch:
        if self.source not in ("auto", "checkpoint", "none") and not self.source.endswith(".safetensors"):
            raise ValueError(
                f"source {self.source!r} is neither auto, checkpoint or none nor the path of a .safetensors file"
            )
        if self.source == "none" and self.granularity != "auto":
            raise ValueError(
                f"granularity {self.granularity!r} asks for a gate but source is none; "
                "drop granularity or name a source"
            )
        return self


class Patches(_Strict):
    """Changes of the forward pass that can be switched."""

    gate: GatePatch = GatePatch()


class ResidualProbe(_Strict):
    """Statistics of the hidden state after every decoder layer."""

    install: bool = True
    """Build the probe into the model."""
    enabled: Annotated[bool, Field(json_schema_extra=RUNTIME)] = True
    """Whether the installed probe looks at tokens."""
    layers: Annotated[Literal["all"] | list[Annotated[int, Field(ge=0)]], Field(json_schema_extra=RUNTIME)] = "all"
    """Decoder layers whose statistics are reported, counters aside; those that the model lacks are passed over."""
    sample_rows: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens a forward pass whose hidden state enters the median's histogram; all other statistics see every token."""
    interval_seconds: Annotated[float, Field(ge=0, le=60, json_schema_extra=RUNTIME)] = 0.25
    """Sample one forward pass in this time, or fewer if sampling takes over 2 % of the time; 0: every pass."""
    massive_min: Annotated[float, Field(gt=0)] = 100.0
    """Absolute part of the massive-activation criterion (Sun et al., arXiv 2402.17762)."""
    massive_ratio: Annotated[float, Field(ge=0)] = 1000.0
    """Relative part: times the median of the layer's hidden state."""
    delimiters: tuple[str, ...] = (".", ",", ";", ":", "!", "?", "\n", "'", '"')
    """Token texts, surrounding blanks aside, that make the position class `delimiter`."""


class AttentionProbe(_Strict):
    """Attention probabilities of sampled queries, recomputed from the query and the paged KV cache."""

    install: bool = True
    """Build the probe into the model."""
    enabled: Annotated[bool, Field(json_schema_extra=RUNTIME)] = True
    """Whether the installed probe samples queries."""
    layers: Annotated[Literal["all"] | list[Annotated[int, Field(ge=0)]], Field(json_schema_extra=RUNTIME)] = "all"
    """Decoder layers whose statistics are reported, counters aside; those that the model lacks are passed over."""
    queries: Annotated[int, Field(ge=1, le=256)] = 8
    """Queries sampled in a forward pass that is looked at."""
    interval_seconds: Annotated[float, Field(ge=0, le=60, json_schema_extra=RUNTIME)] = 0.25
    """Look at one forward pass in this time, or fewer if looking takes over 2 % of the time; 0: every pass."""
    max_context: Annotated[int, Field(ge=16)] = 8192
    """Queries further than this into their sequence are not sampled, to bound the cost."""
    sink_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Mean mass on position 0 from which a head counts as a sink head (Gu et al., arXiv 2410.10781)."""


class GateProbe(_Strict):
    """Values of the installed gates."""

    install: bool = True
    """Build the probe into the model, where a gate is installed."""
    enabled: Annotated[bool, Field(json_schema_extra=RUNTIME)] = True
    """Whether the installed probe looks at tokens."""
    layers: Annotated[Literal["all"] | list[Annotated[int, Field(ge=0)]], Field(json_schema_extra=RUNTIME)] = "all"
    """Decoder layers whose statistics are reported, counters aside; those that the model lacks are passed over."""
    closed_below: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A gate below this counts as closed."""


class QuantizationProbe(_Strict):
    """How much of what goes into the matrix products would survive INT8 and FP8.

    Off by default: it reads up to three more tensors a layer in every forward pass and exports up to 36 series a layer.
    """

    install: bool = False
    """Build the probe into the model. It costs time in every forward pass: measure, then leave it out again."""
    enabled: Annotated[bool, Field(json_schema_extra=RUNTIME)] = True
    """Whether the installed probe looks at tokens."""
    layers: Annotated[Literal["all"] | list[Annotated[int, Field(ge=0)]], Field(json_schema_extra=RUNTIME)] = "all"
    """Decoder layers whose statistics are reported, counters aside; those that the model lacks are passed over."""
    sites: tuple[Site, ...] = ("hidden", "attention_input", "mlp_input")
    """What to look at: the hidden state after the layer, the input of the q, k and v projections, that of the MLP."""
    sample_rows: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens a forward pass that are quantized and compared; largest values and clipped entries see every token."""
    interval_seconds: Annotated[float, Field(ge=0, le=60, json_schema_extra=RUNTIME)] = 0.25
    """Quantize in one forward pass in this time, or fewer if that takes over 2 % of the time; 0: every pass."""

    @model_validator(mode="after")
    def _sites_are_named_once(self) -> QuantizationProbe:
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ValueError(f"sites needs each site once and at least one; found {', '.join(self.sites) or 'none'}")
        return self


class Probes(_Strict):
    """Measurements taken inside the forward pass."""

    residual: ResidualProbe = ResidualProbe()
    attention: AttentionProbe = AttentionProbe()
    gate: GateProbe = GateProbe()
    quantization: QuantizationProbe = QuantizationProbe()

    @property
    def any_installed(self) -> bool:
        """Whether any probe is to be built into the model."""
        return any(getattr(self, kind).install for kind in type(self).model_fields)

    @property
    def enabled_in_vain(self) -> list[str]:
        """Probes with `enabled: true` that are not built into the model by default, and `install` is not set at all."""
        found = []
        for kind in type(self).model_fields:
            section = getattr(self, kind)
            asked = section.model_fields_set & {"install", "enabled"}
            if asked == {"enabled"} and section.enabled and not section.install:
                found.append(kind)
        return found


class Telemetry(_Strict):
    """How measurements reach `/metrics`."""

    interval_seconds: Annotated[float, Field(ge=0.1, le=60)] = 1.0
    """Time between two snapshots of a rank."""
    window_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """Length of the sliding window of maxima, means and quantiles; at least two scrape intervals."""
    detail: Literal["standard", "full"] = "standard"
    """`standard` exports at most 12 series a layer on /metrics, `full` everything in the catalogue."""
    run_dir: str | None = None
    """Folder in which every server makes one of its own for its snapshots; default: /dev/shm."""
    baseline: str | None = None
    """Calibration file that `sluice baseline record` wrote; what it holds is exported for comparison."""

    @model_validator(mode="after")
    def _window_holds_intervals(self) -> Telemetry:
        if self.window_seconds < 2 * self.interval_seconds:
            raise ValueError(
                f"window_seconds {self.window_seconds:g} is below twice interval_seconds {self.interval_seconds:g}; "
                "lengthen the window or shorten the interval"
            )
        return self


class Live(_Strict):
    """The built-in page at /plugins/sluice/."""

    enabled: bool = True
    """Serve the page."""
    history_seconds: Annotated[float, Field(ge=60, le=6 * 3600)] = 10_800.0
    """Time span that the page keeps."""
    period_seconds: Annotated[float, Field(ge=0.5, le=60)] = 2.0
    """Time between two points of the page's history."""


class Guard(_Strict):
    """Trying a switched patch on a share of the requests before it is switched for all."""

    enabled: bool = False
    """Guard every change of `patches.*.enabled` alone that is made over HTTP."""
    share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the requests that run under the new state."""
    window_seconds: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """How long the groups are compared."""
    least_tokens: Annotated[int, Field(ge=2)] = 2000
    """Generated tokens that each group needs for a verdict."""
    least_requests: Annotated[int, Field(ge=2)] = 50
    """Requests that each group needs for a verdict; with fewer, the error of a mean is not well known."""
    patience_seconds: Annotated[float, Field(ge=1)] = 1800.0
    """Without a verdict by then, the change is rolled back."""
    most_change: Annotated[float, Field(ge=0)] = 0.1
    """Largest change of the mean log-probability of generated tokens, nats, twice its error included; either way,
    because a model that is broken may well be surer of what it says."""


class Control(_Strict):
    """Changing run-time keys while the server runs, and choosing patches per request."""

    enabled: bool = True
    """Offer the admin routes and follow the configuration file."""
    token_file: str | None = None
    """File with the admin tokens, one `NAME: TOKEN` a line; the variable SLUICE_ADMIN_TOKEN holds one named `admin`.
    Without any token the routes only read."""
    allow_remote: bool = False
    """Take changes from other addresses than the loopback interface's."""
    changes_per_minute: Annotated[int, Field(ge=1)] = 60
    """Changes and refused attempts that an API server takes in a minute."""
    state_file: str | None = None
    """File that keeps what was set over HTTP, so that it survives a restart of the server; default: none."""
    watch_seconds: Annotated[float, Field(ge=0.1, le=60)] = 0.5
    """How often the configuration file is looked at."""
    timeout_seconds: Annotated[float, Field(ge=1, le=600)] = 30.0
    """A switch that takes longer is reported as failed; it is still carried to its end."""
    per_request: bool = False
    """Let requests choose with `vllm_xargs`, such as `{"sluice.gate": false}`, and ask for their own statistics with
    `{"sluice.stats": true}`. The latter needs a few more numbers for every token, so a change needs a restart."""
    guard: Guard = Guard()

    @property
    def chooses_rows(self) -> bool:
        """Whether requests of one batch may run under different patches."""
        return self.per_request or (self.enabled and self.guard.enabled)


class Config(_Strict):
    """All settings of Sluice."""

    enabled: bool = True
    """False makes the plugin do nothing at all."""
    allow_untested_vllm: bool = False
    """Install patches on a vLLM version that Sluice was not tested with."""
    patches: Patches = Patches()
    probes: Probes = Probes()
    telemetry: Telemetry = Telemetry()
    live: Live = Live()
    control: Control = Control()

    def structural(self) -> dict[str, Any]:
        """Return the settings that shape the compiled model: patches and probes without their run-time keys."""
        return {
            "patches": _without_runtime(self.patches),
            "probes": _without_runtime(self.probes),
            "per_request": self.control.per_request,
        }

    def structural_fingerprint(self) -> str:
        """Return a short hash of `structural()`, for compile-cache keys."""
        return hashlib.sha256(json.dumps(self.structural(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Loaded:
    """A configuration and where each of its non-default keys came from (dotted key to file name or variable)."""

    config: Config
    origins: Mapping[str, str]


def load(path: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Loaded:
    """Read the configuration.

    Parameters
    ----------
    path
        YAML file; default: the one named by `SLUICE_CONFIG`, else none.
    environ
        Environment; default: the process's own.

    Raises
    ------
    ConfigError
        If the file cannot be read, a key is unknown, a value has the wrong type or range, or two settings
        contradict each other.
    """
    environ = os.environ if environ is None else environ
    path = path or environ.get(CONFIG_VARIABLE) or None
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for variable, keys, value in _variables(environ):
        _put(tree, keys, value, variable)
        origins[".".join(keys)] = variable
    if path is not None:
        for keys, value in _leaves(_read_yaml(Path(path))):
            _put(tree, keys, value, str(path))
            if value != {}:
                key = ".".join(keys)
                origins = {k: o for k, o in origins.items() if not k.startswith(f"{key}.")} | {key: str(path)}
    return Loaded(_validate(tree, origins), origins)


def _validate(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None
    except (TypeError, ValueError) as error:
        where = ", ".join(sorted(set(origins.values())))
        raise ConfigError(f"{where}: {error}; a setting has to be a plain YAML value") from None


def with_values(loaded: Loaded, values: Mapping[str, Any], origin: str) -> Loaded:
    """Put values, by dotted key, on top of a configuration; None takes nothing away and is refused as any value is.

    Raises
    ------
    ConfigError
        If a key is unknown or a value does not fit.
    """
    tree = loaded.config.model_dump(mode="json")
    for key, value in values.items():
        _put(tree, tuple(key.split(".")), value, origin)
    origins = {**loaded.origins, **dict.fromkeys(values, origin)}
    return Loaded(_validate(tree, origins), origins)


def schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration."""
    return Config.model_json_schema()


def as_yaml(config: Config) -> str:
    """Return a configuration as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a mapping with keys such as patches: is needed")
    return tree


def _leaves(tree: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        here = (*above, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    for variable, text in sorted(environ.items()):
        if not variable.startswith(_PREFIX) or variable in _NOT_SETTINGS or _KUBERNETES.fullmatch(variable):
            continue
        keys = tuple(variable[len(_PREFIX) :].lower().split(_NESTING))
        try:
            yield variable, keys, yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{variable} is not a valid YAML value: {text!r}") from None


def _put(tree: dict[str, Any], keys: tuple[str, ...], value: Any, variable: str) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{variable} sets a key below {key!r}, which is set to {below!r} elsewhere")
        tree = below
    if value != {} or not isinstance(tree.get(keys[-1]), dict):
        tree[keys[-1]] = value


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for item in error.errors():
        keys = [str(part) for part in item["loc"]]
        key = ".".join(keys) or "the configuration"
        origin = next((o for k, o in origins.items() if k == key or k.startswith(key + ".")), None)
        where = f" (from {origin})" if origin else ""
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}{where}: unknown key. {_suggest(keys)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            found = item.get("input")
            shown = "" if isinstance(found, dict) else f"; found {found!r}"
            lines.append(f"{key}{where}: {message}{shown}")
    return "\n".join(lines)


def _suggest(keys: list[str]) -> str:
    model = _model_at(keys[:-1])
    known = sorted(model.model_fields) if model else []
    close = difflib.get_close_matches(keys[-1], known, n=1)
    if close:
        return f"Did you mean {'.'.join([*keys[:-1], close[0]])}?"
    for path in _all_keys(Config):
        if path[-1] == keys[-1]:
            return f"Did you mean {'.'.join(path)}?"
    return f"Known keys here: {', '.join(known)}." if known else "See `sluice config schema`."


def _model_at(keys: list[str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    for key in keys:
        field = model.model_fields.get(key) if model else None
        model = _nested(field.annotation) if field else None
    return model


def _all_keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        below = _nested(field.annotation)
        if below:
            yield from _all_keys(below, (*above, name))


def _nested(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def runtime_values(model: BaseModel) -> dict[str, Any]:
    """Return the run-time keys of one section, such as `Config.patches.gate`, with their values."""
    return {name: getattr(model, name) for name in runtime_keys(type(model))}


def runtime_keys(section: type[BaseModel]) -> list[str]:
    """Return the names of the keys of a section that may change while the server runs."""
    return [
        name
        for name, field in section.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("runtime")
    ]


def _without_runtime(model: BaseModel) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    runtime = runtime_keys(type(model))
    for name in type(model).model_fields:
        if name in runtime:
            continue
        value = getattr(model, name)
        kept[name] = _without_runtime(value) if isinstance(value, BaseModel) else value
    return kept
