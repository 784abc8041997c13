"""The `phi3` command."""

import json
import sys

from click.testing import CliRunner

from pipeline.cli import main
from pipeline.common.params import json_schema
from tests.common.test_manifest import sealed  # noqa: F401
from tests.conftest import ROOT


def test_verify(sealed):  # noqa: F811
    """`phi3 verify` says what it hashed; when a byte differs it names the fault and exits with status 1."""
    result = CliRunner().invoke(main, ["verify", str(sealed)])
    assert (result.exit_code, result.output) == (0, "m/v: 2 files, 0.0 MB, all as in the manifest\n")
    (sealed / "a.bin").write_text("hellO")
    result = CliRunner().invoke(main, ["verify", str(sealed)])
    assert (result.exit_code, result.output) == (
        1,
        f"Error: {sealed}: a.bin has changed. Build or pull it again.\n",
    )


def test_params():
    """`phi3 params` checks params.yaml and says what it builds, or prints the schema."""
    result = CliRunner().invoke(main, ["params", str(ROOT / "params.yaml")])
    assert (result.exit_code, result.output) == (
        0,
        "builds smol-phi3 as openvino-fp16, openvino-int4, npu-int4-channelwise, npu-int4-group128, "
        "onnx-directml-int4, onnx-cpu-int4\n",
    )
    assert json.loads(CliRunner().invoke(main, ["params", "--schema"]).output) == json_schema()


def test_a_light_installation(monkeypatch):
    """A command that needs the build environment says so where a package is missing."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.delitem(sys.modules, "pipeline.plan", raising=False)
    result = CliRunner().invoke(main, ["plan"])
    assert (result.exit_code, result.output) == (
        1,
        "Error: psutil is not installed: this command needs the build environment, which `make repro` sets up.\n",
    )
