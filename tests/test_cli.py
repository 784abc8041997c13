"""The `phi3` command."""

import json

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
