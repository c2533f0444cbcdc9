"""Takes the pictures in docs/dashboards: each board on the made-up history, drawn by Grafana's components and ours.

    python -m tests.grafana.pictures.take [UID ...] [--light] [--recorded]
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from PIL import Image, ImageOps

from tests.browser import Browser
from tests.conftest import ROOT
from tests.grafana import boards, stretches
from tests.grafana.stretches import Stretch

HERE = Path(__file__).resolve().parent
OUT = ROOT / "docs/dashboards"
WIDTH = 1600
_MOST_BYTES = 300 * 1024
_PAGE = """<!doctype html><meta charset="utf-8"><title>{uid}</title>
<link rel="stylesheet" href="/app.css">
<body style="margin:0"><div id="root"></div>
<script type="application/json" id="job">{job}</script><script src="/app.js"></script>"""


def main() -> None:
    """Take the pictures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("uids", nargs="*", metavar="UID", help="boards (default: all)")
    parser.add_argument("--light", action="store_true", help="in the light theme")
    parser.add_argument("--recorded", action="store_true", help="on the recorded hour")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: docs/dashboards)")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _bundle(folder / "site/app.js")
        serve = stretches.recorded if asked.recorded else stretches.generated
        with serve(folder) as stretch, _Site(folder / "site") as site, Browser() as browser:
            for uid in asked.uids or boards.UIDS:
                _write_page(folder / "site", uid, stretch, "light" if asked.light else "dark")
                name = f"recorded-{uid}" if asked.recorded else uid
                _take(browser, f"{site.url}/{uid}.html", asked.out / f"{name}.png")


def _bundle(out: Path) -> None:
    if not (HERE / "node_modules/.package-lock.json").exists():
        subprocess.run(["npm", "ci", "--ignore-scripts"], cwd=HERE, check=True)
    subprocess.run([shutil.which("node") or "node", "bundle.mjs", str(out)], cwd=HERE, check=True)


def _write_page(site: Path, uid: str, stretch: Stretch, theme: str) -> None:
    job = {
        "url": stretch.prometheus.url,
        "from": stretch.start,
        "to": stretch.end,
        "scrape": stretch.scrape,
        "theme": theme,
        "board": boards.load(uid),
        # What somebody would choose who looks for the layers that are hard to quantize.
        "values": {"format": "int8", "scale": "per_tensor"} if uid == "sluice-quantization" else {},
    }
    page = _PAGE.format(uid=uid, job=json.dumps(job).replace("</", "<\\/"))
    (site / f"{uid}.html").write_text(page, encoding="utf-8")


def _take(browser: Browser, url: str, out: Path) -> None:
    page = browser.open(url, width=WIDTH, height=1000)
    page.wait_for("window.total !== undefined && window.done >= window.total", seconds=120)
    page.evaluate("new Promise(done => setTimeout(done, 1500))")  # charts draw after their data is there
    page.screenshot(out)
    errors = [error for error in page.errors if "404" not in error]  # icons that are fetched by name
    assert not errors, f"{url}: {errors[:5]}"
    taken = Image.open(out).convert("RGB")
    for bits in (6, 5):  # of eight a colour: they look the same and are a third smaller; a palette shows in heatmaps
        ImageOps.posterize(taken, bits).save(out, optimize=True)
        if out.stat().st_size < _MOST_BYTES:
            break
    print(f"{out.name}: {Image.open(out).size}, {out.stat().st_size // 1000} kB")


class _Site:
    """A file server on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(_Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> _Site:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    main()
