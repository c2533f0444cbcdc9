"""`sluice exporter`, run as a process of its own beside real snapshot files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.live import synthetic
from vllm_sluice import cli
from vllm_sluice.telemetry import rundir

NOBODY = 65534

# Imports come before the change of user: the interpreter may lie in a folder that others cannot enter.
AS_USER = """\
import http.server, json, os, sys, prometheus_client.openmetrics.exposition
import vllm_sluice.config, vllm_sluice.telemetry.collector
from vllm_sluice import cli
cli._parser([])
os.setgroups([]), os.setgid({user}), os.setuid({user})
sys.exit(cli.main(sys.argv[1:]))
"""


def command(user: int | None) -> list[str]:
    program = ["-m", "vllm_sluice.cli"] if user is None else ["-c", AS_USER.format(user=user)]
    return [sys.executable, *program, "exporter", "--port", "0"]


@contextlib.contextmanager
def exporter(*arguments: str, user: int | None = None, environ: dict[str, str] | None = None) -> Iterator[str]:
    """Run the exporter on a free port; yields its address and checks that SIGTERM ends it well."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "plugin"), **(environ or {})}
    process = subprocess.Popen(
        [*command(user), *arguments], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        said = process.stderr.readline()
        found = re.search(r"http://(127\.0\.0\.1|\[::1\]):\d+", said)
        assert found, said + process.stderr.read()
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def get(url: str, accept: str = "") -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(page)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(page: str, metric: str, **labels: str) -> float | None:
    wanted = {"model_name": "sluice/twin-32", "engine": "0", **labels}
    return samples(page).get((f"sluice_{metric}", tuple(sorted(wanted.items()))))


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The ranks of a second machine, and their exporter."""
    folder = tmp_path_factory.mktemp("ranks")
    model = synthetic.Model(layers=3, ranks=2)
    model.write(folder, step=5)
    with exporter("--run-dir", str(folder)) as url:
        yield folder, url


def test_metrics_are_those_of_the_ranks_in_the_folder(two_ranks):
    _, url = two_ranks
    status, content_type, page = get(f"{url}/metrics")
    assert status == 200
    assert content_type.startswith("text/plain")
    heads = [
        snapshot[synthetic.series("attention_sink_heads", layer="001")]
        for snapshot in (synthetic.Model(layers=3, ranks=2).values(5, rank=rank) for rank in range(2))
    ]
    assert value(page, "attention_sink_heads", layer="001") == sum(heads)
    assert value(page, "generation", rank="pp0-tp1", kind="applied") == 0
    assert value(page, "snapshot_age_seconds", rank="pp0-tp0") < 60
    assert json.loads(get(f"{url}/health")[2])["ranks"] == ["pp0-tp0", "pp0-tp1"]


def test_open_metrics_is_answered_to_who_asks(two_ranks):
    _, content_type, page = get(f"{two_ranks[1]}/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert any(family.name == "sluice_gate_mean" for family in parse_openmetrics(page))


def test_other_paths_are_404_and_name_those_that_exist(two_ranks):
    status, _, text = get(f"{two_ranks[1]}/plugins/sluice/")
    assert (status, text) == (404, "here are /metrics and /health\n")


def test_full_detail_comes_from_the_settings_of_the_server(two_ranks, tmp_path):
    settings = tmp_path / "sluice.yaml"
    settings.write_text("telemetry: {detail: full}\n")
    assert value(get(f"{two_ranks[1]}/metrics")[2], "activation_rms", layer="000") is None
    with exporter("--run-dir", str(two_ranks[0]), environ={"SLUICE_CONFIG": str(settings)}) as url:
        assert value(get(f"{url}/metrics")[2], "activation_rms", layer="000") is not None


def test_it_may_start_before_the_ranks(tmp_path):
    folder = tmp_path / "later"
    with exporter(environ={"SLUICE_RUN_DIR": str(folder)}) as url:
        assert get(f"{url}/metrics")[::2] == (200, "")
        assert json.loads(get(f"{url}/health")[2])["ranks"] == []
        rundir.create(folder)
        synthetic.Model(layers=1).write(folder, step=1)
        assert value(get(f"{url}/metrics")[2], "gate_mean", layer="000") is not None


def test_a_rank_whose_process_ended_is_left_out(tmp_path):
    values = {synthetic.series("gate_mean", layer="000"): 0.5}
    synthetic.write(tmp_path, synthetic.info("pp0-tp0", pid=ended_process()), values)
    with exporter("--run-dir", str(tmp_path)) as url:
        assert "sluice_gate_mean" not in get(f"{url}/metrics")[2]


def test_without_the_process_in_sight_age_decides(tmp_path, monkeypatch):
    """In a container of its own the exporter sees another process, or none, under the rank's number."""
    values = {synthetic.series("gate_mean", layer="000"): 0.5}
    writer = synthetic.write(tmp_path, synthetic.info("pp0-tp0", pid=ended_process()), values)
    with exporter("--run-dir", str(tmp_path), "--gone-after", "60") as url:
        assert value(get(f"{url}/metrics")[2], "gate_mean", layer="000") == 0.5
        long_ago = time.time() - 61
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: long_ago)
            writer.write(np.array([0.25]))
        assert "sluice_gate_mean" not in get(f"{url}/metrics")[2]
        writer.write(np.array([0.75]))
        assert value(get(f"{url}/metrics")[2], "gate_mean", layer="000") == 0.75


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start the exporter as another user")
def test_a_folder_of_another_user_is_unhealthy_and_says_so():
    base = Path("/dev/shm")
    folder = base / f"test-exporter-{os.getpid()}"
    rundir.create(folder)
    try:
        with exporter("--run-dir", str(folder), user=NOBODY) as url:
            status, _, text = get(f"{url}/health")
        assert status == 503
        assert "belongs to user 0; run the exporter as that user, not as 65534" in json.loads(text)["problem"]
    finally:
        folder.rmdir()


def test_the_only_run_folder_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rundir, "_base", lambda: tmp_path)
    assert cli.main(["exporter"]) == 1
    assert "0 run folders of running servers found here (none); name one with --run-dir" in capsys.readouterr().err
    mine = tmp_path / f"sluice-{os.getuid()}-{os.getpid()}-{rundir.start_ticks(os.getpid())}"
    for folder in (mine, tmp_path / f"sluice-{os.getuid()}-{ended_process()}-77", tmp_path / "sluice-notes"):
        folder.mkdir()
    assert rundir.of_running_servers() == [mine]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_it_listens_on_ipv6_too(tmp_path):
    with exporter("--run-dir", str(tmp_path), "--host", "::1") as url:
        assert url.startswith("http://[::1]:")
        assert get(f"{url}/health")[0] == 200


def test_a_taken_port_and_bad_arguments_are_told(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["exporter", "--run-dir", str(tmp_path), "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; name another" in capsys.readouterr().err
    assert cli.main(["exporter", "--run-dir", str(tmp_path), "--port", "70000"]) == 1
    assert "the highest is 65535" in capsys.readouterr().err
    for bad in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["exporter", "--gone-after", bad])


def test_an_unusable_configuration_stops_it(tmp_path, capsys):
    settings = tmp_path / "sluice.yaml"
    settings.write_text("telemetri: {}\n")
    assert cli.main(["exporter", "--run-dir", str(tmp_path), "--sluice-config", str(settings)]) == 2
    assert "Did you mean telemetry?" in capsys.readouterr().err
