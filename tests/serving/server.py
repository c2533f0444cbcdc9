"""A real `sluice serve` as a child process, and a real Prometheus beside it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.conftest import ROOT

T = TypeVar("T")


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, timeout: float = 30) -> str:
    """Return the body of a URL as text."""
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return str(answer.read().decode())


def eventually(hold: Callable[[], T], seconds: float = 30) -> T:
    """Return what `hold` does once it raises no AssertionError or KeyError; after `seconds`, raise the last one.

    For what other processes write in their own time, one after the other.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return hold()
        except (AssertionError, KeyError):
            if time.monotonic() > until:
                raise
        time.sleep(0.3)


class Child:
    """A child process in a group of its own, its output in a log file."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self, timeout: float = 60) -> int:
        """Ask the process to end as Ctrl-C does; kill its group if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        return int(self.process.returncode)

    def tail(self, characters: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-characters:]


class Server(Child):
    """A running OpenAI-compatible server with Sluice.

    Parameters
    ----------
    model
        Checkpoint folder.
    folder
        For log and configuration.
    settings
        Sluice configuration, written to a file.
    options
        Further `vllm serve` options.
    """

    def __init__(self, model: Path, folder: Path, settings: dict[str, Any], options: list[str],
                 variables: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = model
        (folder / "sluice.yaml").write_text(json.dumps(settings))
        command = [
            sys.executable, "-m", "vllm_sluice.cli", "serve", str(model),
            "--sluice-config", str(folder / "sluice.yaml"),
            "--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "512", "--max-num-seqs", "16", *options,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "VLLM_ENABLE_V1"))}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **(variables or {})}
        super().__init__(command, folder / "server.log", environment)

    def wait(self, seconds: float = 400) -> None:
        """Wait until the server is healthy."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                get(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(f"the server was not healthy after {seconds} s:\n{self.tail()}")

    def complete(self, prompt: list[int] | str, tokens: int = 1, **body: Any) -> dict[str, Any]:
        """Complete a prompt through the OpenAI API, greedily."""
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps(
                {"model": str(self.model), "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                 "ignore_eos": True, "return_token_ids": True, **body}
            ).encode(),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as answer:
            result: dict[str, Any] = json.loads(answer.read())
        return result

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Scrape: `(metric without prefix, label values besides model_name and engine...)` to value."""
        from prometheus_client.parser import text_string_to_metric_families

        found = {}
        for family in text_string_to_metric_families(get(f"{self.url}/metrics")):
            for sample in family.samples:
                if sample.name.startswith("sluice_"):
                    labels = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
                    found[(sample.name.removeprefix("sluice_"), *labels)] = sample.value
        return found

    def settled(self, key: tuple[str, ...], value: float, seconds: float = 20) -> dict[tuple[str, ...], float]:
        """Wait until a metric has a value, and return all metrics."""
        until = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            if metrics.get(key) == value or time.monotonic() > until:
                return metrics
            time.sleep(0.3)


class Prometheus(Child):
    """A real Prometheus that scrapes one server every second."""

    def __init__(self, program: str, target: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s"},
                    "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
                }
            )
        )
        command = [
            program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]  # fmt: skip
        super().__init__(command, folder / "prometheus.log", dict(os.environ))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Run an instant query; each result has `metric` and `value`."""
        answer = json.loads(get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        assert answer["status"] == "success", answer
        results: list[dict[str, Any]] = answer["data"]["result"]
        return results

    def wait_for(self, expression: str, seconds: float = 60) -> list[dict[str, Any]]:
        """Query until there is a result."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                results = self.query(expression)
            except OSError:
                results = []
            if results:
                return results
            time.sleep(0.5)
        raise TimeoutError(f"no result for {expression} after {seconds} s:\n{self.tail()}")
