"""Recording a baseline: listening to a running server's /metrics, or letting a model read text in this process."""

from __future__ import annotations

import argparse
import itertools
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_sluice import config
from vllm_sluice.commands.problem import Problem
from vllm_sluice.commands.terminal import moment, plural
from vllm_sluice.telemetry.baseline import Recorder, Section, state_text

Sections = dict[str, Section]
_PROMPTS_AT_ONCE = 16
_PATIENCE_SECONDS = 120.0
_LEAST_CONTEXT = 2
"""Tokens of the shortest prompt: one to begin with, and one that has something before it to attend to."""


@dataclass(frozen=True)
class _Scrape:
    """One reading of all metrics of Sluice: name, labels and value."""

    samples: list[tuple[str, Mapping[str, str], float]]

    def values(self, metric: str) -> list[tuple[Mapping[str, str], float]]:
        return [(labels, value) for name, labels, value in self.samples if name == metric]

    def total(self, metric: str) -> float:
        return sum(value for _, value in self.values(metric))

    def largest(self, metric: str, default: float) -> float:
        return max((value for _, value in self.values(metric)), default=default)

    @property
    def patches(self) -> dict[str, bool]:
        """Whether each patch acts; of several engines on all or on none."""
        acts: dict[str, set[bool]] = {}
        engines = {labels["engine"] for labels, _ in self.values("sluice_info")}
        on = {(labels["engine"], labels["patch"]) for labels, value in self.values("sluice_patch_enabled") if value}
        for labels, _ in self.values("sluice_patch_installed"):
            acts[labels["patch"]] = {(engine, labels["patch"]) in on for engine in engines}
        mixed = [patch for patch, values in acts.items() if len(values) > 1]
        if mixed:
            raise Problem(f"the patch {mixed[0]} acts in some engines and not in others; see `sluice state`")
        return {patch: True in values for patch, values in acts.items()}

    @property
    def parameters(self) -> dict[str, float]:
        """Run-time parameters of the patches that act, such as `gate.temperature`; the same in all engines."""
        found: dict[str, float] = {}
        acting = {patch for patch, acts in self.patches.items() if acts}
        for labels, value in self.values("sluice_patch_parameter"):
            name = f"{labels['patch']}.{labels['parameter']}"
            if labels["patch"] in acting and found.setdefault(name, value) != value:
                raise Problem(f"the parameter {name} is {found[name]:g} in one engine and {value:g} in another")
        return found

    @property
    def ranks(self) -> set[str]:
        """Ranks that report, such as `dp0-pp0-tp1`."""
        return {f"dp{labels['engine']}-{labels['rank']}" for labels, _ in self.values("sluice_generation")}

    def differing(self, other: _Scrape, metric: str) -> list[Mapping[str, str]]:
        """Return the labels of the series of which another scrape has another value; one that is absent counts as 0."""
        mine, others = (
            {tuple(sorted(labels.items())): value for labels, value in scrape.values(metric)}
            for scrape in (self, other)
        )
        return [dict(key) for key in sorted(mine.keys() | others.keys()) if mine.get(key, 0.0) != others.get(key, 0.0)]

    def about(self, label: str) -> str:
        return next(labels[label] for labels, _ in self.values("sluice_info"))


# ------------------------------------------------------------------------------------------------ a running server
def from_server(url: str, seconds: float) -> tuple[str, Sections]:
    """Listen to a server for a while; return the model's name and one section, of the patch state in force.

    Raises
    ------
    Problem
        If no token is seen, or the server or its patch state is not the same all the time. Nothing is returned then of
        what was recorded before: the file says nowhere that a section is of less time than was asked for.
    """
    from vllm_sluice.commands.client import Client

    client = Client(url)
    recorder = Recorder()
    first = last = _scrape(client)
    patches, parameters = first.patches, first.parameters
    _check_unmixed(first)
    _say(f"listening to {url} for {seconds:g} s, {state_text(patches)}")
    until = time.monotonic() + seconds
    interval, window = first.largest("sluice_telemetry_interval_seconds", 1.0), _window(first)
    # A window forgets a slot, a twelfth, at a time, and what it holds was published up to an interval ago.
    held = window * 11 / 12 - interval
    period = max(interval, min(2 * interval, held))
    held = max(min(held, _PATIENCE_SECONDS), 1.5 * period)
    seen = time.monotonic()
    while True:
        _check_same_server(first, last)
        _check_same_state(first, last)
        recorder.add(last.samples)
        left = until - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(period, left))
        last = _scrape_again(client, first.ranks, period, seen + held)
        seen = time.monotonic()
    tokens = last.total("sluice_tokens_observed_total") - first.total("sluice_tokens_observed_total")
    if tokens <= 0 or recorder.empty:
        raise Problem(f"no token was seen in {seconds:g} s; record while there is traffic")
    return last.about("model_name"), {state_text(patches): _section(recorder, last, url, int(tokens), parameters)}


def _scrape(client: Any) -> _Scrape:
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(client.metrics()))
    except ValueError as error:
        raise Problem(f"{client.url}/metrics cannot be read: {error}; is --url the address of a vLLM server?") from None
    samples = [(s.name, s.labels, s.value) for f in families for s in f.samples if s.name.startswith("sluice_")]
    if not any(name == "sluice_info" for name, _, _ in samples):
        raise Problem(f"{client.url}/metrics has no metric of Sluice; start the server with `sluice serve`")
    return _Scrape(samples)


def _window(scrape: _Scrape) -> float:
    return scrape.largest("sluice_telemetry_window_seconds", 60.0)


def _scrape_again(client: Any, ranks: set[str], period: float, until: float) -> _Scrape:
    """Scrape in the middle of a recording, again and again until the same ranks answer.

    Nothing is missed as long as the window holds what was seen meanwhile, `until` this time (`time.monotonic`): a
    server that is too busy for one scrape, or a rank that was just writing its snapshot, do not cost the recording.
    """
    told = False
    while True:
        try:
            scrape = _scrape(client)
            if scrape.ranks != ranks:
                before, after = (", ".join(sorted(names)) or "none" for names in (ranks, scrape.ranks))
                failure = Problem(f"the ranks that report have changed, from {before} to {after}; see the server's log")
            elif time.monotonic() > until:
                failure = Problem("the answer came so late that the window no longer holds all that was seen")
            else:
                return scrape
        except Problem as problem:
            failure = problem
        left = until - time.monotonic()
        if left <= 0:
            lost = "the server, or a rank, was lost while recording, and nothing was written"
            raise Problem(f"{lost}: {failure}") from None
        if not told:
            _say(f"{failure}; trying again for {left:.0f} s, what the window holds is not missed")
            told = True
        time.sleep(min(period, left))


def _check_same_server(first: _Scrape, now: _Scrape) -> None:
    """Refuse to go on if the server was restarted: its windows and counters began anew."""
    began = "sluice_start_timestamp_seconds"
    if now.differing(first, began):
        before, after = (moment(scrape.largest(began, 0.0)) for scrape in (first, now))
        raise Problem(
            f"the server, or an engine of it, was restarted during the recording: it began at {after}, and the one "
            f"before at {before}; nothing was written. Record again; if --url leads to several servers, name one"
        )


def _check_same_state(first: _Scrape, now: _Scrape) -> None:
    """Refuse to go on if not all was seen under one patch state, and by probes with one setting."""
    if (what := _changed_since(first, now)) is not None:
        raise Problem(
            f"{what} during the recording, and nothing was written; `sluice changes` says when and by whom. Record "
            f"again once the window of {_window(now):g} s holds only what came after"
        )


def _changed_since(first: _Scrape, now: _Scrape) -> str | None:
    """Say what has changed between two scrapes, however shortly; flags alone would hide a switch there and back."""
    switched = sorted({labels["patch"] for labels in now.differing(first, "sluice_patch_enabled")})
    if switched:
        return f"the patch {', '.join(switched)} was switched"
    # The time of the last change also moves with a parameter, and is absent before the first change.
    moved = now.differing(first, "sluice_patch_last_change_timestamp_seconds")
    if changed := sorted({labels["patch"] for labels in moved}):
        return f"the patch {', '.join(changed)} was changed (a parameter, or a switch there and back)"
    # A trial between two scrapes shows in the counters only.
    results = {labels["result"] for labels in now.differing(first, "sluice_switches_total")}
    if now.values("sluice_guard_running") or "tried" in results:
        return "the guard tried a switch on a part of the requests"
    if ended := sorted(results - {"applied"}):
        return f"a change or a trial of the guard ended as {ended[0].replace('_', ' ')}"
    # A change of probes does not mix patch states, but a layer that was looked at for a part of the time would be
    # written down with too small a maximum.
    if any(labels["kind"] == "applied" for labels in now.differing(first, "sluice_generation")):
        return "a setting of a probe was changed, so that not all was looked at alike,"
    return None


def _check_unmixed(scrape: _Scrape) -> None:
    """Refuse to begin while windows or batches hold more than one patch state."""
    if trial := scrape.values("sluice_guard_running"):
        raise Problem(f"the guard tries a switch of {trial[0][0]['patch']}; record when it has ended")
    left = scrape.largest("sluice_patch_last_change_timestamp_seconds", 0.0) + _window(scrape) - time.time()
    if left > 0:
        raise Problem(f"a patch was switched, and the window still holds what came before; wait {left:.0f} s")


# ------------------------------------------------------------------------------------------------ text
def from_text(
    model: str, files: Sequence[Path], *, tokens: int, context: int, all_states: bool, sluice_config: str | None,
    vllm: Sequence[str],
) -> tuple[str, Sections]:
    """Let a model read text in this process; return its name and a section for each patch state.

    Parameters
    ----------
    tokens, context
        Most tokens to read, and tokens of one prompt, two at least.
    all_states
        Every combination of installed patches, rather than only the configured one.
    vllm
        Options as for `vllm serve`.

    Raises
    ------
    Problem
        If prompts would be too short, the text cannot be read or the model measures nothing.
    ConfigError
        If the settings of Sluice are unusable.
    """
    _check_lengths(context, vllm)
    text = "\n\n".join(_read_text(path) for path in files)
    with tempfile.TemporaryDirectory(prefix="sluice-record-") as scratch:
        _configure(Path(scratch), sluice_config)
        engine = _Engine(model, vllm, Path(scratch) / "run")
        prompts = engine.prompts(text, tokens, context)
        sections: Sections = {}
        name = model
        source = ", ".join(path.name for path in files)
        for patches in engine.states(all_states):
            engine.apply(patches)
            recorder, seen, last = Recorder(), 0, None
            for batch in _batches(prompts):
                last = engine.read(batch)
                seen += int(last.total("sluice_tokens_observed_total"))
                recorder.add(last.samples)
                _say(f"{state_text(last.patches)}: {seen} tokens")
            if last is None or recorder.empty:
                raise Problem("the model was run, but nothing was measured; see the log above for the probes")
            name = last.about("model_name")
            sections[state_text(last.patches)] = _section(recorder, last, source, seen, last.parameters)
        return name, sections


def _check_lengths(context: int, vllm: Sequence[str]) -> None:
    """Refuse prompts that are too short before a model is loaded, as far as it can be known by then.

    A prompt of one token is the beginning of text alone, or a token that attends to itself: all of its attention is on
    position 0, and a baseline of that compares with nothing that is served.
    """
    if context < _LEAST_CONTEXT:
        raise Problem(f"--context {context} leaves no room for text: a prompt needs {_LEAST_CONTEXT} tokens or more")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--max-model-len", "--max_model_len", nargs="?")  # nothing is refused here, vLLM parses it too
    length = parser.parse_known_args(list(vllm))[0].max_model_len
    if length is not None and length.isdecimal():  # not for example 4k, or a length that the model's folder tells
        _check_longest(int(length))


def _check_longest(max_model_len: int) -> int:
    """Return how long a prompt may be; one token is generated after it."""
    if max_model_len <= _LEAST_CONTEXT:
        raise Problem(
            f"the model takes {plural(max_model_len, 'token')} at most (--max-model-len), which leaves no room for "
            f"text: a prompt needs {_LEAST_CONTEXT} tokens or more, and one more is generated"
        )
    return max_model_len - 1


def _configure(scratch: Path, sluice_config: str | None) -> None:
    """Write the settings with every probe on and every pass sampled, and name them to vLLM's processes."""
    from vllm_sluice.commands import allowlist, distribution
    from vllm_sluice.commands.serve import choose_runner

    probes = ("residual", "attention", "quantization")
    wanted: dict[str, Any] = {
        "enabled": True, "telemetry.baseline": None, "telemetry.interval_seconds": 60.0,
        "telemetry.window_seconds": 3600.0, "control.per_request": False,
        **{f"probes.{probe}.{key}": value for probe in probes for key, value in
           (("install", True), ("enabled", True), ("layers", "all"), ("interval_seconds", 0.0))},
    }  # fmt: skip
    settings = config.with_values(config.load(sluice_config), wanted, "sluice baseline record").config
    file = scratch / "sluice.yaml"
    file.write_text(config.as_yaml(settings), encoding="utf-8")
    os.environ[config.CONFIG_VARIABLE] = str(file)
    os.environ[config.RUN_DIR_VARIABLE] = str(scratch / "run")
    os.environ[allowlist.VARIABLE] = allowlist.with_sluice(os.environ, allowlist.installed_plugins()).value
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for the result
    found = distribution.installed()
    if found is not None and found.is_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    choose_runner(settings)
    distribution.provide_name()


class _Engine:
    """A model in this process, with the probes read after each batch."""

    def __init__(self, model: str, vllm: Sequence[str], run_dir: Path) -> None:
        from vllm_sluice import compat
        from vllm_sluice.telemetry.collector import SnapshotCollector

        self._llm = compat.offline_engine(model, vllm)
        self._collector = SnapshotCollector(run_dir, "full")
        self._installed: dict[str, bool] = {}
        for reply in self._call("state"):
            for kind, patch in reply["patches"].items():
                self._installed[kind] = bool(patch["values"]["enabled"])
            for kind, why in reply["unavailable"].items():
                _say(f"note: no {kind} probe: {why}")

    def prompts(self, text: str, tokens: int, context: int) -> list[list[int]]:
        """Cut a text into prompts, each beginning as the tokenizer begins a text."""
        tokenizer = self._llm.get_tokenizer()
        ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
        bos = tokenizer.bos_token_id
        begins = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
        longest = _check_longest(int(self._llm.llm_engine.vllm_config.model_config.max_model_len))
        size = min(context, longest) - len(begins)
        return [begins + ids[start : start + size] for start in range(0, len(ids), size)]

    def states(self, all_states: bool) -> list[dict[str, bool]]:
        """List patch states to record, the configured one first."""
        if not all_states:
            return [self._installed]
        kinds = list(self._installed)
        every = [dict(zip(kinds, acts, strict=True)) for acts in itertools.product((True, False), repeat=len(kinds))]
        return sorted(every, key=lambda state: state != self._installed)

    def apply(self, patches: Mapping[str, bool]) -> None:
        """Switch the patches."""
        self._call("apply", {"patches": {kind: {"enabled": acts} for kind, acts in patches.items()}})

    def read(self, prompts: list[list[int]]) -> _Scrape:
        """Let the model read prompts, and return what the probes measured on them."""
        from vllm import SamplingParams

        self._call("forget")
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._llm.generate(inputs, SamplingParams(max_tokens=1), use_tqdm=False)
        self._call("publish")
        return _Scrape([(sample.metric, dict(sample.labels), sample.value) for sample in self._collector.samples()])

    def _call(self, operation: str, state: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        try:
            replies: list[dict[str, Any]] = self._llm.collective_rpc("sluice_rpc", args=(operation, state))
        except AttributeError:
            raise Problem("vLLM did not load Sluice; see `sluice doctor`") from None
        wrong = next((reply["error"] for reply in replies if "error" in reply), None)
        if wrong is not None:
            raise Problem(f"the model cannot be measured: {wrong}")
        return replies


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise Problem(f"{path} is no UTF-8 text, plain or packed with xz: {error}") from None
    if not text.strip():
        raise Problem(f"{path} holds no text")
    return text


def _batches(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        yield prompts[start : start + _PROMPTS_AT_ONCE]


def _section(
    recorder: Recorder, scrape: _Scrape, source: str, tokens: int, parameters: Mapping[str, float]
) -> Section:
    return recorder.section(
        recorded=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=source,
        tokens=tokens,
        sluice_version=scrape.about("version"),
        vllm_version=scrape.about("vllm_version"),
        parameters=parameters,
    )


def _say(text: str) -> None:
    print(f"sluice: {text}", file=sys.stderr, flush=True)
