"""The `phi3` command."""

import json
import sys

import pytest

import pipeline
from pipeline.common.params import json_schema
from tests.common.test_manifest import sealed  # noqa: F401
from tests.helpers import ROOT, edit_json, phi3, run


def test_verify(sealed):  # noqa: F811
    """`phi3 verify` says what it hashed; when a byte differs it names the fault and exits with status 1."""
    result = phi3("verify", sealed)
    assert (result.stdout, result.stderr) == ("m/v: 2 files, 0.0 MB, all as in the manifest\n", "")
    (sealed / "a.bin").write_text("hellO")
    result = phi3("verify", sealed, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        f"Error: {sealed}: a.bin has changed. Build or pull it again.\n",
    )


def test_into_a_pipe_of_windows(sealed):  # noqa: F811
    """A character that the code page of Windows lacks does not end a command whose output is redirected."""
    edit_json(sealed / "manifest.json", name="m/→")
    result = run(sys.executable, "-m", "pipeline.cli", "verify", sealed, cwd=ROOT, PYTHONIOENCODING="cp1252")
    assert (result.stdout, result.stderr) == ("m/?: 2 files, 0.0 MB, all as in the manifest\n", "")


def test_what_applications_import():
    """Every name that docs/registries.md gives to applications can be imported from `pipeline`."""
    assert {getattr(pipeline, name).__name__ for name in pipeline.__all__} == set(pipeline.__all__)
    page = (ROOT / "docs/registries.md").read_text("utf-8").split("## In an application")[1].split("\n## ")[0]
    assert [name for name in pipeline.__all__ if name not in page] == []
    assert not hasattr(pipeline, "pull_all")


def test_params():
    """`phi3 params` checks params.yaml and says what it builds, or prints the schema."""
    result = phi3("params", ROOT / "params.yaml")
    assert (result.stdout, result.stderr) == (
        "builds smol-phi3 as openvino-fp16, openvino-int4, npu-int4-channelwise, npu-int4-group128, "
        "onnx-directml-int4, onnx-cpu-int4\n",
        "",
    )
    assert json.loads(phi3("params", "--schema").stdout) == json_schema()


def test_a_light_installation(monkeypatch):
    """A command that needs the build environment says so where a package is missing."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.delitem(sys.modules, "pipeline.plan", raising=False)
    result = phi3("plan", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        "Error: psutil is not installed: this command needs the build environment, which `make repro` sets up.\n",
    )


@pytest.mark.parametrize(
    ("command", "module"),
    [(("plan",), "pipeline.plan"), (("build", "--scheduler", "x"), "pipeline.cluster.coordinator")],
)
def test_a_package_that_does_not_load(monkeypatch, tmp_path, command, module):
    """A command that needs a package of which a library is missing says so in one sentence."""
    for file in ("psutil", "distributed"):
        (tmp_path / f"{file}.py").write_text("raise ImportError('DLL load failed: the module could not be found.')")
        monkeypatch.delitem(sys.modules, file, raising=False)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    result = phi3(*command, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        "Error: a package does not load (DLL load failed: the module could not be found.): pip install it again; on "
        "Windows, install the Microsoft Visual C++ Redistributable, too.\n",
    )
