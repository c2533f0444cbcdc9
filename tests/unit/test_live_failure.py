"""The live page when the server does not answer as it should, and when somebody pauses it."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from fastapi import Request, Response

from tests.live.site import clock, focus, opened, site, text, texts, tiles
from tests.live.synthetic import Model, served
from vllm_sluice.config import Live
from vllm_sluice.telemetry.collector import SnapshotCollector

QUICK = Live(period_seconds=0.5)


class Fault:
    """Stands before the data and answers in the server's place while `kind` is set."""

    def __init__(self) -> None:
        self.kind = ""
        self.asked: list[str] = []

    async def __call__(self, request: Request) -> Response | None:
        if not request.url.path.endswith("live.json"):
            return None
        self.asked.append(str(request.url))
        while self.kind == "stall":
            await asyncio.sleep(0.05)
        return {
            "": None,
            "error": Response("broken", 500),
            "refused": Response("busy", 503, media_type="text/plain"),
            "off": Response("The live page is switched off", 404),
            "garbage": Response("<html>proxy login</html>", 200, media_type="text/html"),
            "other": Response(json.dumps({"times": "never"}), 200, media_type="application/json"),
            "cut": Response('{"time": 1, "engi', 200, media_type="application/json"),
        }.get(self.kind)


SAYS = {
    "error": "it answers 500.",
    "refused": "it answers 503.",
    "off": "it answers 404, the live page may be switched off.",
    "garbage": "its answer is not JSON.",
    "cut": "its answer is not JSON.",
    "other": "its answer has another form; reload the page.",
    "stall": "nothing within 5 s.",
}
LOST = "document.getElementById('state').innerText === 'no answer'"
LIVE = "document.getElementById('state').innerText === 'live'"


@pytest.mark.parametrize("kind", SAYS)
def test_a_failing_server_is_told_and_its_return_noticed(browser, serve, kind):
    fault = Fault()
    model = Model(layers=3)
    made = serve([model], 20, QUICK, hindrance=fault)
    page = opened(browser, made.url)
    before = tiles(page)
    fault.kind = kind
    page.wait_for(LOST)
    (problem,) = texts(page, "#status p")
    assert problem.startswith("Problem: No answer from the server since ")
    assert SAYS[kind] in problem
    last = clock(model.started + 0.5 * 19)
    assert problem.endswith(f"Trying again. What is shown is from {last}.")
    assert tiles(page) == before  # what was known stays on screen
    assert "from the server since" in text(page, "age")
    model.write(made.folder, 5000)
    made.history.record()
    fault.kind = ""
    page.wait_for(LIVE)
    page.wait_for("document.body.innerText.includes('600,007')")
    assert texts(page, "#status p")[0].startswith("No problem seen")
    if kind in ("garbage", "cut", "other", "stall"):
        assert page.errors == []  # the browser itself reports the failed requests of the others


def test_a_server_that_fails_from_the_start_is_told_and_found(browser, serve):
    fault = Fault()
    fault.kind = "refused"
    page = browser.open(serve([Model(layers=3)], 20, QUICK, hindrance=fault).url)
    page.wait_for(LOST)
    assert "it answers 503" in text(page, "status")
    assert text(page, "heatEmpty") == "The server has not answered yet."
    assert len(texts(page, "#metrics label:not([hidden])")) > 3
    fault.kind = ""
    page.wait_for(LIVE)
    assert len(texts(page, "#body tr")) == 3


def test_a_server_that_is_gone_is_told(browser, tmp_path):
    made = site(tmp_path, [Model(layers=2)], 10, QUICK)
    with served(SnapshotCollector(tmp_path), QUICK, made.history) as url:
        page = opened(browser, url)
    page.wait_for(LOST)
    assert "it cannot be reached" in text(page, "status")


def test_a_page_that_is_paused_asks_nothing_and_goes_on_where_it_was(browser, serve):
    fault = Fault()
    model = Model(layers=3)
    made = serve([model], 20, QUICK, hindrance=fault)
    page = opened(browser, made.url)
    page.wait_for("document.querySelectorAll('figure').length > 0")
    focus(page, "#pause")
    page.click("#pause")
    assert text(page, "state") == "paused"
    assert text(page, "pause") == "Resume"
    time.sleep(0.6)
    asked = len(fault.asked)
    model.write(made.folder, 5000)
    for _ in range(3):
        made.history.record()
        time.sleep(0.5)
    assert len(fault.asked) == asked
    assert "600,007" not in page.evaluate("document.body.innerText")
    assert text(page, "state") == "paused"
    page.click("#pause")
    page.wait_for("document.body.innerText.includes('600,007')")
    assert text(page, "pause") == "Pause"
    assert "points=" not in fault.asked[asked]  # only what is new
    page.wait_for(LIVE)
    assert page.errors == []


def test_a_choice_while_paused_is_drawn_once(browser, serve):
    fault = Fault()
    page = opened(browser, serve([Model(layers=3)], 20, QUICK, hindrance=fault).url)
    page.click("#pause")
    page.click("input[value='3600'] + span")
    page.wait_for("document.querySelector('input[name=span]:checked').value === '3600'")
    page.click("input[value=attention_sink_mass] + span")
    page.wait_for("document.querySelectorAll('figure').length === 1")
    time.sleep(1.0)
    asked = len(fault.asked)
    time.sleep(1.2)
    assert len(fault.asked) == asked
    assert text(page, "state") == "paused"
    assert page.errors == []


def test_the_page_asks_for_little_once_it_has_the_past(browser, serve):
    fault = Fault()
    made = serve([Model(layers=3)], 900, Live(period_seconds=12.0), hindrance=fault)
    page = opened(browser, made.url + "#span=10800")
    page.wait_for("document.querySelectorAll('figure').length > 0")
    first = len(fault.asked)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for("performance.getEntriesByType('resource').filter(r => r.name.includes('live.json')).length >= 2")
    assert "since=-10800" in fault.asked[0] and "points=720" in fault.asked[0]
    assert "step=" in fault.asked[first] and "since=1" in fault.asked[first]
    sizes = page.evaluate(
        "performance.getEntriesByType('resource').filter(r => r.name.includes('live.json')).map(r => r.decodedBodySize)"
    )
    assert sizes[-1] < sizes[0] / 5
    assert page.errors == []
