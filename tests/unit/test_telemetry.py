"""Snapshots, run folders and the collector, with real files and real processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_sluice import __version__
from vllm_sluice.config import RUN_DIR_VARIABLE, SERVER_VARIABLE, Telemetry
from vllm_sluice.control.controller import NotReady, RankReport
from vllm_sluice.rank import rank_info
from vllm_sluice.server import SluiceEndpoint
from vllm_sluice.telemetry import rundir
from vllm_sluice.telemetry.collector import SnapshotCollector
from vllm_sluice.telemetry.snapshot import SUFFIX, RankInfo, Series, SnapshotReader, SnapshotWriter


def info(rank: str = "pp0-tp0", engine: str = "0", pid: int | None = None) -> RankInfo:
    return RankInfo(os.getpid() if pid is None else pid, rank, engine, "model", "0.1", "0.32.0", "abc")


def write_forever(path: str) -> None:
    writer = SnapshotWriter(Path(path), info(), [Series("sluice_info", (("layer", str(i)),)) for i in range(500)])
    value = 0.0
    while True:
        writer.write(np.full(500, value))
        value += 1.0


def test_a_reader_never_sees_half_a_write(tmp_path):
    path = tmp_path / f"a{SUFFIX}"
    process = multiprocessing.get_context("spawn").Process(target=write_forever, args=(str(path),), daemon=True)
    process.start()
    try:
        end = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        reader = SnapshotReader(path)
        seen, reads = set(), 0
        # The writer may be off its core during thousands of reads.
        while reads < 3000 or len(seen) <= 10:
            assert time.monotonic() < end, (reads, len(seen))
            reads += 1
            snapshot = reader.read()
            if snapshot is not None and not np.isnan(snapshot.values[0]):
                assert len(set(snapshot.values.tolist())) == 1
                seen.add(snapshot.values[0])
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("content", [b"", b"x", b"SLUICE01", b"0" * 200])
def test_a_broken_file_is_skipped(tmp_path, content):
    (tmp_path / f"broken{SUFFIX}").write_bytes(content)
    SnapshotWriter(tmp_path / f"good{SUFFIX}", info(), [Series("sluice_gate_mean", (("layer", "000"),))]).write(
        np.array([0.5])
    )
    samples = SnapshotCollector(tmp_path).samples()
    assert [s.value for s in samples if s.metric == "sluice_gate_mean"] == [0.5]


def test_ranks_are_combined_as_the_catalogue_says_and_engines_are_not(tmp_path):
    series = [
        Series("sluice_attention_sink_mass", (("layer", "000"),)),
        Series("sluice_attention_heads", (("layer", "000"),)),
        Series("sluice_activation_abs_max", (("layer", "000"),)),
    ]
    ranks = (("0", "pp0-tp0", [0.2, 4, 7]), ("0", "pp0-tp1", [0.4, 4, 8]), ("1", "pp0-tp0", [1, 1, 1]))
    for engine, rank, values in ranks:
        path = tmp_path / f"dp{engine}-{rank}{SUFFIX}"
        SnapshotWriter(path, info(rank, engine), series).write(np.array(values, dtype=np.float64))
    found = {(s.metric, dict(s.labels)["engine"]): s.value for s in SnapshotCollector(tmp_path).samples()}
    assert found["sluice_attention_sink_mass", "0"] == pytest.approx(0.3)
    assert found["sluice_attention_heads", "0"] == 8
    assert found["sluice_activation_abs_max", "0"] == 8
    assert found["sluice_activation_abs_max", "1"] == 1


def test_a_dead_rank_and_a_missing_value_are_not_exported(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    one = [Series("sluice_gate_mean", (("layer", "000"),))]
    SnapshotWriter(tmp_path / f"dead{SUFFIX}", info("pp0-tp1", pid=gone.pid), one).write(np.array([0.1]))
    SnapshotWriter(tmp_path / f"idle{SUFFIX}", info(), one).write(np.array([np.nan]))
    text = _render(SnapshotCollector(tmp_path, "full"))
    assert "sluice_gate_mean" not in text
    assert 'rank="pp0-tp1"' not in text
    assert 'sluice_snapshot_age_seconds{engine="0",model_name="model",rank="pp0-tp0"}' in text


def test_standard_detail_is_at_most_twelve_series_a_layer(tmp_path):
    from vllm_sluice.telemetry.catalogue import CATALOGUE, OPTIONAL_GROUPS

    choices = {"layer": ["000", "001"], "rank": ["1", "2", "3"], "position": ["start", "delimiter", "other"]}
    series = []
    for metric in CATALOGUE:
        if "layer" in metric.labels and metric.group not in OPTIONAL_GROUPS:
            labels: list[tuple[tuple[str, str], ...]] = [()]
            for name in metric.labels:
                labels = [(*above, (name, value)) for above in labels for value in choices[name]]
            series += [Series(metric.name, label) for label in labels]
    SnapshotWriter(tmp_path / f"a{SUFFIX}", info(), series).write(np.ones(len(series)))
    standard, full = (_render(SnapshotCollector(tmp_path, detail)) for detail in ("standard", "full"))
    assert standard.count('layer="001"') == 12
    assert full.count('layer="001"') == 22
    exported = sum(not line.startswith("#") for line in standard.splitlines())
    assert f'sluice_exported_series{{engine="0",model_name="model"}} {exported}.0' in standard


def test_the_run_folder_is_announced_to_children_and_swept_when_its_server_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "_base", lambda: tmp_path)
    monkeypatch.setenv(RUN_DIR_VARIABLE, "")
    chosen = rundir.announce(Telemetry())
    assert os.environ[RUN_DIR_VARIABLE] == str(chosen)
    assert rundir.announce(Telemetry()) == chosen
    assert not chosen.exists()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = tmp_path / f"sluice-{os.getuid()}-{gone.pid}-123"
    stale.mkdir()
    rundir.create(chosen)
    assert chosen.stat().st_mode & 0o777 == 0o700
    assert not stale.exists()


SERVER = """
import multiprocessing, os, sys
from vllm_sluice.config import Telemetry
from vllm_sluice.telemetry import rundir

def child():
    rundir.announce(Telemetry())
    print(os.environ["SLUICE_RUN_DIR"], rundir.server(), flush=True)

if __name__ == "__main__":
    rundir.announce(Telemetry())
    for method in ("spawn", "fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=child)
        process.start()
        process.join()
"""


@pytest.mark.parametrize("left", ["", "5e-1-1"], ids=["nothing", "of-a-launcher"])
def test_processes_of_a_server_share_an_identity_and_the_next_server_in_its_folder_has_another(tmp_path, left):
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    environment = {**os.environ, RUN_DIR_VARIABLE: str(tmp_path / "run"), SERVER_VARIABLE: left}

    def identities() -> set[str]:
        done = subprocess.run(
            [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=True
        )
        folders, found = zip(*map(str.split, done.stdout.splitlines()), strict=True)
        assert set(folders) == {str(tmp_path / "run")}
        assert len(found) == 3
        return set(found)

    first, second = identities(), identities()
    assert len(first) == len(second) == 1
    assert len({left, *first, *second}) == 3


def test_servers_that_share_a_folder_switch_nothing(tmp_path):
    endpoint = object.__new__(SluiceEndpoint)
    endpoint._collector = SnapshotCollector(tmp_path)
    series = [Series("sluice_generation", (("rank", "pp0-tp0"), ("kind", kind))) for kind in ("desired", "applied")]
    series += [Series("sluice_probe_failed", (("probe", kind),)) for kind in ("residual", "attention", "gate")]
    for engine in ("0", "1"):
        writer = SnapshotWriter(tmp_path / f"{engine}{SUFFIX}", info(engine=engine), series)
        writer.write(np.array([5.0, 4.0, 0.0, 1.0, np.nan]))
    assert endpoint._reports(2) == {f"dp{n}-pp0-tp0": RankReport(5, 4, frozenset({"attention"})) for n in (0, 1)}
    with pytest.raises(NotReady, match="2 of 3 ranks report"):
        endpoint._reports(3)
    with pytest.raises(NotReady, match="2 ranks report in the run folder, and this server has 1: several servers"):
        endpoint._reports(1)


def test_another_process_with_the_number_of_a_rank_is_not_that_rank(tmp_path):
    one = [Series("sluice_gate_mean", (("layer", "000"),))]
    me = info("pp0-tp0")
    for rank, ticks in (("pp0-tp0", rundir.start_ticks(os.getpid())), ("pp0-tp1", "1"), ("pp0-tp2", "")):
        about = replace(me, rank=rank, start_ticks=ticks)
        SnapshotWriter(tmp_path / f"{rank}{SUFFIX}", about, one).write(np.array([0.5]))
    found = [snapshot.info.rank for snapshot in SnapshotCollector(tmp_path).snapshots()]
    assert found == ["pp0-tp0", "pp0-tp2"]  # without ticks, as older versions write it, the number decides


def test_a_rank_says_when_its_process_started():
    load = SimpleNamespace(rank=lambda: "pp0-tp0", engine="0", served_name="twin")
    about = rank_info(load, "0.1.0", "abc")
    assert (about.pid, about.start_ticks) == (os.getpid(), rundir.start_ticks(os.getpid()))
    assert about.start_ticks


# ------------------------------------------------------------------------------------------- ranks of another version
def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a snapshot says of its rank, as another version would have written it."""
    snapshot = SnapshotReader(path).read()
    about = dict(vars(snapshot.info))
    change(about)
    SnapshotWriter(path, SimpleNamespace(**about), snapshot.series).write(snapshot.values)


def test_what_a_newer_server_adds_is_left_out_and_told_once(tmp_path, caplog):
    path = tmp_path / f"a{SUFFIX}"
    layer = ("layer", "000")
    series = [
        Series("sluice_tomorrow", (layer,)),
        Series("sluice_gate_mean", (layer,)),
        Series("sluice_attention_sink_mass", (layer, ("head", "0"))),
        Series("sluice_attention_sink_mass", (layer, ("head", "1"))),
        Series("sluice_activation_abs_max", (layer,)),
    ]
    SnapshotWriter(path, info(), series).write(np.array([1.0, 0.5, 0.1, 0.2, 7.0]))
    rewrite(path, lambda about: about.update(version="0.9", node="a"))
    collector = SnapshotCollector(tmp_path, "full")
    with caplog.at_level("WARNING", "vllm.sluice"):
        for _ in range(3):
            text = _render(collector)
    assert 'sluice_gate_mean{engine="0",layer="000",model_name="model"} 0.5' in text
    assert 'sluice_activation_abs_max{engine="0",layer="000",model_name="model"} 7.0' in text
    assert "tomorrow" not in text
    assert "sink_mass" not in text  # two series of one name and one set of labels would fail the whole scrape
    assert [record.getMessage() for record in caplog.records] == [
        f"sluice: ranks run Sluice 0.9 and this is {__version__}, so what it does not know is left out: node, "
        "sluice_attention_sink_mass, sluice_tomorrow"
    ]


def test_a_rank_that_does_not_say_all_that_is_needed_is_left_out_and_told_once(tmp_path, caplog):
    one = [Series("sluice_gate_mean", (("layer", "000"),))]
    for rank in ("pp0-tp0", "pp0-tp1"):
        SnapshotWriter(tmp_path / f"{rank}{SUFFIX}", info(rank), one).write(np.array([0.5]))
    path = tmp_path / f"pp0-tp1{SUFFIX}"
    rewrite(path, lambda about: about.update(version="0.0.1") or about.pop("engine"))
    with pytest.raises(ValueError, match=r"pp0-tp1.*written by Sluice 0\.0\.1, lacks engine"):
        SnapshotReader(path)
    collector = SnapshotCollector(tmp_path)
    with caplog.at_level("WARNING", "vllm.sluice"):
        found = [[snapshot.info.rank for snapshot in collector.snapshots()] for _ in range(3)]
    assert found == 3 * [["pp0-tp0"]]
    assert [record.getMessage() for record in caplog.records] == [
        f"sluice: a rank is left out: {path}, written by Sluice 0.0.1, lacks engine"
    ]


@pytest.mark.parametrize(
    "change", [lambda about: about.update(pid="12"), lambda about: about.update(start_ticks=5)], ids=["pid", "ticks"]
)
def test_a_header_of_another_form_costs_only_its_rank(tmp_path, change):
    one = [Series("sluice_gate_mean", (("layer", "000"),))]
    for rank in ("pp0-tp0", "pp0-tp1"):
        SnapshotWriter(tmp_path / f"{rank}{SUFFIX}", info(rank), one).write(np.array([0.5]))
    rewrite(tmp_path / f"pp0-tp1{SUFFIX}", change)
    assert [snapshot.info.rank for snapshot in SnapshotCollector(tmp_path).snapshots()] == ["pp0-tp0"]


def test_a_header_without_what_is_needed_is_a_value_error(tmp_path):
    path = tmp_path / f"a{SUFFIX}"
    SnapshotWriter(path, info(), [Series("sluice_gate_mean", (("layer", "000"),))]).write(np.array([0.5]))
    whole = path.read_bytes()
    assert whole.count(b'"series"') == 1
    path.write_bytes(whole.replace(b'"series"', b'"tables"'))
    with pytest.raises(ValueError, match="header of another form: KeyError: 'series'"):
        SnapshotReader(path)


def test_the_run_folder_is_removed_when_its_first_process_ends(tmp_path):
    program = (
        "from pathlib import Path\n"
        "from vllm_sluice.config import Telemetry\n"
        "from vllm_sluice.telemetry import rundir\n"
        f"rundir._base = lambda: Path({str(tmp_path)!r})\n"
        "folder = rundir.announce(Telemetry())\n"
        "rundir.create(folder)\n"
        "assert folder.is_dir()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != RUN_DIR_VARIABLE}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


def _render(collector: SnapshotCollector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()
