"""`phi3 doctor` names each problem with its remedy, and exits with status 1 if there is any."""

import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.helpers import ROOT, edit

pytestmark = pytest.mark.slow


class Answers(BaseHTTPRequestHandler):
    """An HTTP server that answers every request."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        """Print nothing."""


@pytest.fixture
def answering():
    """The URL of a server that answers, in place of the Hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def doctor(folder, **environment):
    """Run `phi3 doctor` in `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | environment
    command = [sys.executable, "-m", "pipeline.cli", "doctor"]
    return subprocess.run(
        command, cwd=folder, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_all_is_well(project, answering):
    """In a project with the locked packages and a Hub that answers, no problem is found."""
    (project / "requirements.lock").write_bytes((ROOT / "requirements.lock").read_bytes())
    result = doctor(project, HF_ENDPOINT=answering, HF_TOKEN="hf_secret")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok      ") for line in lines)
    assert f"ok      Hub: {answering} answers" in lines
    assert f"ok      settings: HF_ENDPOINT={answering}, HF_TOKEN=(set)" in lines
    assert "hf_secret" not in result.stdout
    assert any(line.startswith("ok      openvino: ") and "devices: CPU (" in line for line in lines)


def test_problems(project, tmp_path):
    """A package of another version, a missing remote and a Hub that does not answer are named with their remedies; no
    password is shown."""
    (project / "requirements.lock").write_text("# locked\nclick==0.1\nno-such-package==1.0\n")
    (project / "libraries.lock").write_text("torch==1.0\n")
    with (project / ".dvc/config").open("a") as config:
        config.write(f"['remote \"store\"']\n    url = {tmp_path}/gone\n")
    result = doctor(project, HF_ENDPOINT="http://me:s3cret@127.0.0.1:9")
    assert result.returncode == 1
    assert result.stderr == "Error: 3 problems found\n"
    assert re.search(
        r"no-such-package missing instead of 1\.0; torch 2\S+ instead of 1\.0\n +remedy: pip install --no-deps -r",
        result.stdout,
    )
    assert f"problem remote store: {tmp_path}/gone is not there\n        remedy: mount or create it" in result.stdout
    assert "problem Hub: http://(password)@127.0.0.1:9 does not answer (" in result.stdout
    assert "HF_ENDPOINT=http://(password)@127.0.0.1:9" in result.stdout
    assert "s3cret" not in result.stdout + result.stderr


def test_a_cache_on_another_disk(project, tmp_path, mount):
    """A cache that DVC keeps on another file system cannot share the disk with artifacts/, and nothing is written."""
    cache = mount(tmp_path / "disk", 1) / "cache"
    edit(project / ".dvc/config", "[cache]\n", f"[cache]\n    dir = {cache}\n")
    result = doctor(project, HF_HUB_OFFLINE="1")
    assert (
        f"problem cache: no hard links from {cache} to artifacts/ (Invalid cross-device link): each artifact takes its "
        "space twice\n        remedy: give `dvc cache dir` a folder on this disk, or move " in result.stdout
    )
    assert not cache.exists()


def test_runtimes_that_do_not_load(tmp_path):
    """A runtime that is installed and does not load is a problem with its remedy, which does not end the examination.

    onnxruntime-genai-winml does not ask for the package that has its ONNX Runtime.
    """
    (tmp_path / "openvino.py").write_text("raise ImportError('DLL load failed: no such module')")
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError('No module named onnxruntime')")
    for name, version in (("openvino", "1"), ("onnxruntime_genai", "2"), ("onnxruntime_genai_winml", "3")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    result = doctor(tmp_path, HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stderr) == (1, "Error: 2 problems found\n")
    assert result.stdout.splitlines()[1:5] == [
        "problem openvino: 1, which does not load (DLL load failed: no such module)",
        "        remedy: pip install it again; on Windows, install the Microsoft Visual C++ Redistributable, too",
        "problem onnxruntime: onnxruntime-genai 2, onnxruntime-genai-winml 3, which does not load (No module named "
        "onnxruntime)",
        "        remedy: pip install onnxruntime-windowsml",
    ]


def test_without_a_project(tmp_path, answering):
    """Outside a project only what an application needs is examined, and nothing is written."""
    result = doctor(tmp_path, HF_ENDPOINT=answering)
    assert (result.returncode, result.stderr) == (0, "")
    subjects = [line[8:].split(":")[0] for line in result.stdout.splitlines()]
    assert subjects == ["python", "openvino", "onnxruntime", "settings", "Hub"]
    assert list(tmp_path.iterdir()) == []
