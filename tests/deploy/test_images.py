"""The Dockerfiles: hadolint, and the wheel that they build, from the files that they copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.deploy.tools import DEPLOY, ROOT, output, run, tool
from vllm_sluice import __version__

DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
assert len(DOCKERFILES) == 2


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_has_no_findings(file):
    output(tool("hadolint"), file)


def test_hadolint_finds_an_unpinned_base(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp\n")
    found = run(tool("hadolint"), tmp_path / "Dockerfile").stdout
    assert "DL3007" in found
    assert "DL3003" in found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_image_runs_the_server_without_root_and_is_watched(file):
    text = file.read_text()
    assert re.search(r"^ARG VLLM_IMAGE=vllm/vllm-openai(-cpu)?:v0\.32\.\d+$", text, re.M)
    user = re.findall(r"^USER (.*)$", text, re.M)
    assert user == ["2000:0"]
    assert text.index("USER 2000:0") > text.rindex("RUN ")
    assert re.search(r'^ENTRYPOINT \[".*sluice", "serve"\]$', text, re.M)
    assert "HEALTHCHECK" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What the first stage builds: only the files of the context that .dockerignore lets in and COPY names."""
    context, target = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("wheel")
    let_in = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    copied = []
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILES[0].read_text(), re.M):
        copied += line.split()[:-1]
    assert sorted(copied) == sorted(let_in)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in copied:
        source = ROOT / name
        shutil.copytree(source, context / name, ignore=ignore) if source.is_dir() else shutil.copy(source, context)
    output(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target,
        context,
    )  # fmt: skip
    return next(target.glob("*.whl"))


def test_both_images_copy_the_same():
    first, second = (re.findall(r"^COPY .*$", file.read_text(), re.M) for file in DOCKERFILES)
    assert first == second


def test_the_wheel_holds_code_page_and_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    for part in ("live/page.html", "live/page.js", "live/page.css", "demo/passages.txt", "commands/exporter.py"):
        assert f"vllm_sluice/{part}" in names
    assert "[vllm.endpoint_plugins]\nsluice = vllm_sluice.entrypoints:endpoint" in entry_points


def test_the_installed_wheel_starts(wheel, tmp_path):
    output(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel)
    done = subprocess.run(
        [tmp_path / "bin/sluice", "--version"], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"sluice {__version__}\n", "")
