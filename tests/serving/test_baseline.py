"""Recording a baseline from a real server, while somebody changes it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, passages
from tests.serving.server import Server
from tests.serving.test_control import TOKEN, request

pytestmark = pytest.mark.serving

WINDOW = 8.0
"""Long enough that a busy machine's late answer still finds in it what was seen since the last one."""
SETTINGS = {
    "telemetry": {"interval_seconds": 1.0, "window_seconds": WINDOW},
    "control": {"watch_seconds": 0.2, "guard": {"enabled": True, "share": 0.5}},
}


@pytest.fixture(scope="module")
def server(twin_gated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve with traffic."""
    options = ["--dtype", "float32", "--max-num-batched-tokens", "64", "--enforce-eager"]
    server = Server(twin_gated, tmp_path_factory.mktemp("server"), SETTINGS, options, {"SLUICE_ADMIN_TOKEN": TOKEN})
    server.wait()
    stop = threading.Event()

    def client() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            server.complete(passages()[number % 80][:200], 4, cache_salt=str(number))

    traffic = threading.Thread(target=client)
    traffic.start()
    yield server
    stop.set()
    traffic.join(60)
    server.stop()


def put(server: Server, path: str, **values: object) -> None:
    status, answer = request(server, "PUT", path, values)
    assert status in (200, 202), answer


def nothing(server: Server) -> None:
    pass


def there_and_back(server: Server) -> None:
    put(server, "patches/gate?guard=false", enabled=False)
    put(server, "patches/gate?guard=false", enabled=True)


def parameter(server: Server) -> None:
    put(server, "patches/gate", temperature=1.5)


def trial(server: Server) -> None:
    put(server, "patches/gate", enabled=False)
    assert request(server, "DELETE", "guard")[0] == 200


def probe(server: Server) -> None:
    put(server, "probes/residual", layers=[0, 5])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nothing, None),
        (there_and_back, "the patch gate was changed (a parameter, or a switch there and back) during the recording"),
        (parameter, "the patch gate was changed (a parameter, or a switch there and back) during the recording"),
        (trial, "the guard tried a switch on a part of the requests during the recording"),
        (probe, "a setting of a probe was changed, so that not all was looked at alike, during the recording"),
        (nothing, None),  # what was changed before the window is no reason to refuse
    ],
    ids=["quiet", "there-and-back", "parameter", "trial", "probe", "quiet-again"],
)
def test_what_happens_meanwhile_is_told_and_nothing_is_written(
    server: Server, tmp_path: Path, change: Callable[[Server], None], said: str | None
):
    time.sleep(WINDOW)
    path = tmp_path / "baseline.json"
    command = [
        sys.executable, "-m", "vllm_sluice.cli", "baseline", "record", "--url", server.url, "--seconds", "5",
        "--output", str(path), "--json",
    ]  # fmt: skip
    recording = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert recording.stderr is not None
    assert "listening to" in recording.stderr.readline()
    change(server)
    out, err = recording.communicate(timeout=60)
    if said is None:
        assert recording.returncode == 0, err
        assert list(json.loads(out)["sections"]) == ["gate=1"]
    else:
        assert (recording.returncode, said in err) == (1, True), err
        assert not path.exists()
