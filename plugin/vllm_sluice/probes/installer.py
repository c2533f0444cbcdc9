"""Installs the probes that the configuration asks for. A probe that cannot be installed is reported, not fatal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from vllm_sluice import compat
from vllm_sluice.compat import Load
from vllm_sluice.config import Config
from vllm_sluice.patches.base import InstalledPatch
from vllm_sluice.patches.gate import InstalledGate
from vllm_sluice.probes.attention import InstalledAttention, sampling_problem
from vllm_sluice.probes.base import Probe
from vllm_sluice.probes.gate import InstalledGateProbe
from vllm_sluice.probes.quantization import InstalledQuantization
from vllm_sluice.probes.residual import InstalledResidual
from vllm_sluice.probes.rows import Rows, delimiter_ids
from vllm_sluice.probes.taps import Taps, find_taps

PROBE_KINDS = ("residual", "attention", "gate", "quantization")


class ProbeUnavailable(RuntimeError):
    """A probe cannot measure this model; the message says why."""


class ProbeSet:
    """The installed probes of one rank, the rows they look at, and why others are missing."""

    def __init__(self, config: Config, model: nn.Module, load: Load, patches: Mapping[str, InstalledPatch]) -> None:
        self.installed: list[Probe] = []
        self.unavailable: dict[str, str] = {}
        self.rows: Rows | None = None
        self._found: Taps | None = None
        probes = config.probes
        wanted: dict[str, Callable[[], Probe]] = {}
        if probes.residual.install:
            wanted["residual"] = lambda: self._residual(config, model, load)
        if probes.attention.install:
            wanted["attention"] = lambda: self._attention(config, model, load)
        if probes.gate.install and "gate" in patches:
            wanted["gate"] = lambda: self._gate(config, load, patches["gate"])
        if probes.quantization.install:
            wanted["quantization"] = lambda: self._quantization(config, model, load)
        for kind in probes.enabled_in_vain:
            compat.logger.warning(
                "sluice: probes.%s.enabled is true, but the probe is not built into the model; set probes.%s.install",
                kind, kind,
            )  # fmt: skip
        for kind, build in wanted.items():
            try:
                if problem := load.rows_problem:
                    raise ProbeUnavailable(problem)
                self.installed.append(build())
            except Exception as error:  # a probe must never stop the server; the reason is exported and logged
                self.unavailable[kind] = f"{type(error).__name__}: {error}"
                compat.logger.warning("sluice: no %s probe: %s", kind, self.unavailable[kind], exc_info=True)
        if self.installed:
            compat.logger.info("sluice: probes installed: %s", ", ".join(probe.kind for probe in self.installed))

    def _shared_rows(self, config: Config, load: Load) -> Rows:
        if self.rows is None:
            try:
                texts = load.token_texts()
            except Exception as error:
                compat.logger.warning("sluice: no tokenizer, so no token counts as a delimiter: %s", error)
                texts = [""]
            ids = delimiter_ids(texts, config.probes.residual.delimiters)
            self.rows = Rows(load.max_tokens, ids, len(texts), load.device)
        return self.rows

    def _taps(self, model: nn.Module, load: Load) -> Taps:
        if self._found is None:
            self._found = find_taps(model, load)
        return self._found

    def _residual(self, config: Config, model: nn.Module, load: Load) -> Probe:
        taps = self._taps(model, load).hidden
        if not taps:
            raise ProbeUnavailable(f"no norm or attention input carries the residual stream of {type(model).__name__}")
        rows = self._shared_rows(config, load)
        by_row = config.control.per_request
        return InstalledResidual(config.probes.residual, taps, load.hidden_size, rows, load.dtype, by_row)

    def _attention(self, config: Config, model: nn.Module, load: Load) -> Probe:
        usable, problems = [], []
        for site in compat.attention_sites(model):
            problem = sampling_problem(site)
            if problem is None:
                usable.append(site)
            else:
                problems.append(f"layer {site.layer}: {problem}")
        if problems:
            compat.logger.warning("sluice: attention is not sampled on %s", "; ".join(problems))
        if not usable:
            raise ProbeUnavailable("no layer's attention can be recomputed")
        return InstalledAttention(
            config.probes.attention, usable, load.dtype, load.device, config.control.per_request
        )

    def _gate(self, config: Config, load: Load, patch: InstalledPatch) -> Probe:
        if not isinstance(patch, InstalledGate):
            raise ProbeUnavailable("the gate patch is not installed")
        rows = self._shared_rows(config, load)
        return InstalledGateProbe(config.probes.gate, patch, rows, config.control.per_request)

    def _quantization(self, config: Config, model: nn.Module, load: Load) -> Probe:
        settings = config.probes.quantization
        taps = self._taps(model, load)
        found = {"attention_input": taps.attention_inputs, "mlp_input": taps.mlp_inputs}
        for site in settings.sites:
            if site in found and (missing := sorted(set(taps.layers) - {entry.layer for entry in found[site]})):
                names = ", ".join(map(str, missing))
                compat.logger.warning("sluice: the quantization probe finds no %s in layers %s", site, names)
        probe = InstalledQuantization(settings, taps, load.hidden_size, self._shared_rows(config, load), load.dtype)
        if not probe.layers:
            raise ProbeUnavailable(f"none of {', '.join(settings.sites)} was found in {type(model).__name__}")
        return probe
