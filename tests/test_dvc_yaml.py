"""dvc.yaml names code, variants and libraries as they are, and DVC reads it as meant."""

import json

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.common.manifest import tool_versions
from pipeline.common.params import OnnxInt4, OpenvinoInt4, json_schema, load_params
from pipeline.convert.variant import TOOLS
from pipeline.dvc_yaml import LIBRARIES, render
from tests.helpers import ROOT, edit, phi3

STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
PARAMS = load_params(ROOT / "params.yaml")


def test_dvc_yaml_is_current():
    """dvc.yaml is what `phi3 params --write` writes: each stage depends on the modules that it imports."""
    assert (ROOT / "dvc.yaml").read_text("utf-8") == render(PARAMS, root=ROOT)


def test_a_new_variant_is_one_block(project, monkeypatch):
    """With a new block in params.yaml `phi3 params` asks for --write; then DVC builds, validates and compiles it."""
    monkeypatch.chdir(project)
    params = project / "params.yaml"
    phi3("params", "--write")  # the artifacts of this project's model
    phi3("params")
    block = params.read_text("utf-8").partition("  npu-int4-group128:\n")[2].partition("  onnx-directml-int4:\n")[0]
    edit(params, "  onnx-directml-int4:\n", f"  my-npu:\n{block}  onnx-directml-int4:\n")
    refused = phi3("params", check=False)
    assert (refused.returncode, refused.stderr) == (
        1,
        "Error: dvc.yaml does not fit params.yaml: run `phi3 params --write`.\n",
    )
    phi3("params", "--write")
    phi3("params")
    names = {stage.addressing for stage in Repo().index.stages}
    new = {"quantize_openvino@tiny-my-npu", "compile_npu@tiny-my-npu-4000", "validate@tiny-my-npu"}
    assert {name for name in names if "my-npu" in name} == new
    artifacts = YAML(typ="safe").load(project / "dvc.yaml")["artifacts"]
    assert artifacts["tiny-my-npu"]["path"] == "artifacts/tiny/my-npu"


def test_what_makes_calibrate_run_again(project):
    """calibrate watches one calibrated variant, so a new one does not run it again; if none is, it watches all."""

    def watched():
        stage = YAML(typ="safe").load(render(load_params(project / "params.yaml"), root=project))["stages"]["calibrate"]
        return [key for key in stage["params"] if key.startswith("variants.")]

    names = [name for name, variant in PARAMS.variants.items() if variant.calibrated]
    assert watched() == [f"variants.{names[0]}.calibrated"]
    edit(project / "params.yaml", "rotated: true", "rotated: false")
    edit(project / "params.yaml", "calibrated: true", "calibrated: false")
    assert watched() == [f"variants.{name}.calibrated" for name in names]


def test_a_matrix_over_a_mapping_has_its_keys():
    """DVC validates every key of the mapping `variants`, and compiles for every item of the list `npu_platforms`."""
    names = {stage.name for stage in Repo(ROOT).index.stages}
    validated = {name for name in names if name.startswith("validate@")}
    assert validated == {f"validate@{model}-{name}" for model in PARAMS.build for name in PARAMS.variants}
    compiled = {name for name in names if name.startswith("compile_npu@")}
    npu = [name for name, variant in PARAMS.variants.items() if variant.npu]
    assert compiled == {f"compile_npu@{model}-{name}-4000" for model in PARAMS.build for name in npu}


def test_every_stage_depends_on_the_libraries():
    """Every stage depends on libraries.lock, which locks all libraries that write or judge artifacts."""
    assert all(LIBRARIES in stage["deps"] for stage in STAGES.values())
    names = {line.split("==")[0].lower() for line in (ROOT / LIBRARIES).read_text("utf-8").splitlines()[1:]}
    assert names >= {tool for tools in TOOLS.values() for tool in tools} | set(tool_versions("openvino-genai"))
    assert (ROOT / "requirements.lock").read_text("utf-8").splitlines()[1] == f"-r {LIBRARIES}"


def test_every_stage_file_is_a_stage():
    """stages/ holds one file per stage and nothing else."""
    assert {path.stem for path in (ROOT / "stages").glob("[!_]*.py")} == set(STAGES)


def test_every_stage_has_a_description():
    """Each stage says in dvc.yaml what it does."""
    assert all(stage.get("desc") for stage in STAGES.values())


def test_variants_are_built_by_their_stage():
    """Each variant of params.yaml is in the matrix of the stage that its block names."""
    building = ("export_openvino", "quantize_openvino", "build_onnx")
    built = {variant: name for name in building for variant in STAGES[name]["matrix"]["variant"]}
    assert built == {name: variant.stage for name, variant in PARAMS.variants.items()}


@pytest.mark.parametrize("recipe", [OpenvinoInt4, OnnxInt4])
def test_params_spell_out_what_dvc_watches(recipe):
    """Every quantized variant's block in params.yaml has all keys, since DVC fails on a missing one, default or not."""
    blocks = YAML(typ="safe").load(ROOT / "params.yaml")["variants"]
    for name, variant in PARAMS.variants.items():
        if isinstance(variant, recipe):
            assert blocks[name].keys() >= recipe.model_fields.keys() - {"npu"}


def test_schema_is_current():
    """params.schema.json is what `phi3 params --schema` prints."""
    assert json.loads((ROOT / "params.schema.json").read_text("utf-8")) == json_schema()


def test_readme_table_of_stages():
    """The README's table of stages is generated from dvc.yaml."""
    table = "".join(f"| `{name}` | {stage['desc']} |\n" for name, stage in STAGES.items())
    assert f"| stage | what it does |\n| --- | --- |\n{table}" in (ROOT / "README.md").read_text("utf-8")
