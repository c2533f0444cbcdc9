"""`sluice serve` as a child: its defaults on a small machine, its start, and the model that it serves."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_sluice.commands.problem import Problem
from vllm_sluice.stack.child import Child
from vllm_sluice.stack.console import StatusLine, Stop
from vllm_sluice.stack.loopback import HOST, get
from vllm_sluice.stack.service import check_alive

_PERIOD = 0.5
_STAGES = (
    ("init engine", "starting the API"),
    ("Warming up done", "making the KV cache"),
    ("Warming up model for the compilation", "compiling the model"),
    ("Starting to load model", "loading the model"),
    ("Initializing a V1 LLM engine", "starting the engine"),
)


def check(model: str, port: int) -> None:
    """Raise `Problem` if it can be seen that the server would not start."""
    from vllm_sluice.commands import serve

    serve.check_model(model)
    serve.check_port(HOST, port, "PORT=" if "MAKELEVEL" in os.environ else "--port ")
    check_memory()


def start(model: str, port: int, options: Sequence[str], scratch: Path) -> Child:
    """Start the server; its log and its run folder are in `scratch`.

    Parameters
    ----------
    model
        Folder or Hugging Face name.
    port
        Port on the loopback interface.
    options
        Further options of `vllm serve`.
    scratch
        Folder for files that nobody needs afterwards.
    """
    from vllm_sluice.config import RUN_DIR_VARIABLE

    command = [sys.executable, "-m", "vllm_sluice.cli", "serve", model, "--host", HOST, "--port", str(port)]
    if not any(option.startswith("--max-model-len") for option in options):
        command += ["--max-model-len", "auto"]  # a long context would not fit the small KV cache
    if Path(model).is_dir() and not any(option.startswith("--served-model-name") for option in options):
        command += ["--served-model-name", Path(model).resolve().name]
    environ = dict(os.environ)
    environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read by the CPU build only
    environ.setdefault(RUN_DIR_VARIABLE, str(scratch / "run"))
    environ["PYTHONUNBUFFERED"] = "1"
    return Child("server", [*command, *options], scratch / "server.log", environ)


def wait_until_healthy(server: Child, base: str, line: StatusLine, stop: Stop) -> None:
    """Wait as long as it takes, and say what the server is doing."""
    began = time.monotonic()
    while True:
        check_alive(server)
        if get(f"{base}/health") is not None:
            return
        log = server.log.read_text(encoding="utf-8", errors="replace")
        stage = next((text for sign, text in _STAGES if sign in log), "loading vLLM")
        line.show(f"starting the server: {time.monotonic() - began:.0f} s, {stage}")
        stop.sleep(_PERIOD)


def served_model(base: str) -> tuple[str, int]:
    """Return the served model's name and its context length."""
    answer = get(f"{base}/v1/models")
    if answer is None:
        raise Problem(f"{base}/v1/models does not answer; does a --api-key or a proxy stand in between?")
    model: dict[str, Any] = json.loads(answer)["data"][0]
    return str(model["id"]), int(model.get("max_model_len") or 2048)


def check_memory(free: Callable[[], float | None] | None = None) -> None:
    """Raise `Problem` if vLLM is missing, or its CPU build would not find the memory that it needs."""
    from vllm_sluice.commands import distribution, doctor

    vllm = distribution.installed()
    if vllm is None:
        raise Problem("vLLM is not installed in this Python; on a CPU: make install, on a GPU: pip install vllm")
    found = (free or doctor.free_memory_gib)()
    if vllm.is_cpu and found is not None and found < doctor.CPU_MEMORY_GIB:
        raise Problem(
            f"serving on the CPU needs about {doctor.CPU_MEMORY_GIB:g} GiB of free memory; {found:.1f} GiB are free. "
            "Stop something that uses memory"
        )
