"""The live page's HTTP routes and the task that feeds its history."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.live.synthetic import Model, info, series, write
from vllm_sluice.config import Live
from vllm_sluice.live.history import History
from vllm_sluice.live.point import LAYER_METRICS
from vllm_sluice.live.routes import PREFIX, build_router, start
from vllm_sluice.telemetry.collector import SnapshotCollector

PAGE = Path(__file__).parents[2] / "plugin/vllm_sluice/live"


def client(folder: Path, settings: Live | None = None) -> tuple[TestClient, History]:
    settings = settings or Live()
    collector = SnapshotCollector(folder)
    history = History(collector, settings)
    app = FastAPI()
    app.include_router(build_router(collector, settings, history))
    return TestClient(app, base_url="http://server:8000"), history


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/live.json", "application/json"),
        ("/state", "application/json"),
    ],
)
def test_every_answer_carries_the_headers(tmp_path, path, media_type):
    answer = client(tmp_path)[0].get(PREFIX + path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert policy["frame-ancestors"] == "'none'"


def test_without_slash_redirects_relatively(tmp_path):
    answer = client(tmp_path)[0].get(PREFIX, follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"] == "sluice/"
    assert str(client(tmp_path)[0].get(PREFIX).url) == "http://server:8000/plugins/sluice/"


def test_the_page_is_small_and_needs_nothing_from_elsewhere():
    files = [file for file in PAGE.iterdir() if file.suffix in (".html", ".css", ".js")]
    assert sum(file.stat().st_size for file in files) < 60_000
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", text), file
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*src=)", html)


def test_live_json_serves_the_history(tmp_path):
    http, history = client(tmp_path)
    Model(layers=2).write(tmp_path, 3)
    Model(layers=2, engine="1").write(tmp_path, 3)
    for _ in range(3):
        history.record()
    found = http.get(f"{PREFIX}/live.json").json()
    assert [e["engine"] for e in found["engines"]] == ["0", "1"]
    assert set(found["engines"][0]["rows"]) == set(LAYER_METRICS)
    found = http.get(f"{PREFIX}/live.json?since=-600&points=2&engine=1&metrics=gate_mean,attention_sink_mass").json()
    assert [e["engine"] for e in found["engines"]] == ["1"]
    assert set(found["engines"][0]["rows"]) == {"gate_mean", "attention_sink_mass"}
    assert len(found["times"]) <= 2
    assert http.get(f"{PREFIX}/live.json?since={found['time'] + 1}").json()["times"] == []


@pytest.mark.parametrize(
    "query", ["since=nan", "since=inf", "since=x", "points=0", "points=-1", "step=0", "span=0", "span=nan"]
)
def test_live_json_refuses_nonsense(tmp_path, query):
    assert client(tmp_path)[0].get(f"{PREFIX}/live.json?{query}").status_code == 422


def test_every_script_is_served_and_nothing_else(tmp_path):
    http = client(tmp_path)[0]
    for file in PAGE.glob("*.js"):
        answer = http.get(f"{PREFIX}/{file.name}")
        assert (answer.status_code, answer.text) == (200, file.read_text(encoding="utf-8")), file.name
        for name in re.findall(r'from "\./(\w+\.js)"', answer.text):
            assert (PAGE / name).exists(), name
    for path in ("/history.py", "/nothing.js", "/../live/history.py", "/%2e%2e/config.py"):
        assert http.get(PREFIX + path).status_code == 404


def test_a_long_answer_is_compressed_for_those_who_ask(tmp_path):
    http, history = client(tmp_path)
    Model(layers=80).write(tmp_path, 3)
    # A clock of its own: two points in the same hundredth of a second would look like a clock set back.
    history._clock = itertools.count(1e9).__next__
    for _ in range(10):
        history.record()
    packed = http.get(f"{PREFIX}/live.json", headers={"Accept-Encoding": "br, gzip"})
    plain = http.get(f"{PREFIX}/live.json", headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["content-security-policy"] == plain.headers["content-security-policy"]
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
    assert packed.json()["engines"][0]["rows"] == plain.json()["engines"][0]["rows"]
    assert "content-encoding" not in plain.headers
    assert "content-encoding" not in http.get(f"{PREFIX}/live.json?since=9e9").headers


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_nothing_can_be_changed_here(tmp_path, method):
    http = client(tmp_path)[0]
    for path in ("/", "/live.json", "/state"):
        assert getattr(http, method)(PREFIX + path).status_code == 405


def test_state_shows_every_rank_of_every_engine(tmp_path):
    for engine, model in (("0", "first"), ("1", "second")):
        for rank in ("pp0-tp0", "pp0-tp1"):
            behind = engine == "1" and rank == "pp0-tp1"
            write(
                tmp_path,
                info(rank, engine, model),
                {
                    series("patch_installed", patch="gate"): 1.0,
                    series("patch_enabled", patch="gate"): 0.0,
                    series("patch_last_change_timestamp_seconds", patch="gate"): 1_700_000_000.25,
                    series("generation", rank=rank, kind="desired"): 4.0,
                    series("generation", rank=rank, kind="applied"): 3.0 if behind else 4.0,
                    series("activation_abs_max", layer="000"): math.nan,
                },
            )
    found = client(tmp_path)[0].get(f"{PREFIX}/state").json()
    first, second = found["engines"]
    assert (first["engine"], first["model_name"]) == ("0", "first")
    assert first["patches"] == {"gate": {"installed": True, "enabled": False, "last_change": 1_700_000_000.25}}
    assert [rank["rank"] for rank in second["ranks"]] == ["pp0-tp0", "pp0-tp1"]
    assert [rank["generation"]["applied"] for rank in second["ranks"]] == [4, 3]
    rank = second["ranks"][0]
    assert (rank["version"], rank["vllm_version"], rank["fingerprint"]) == ("0.1.0", "0.32.0", "3f9ac01be5d27714")
    assert 0 <= rank["snapshot_age_seconds"] < 60


def test_state_without_a_patch_and_without_workers(tmp_path):
    http = client(tmp_path)[0]
    assert http.get(f"{PREFIX}/state").json()["engines"] == []
    Model(layers=1, gate=False).write(tmp_path, 0)
    (engine,) = http.get(f"{PREFIX}/state").json()["engines"]
    assert engine["patches"] == {"gate": {"installed": False, "enabled": None, "last_change": None}}


@pytest.mark.parametrize("path", ["", "/", "/page.js", "/page.css", "/live.json"])
def test_switched_off_there_is_no_page(tmp_path, path):
    answer = client(tmp_path, Live(enabled=False))[0].get(PREFIX + path)
    assert answer.status_code == 404
    assert "live.enabled" in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_switched_off_the_state_stays(tmp_path):
    assert client(tmp_path, Live(enabled=False))[0].get(f"{PREFIX}/state").status_code == 200


class Failing(History):
    """Fails on its first calls with errors of two kinds."""

    calls = 0

    def record(self) -> None:
        self.calls += 1
        if self.calls in (1, 2, 4):
            raise OSError("no such folder")
        if self.calls == 3:
            raise KeyError("engine")
        super().record()


def fast(enabled: bool = True) -> Live:
    return Live.model_construct(enabled=enabled, history_seconds=60.0, period_seconds=0.005)


def test_the_task_records_and_outlives_errors(tmp_path, caplog):
    Model(layers=1).write(tmp_path, 0)
    history = Failing(SnapshotCollector(tmp_path), fast())

    async def run() -> None:
        task = start(history)
        while history.calls < 8:
            await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.WARNING, "vllm_sluice.live.routes"):
        asyncio.run(asyncio.wait_for(run(), 30))
    assert '"000"' in history.as_json()
    assert [record.exc_info[0] for record in caplog.records] == [OSError, KeyError]


def test_the_task_has_nothing_to_do_when_switched_off(tmp_path):
    history = Failing(SnapshotCollector(tmp_path), fast(enabled=False))

    async def run() -> None:
        await start(history)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert history.calls == 0
