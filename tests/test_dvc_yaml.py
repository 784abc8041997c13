"""dvc.yaml, stages/, params.yaml, the schema and the README say the same."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.artifact import TOOLS
from pipeline.manifest import tool_versions
from pipeline.params import Npu, OpenvinoInt4, json_schema, load_params
from tests.conftest import ROOT
from tests.test_imports import imported_names

CONTENT = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES = CONTENT["stages"]
# These modules cannot change the output of a stage: they hold messages, paths, processes and the reading of params,
# whose values DVC watches. A change in them reruns nothing.
UNWATCHED = tuple(
    f"pipeline.{name}" for name in ("errors", "memory", "params", "paths", "plan", "process", "programs", "progress")
)
LIBRARIES = "libraries.lock"


def imported_modules(file: Path, seen: set[Path]) -> set[Path]:
    """Add to `seen` the project's modules that `file` imports, directly or not."""
    for name in imported_names(file):
        path = ROOT / name.replace(".", "/")
        for module in (path.with_suffix(".py"), path / "__init__.py"):
            if name.startswith("pipeline.") and name not in UNWATCHED and module.exists() and module not in seen:
                seen.add(module)
                imported_modules(module, seen)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_code_it_runs(stage):
    """dvc.yaml lists, for each stage, the file of the same name and exactly the modules that it imports."""
    modules = imported_modules(ROOT / f"stages/{stage}.py", {ROOT / f"stages/{stage}.py"})
    listed = [dependency for dependency in STAGES[stage]["deps"] if dependency.endswith(".py")]
    assert listed == sorted(path.relative_to(ROOT).as_posix() for path in modules)


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


def test_variants_are_built_by_their_stage_and_validated():
    """The variants of params.yaml are those that dvc.yaml builds, each in the stage its block names, and validates."""
    variants = load_params(ROOT / "params.yaml").variants
    built = {
        variant: name
        for name in STAGES
        for variant in STAGES[name]["matrix"].get("variant", [])
        if name not in ("validate", "compile_npu")
    }
    assert built == {name: variant.stage for name, variant in variants.items()}
    assert STAGES["validate"]["matrix"]["variant"] == list(variants)


def test_npu_variants_are_compiled_for_every_platform_that_params_take():
    """compile_npu runs for all variants with an npu block and all platforms; quantize_openvino ignores that block."""
    variants = load_params(ROOT / "params.yaml").variants
    matrix = STAGES["compile_npu"]["matrix"]
    assert matrix["variant"] == [name for name, variant in variants.items() if getattr(variant, "npu", None)]
    accepted = Npu.model_fields["platforms"].annotation.__args__[0].__args__
    assert matrix["platform"] == [str(platform) for platform in accepted]
    listed = {key.rsplit(".", 1)[-1] for key in STAGES["quantize_openvino"]["params"] if key.startswith("variants.")}
    assert listed == OpenvinoInt4.model_fields.keys() - {"npu"}


def test_params_spell_out_what_dvc_watches():
    """Every quantized IR's block in params.yaml has all keys, since DVC fails on a missing one, default or not."""
    blocks = YAML(typ="safe").load(ROOT / "params.yaml")["variants"]
    for name in STAGES["quantize_openvino"]["matrix"]["variant"]:
        assert blocks[name].keys() >= OpenvinoInt4.model_fields.keys() - {"npu"}


def test_every_variant_is_an_artifact_for_dvc():
    """Each variant of the embedded model has a name for `gto register` and `dvc artifacts get`."""
    variants = load_params(ROOT / "params.yaml").variants
    paths = {name: block["path"] for name, block in CONTENT["artifacts"].items()}
    assert paths == {f"smol-phi3-{name}": f"artifacts/smol-phi3/{name}" for name in variants}


def test_schema_is_current():
    """params.schema.json is what `phi3 params --schema` prints."""
    assert json.loads((ROOT / "params.schema.json").read_text("utf-8")) == json_schema()


def test_readme_table_of_stages():
    """The README's table of stages is generated from dvc.yaml."""
    table = "".join(f"| `{name}` | {stage['desc']} |\n" for name, stage in STAGES.items())
    assert f"| stage | what it does |\n| --- | --- |\n{table}" in (ROOT / "README.md").read_text("utf-8")


def test_calibrate_knows_whether_anything_is_calibrated():
    """The stage calibrate watches the key `calibrated` of each variant, since it has nothing to do without any."""
    listed = [key for key in STAGES["calibrate"]["params"] if key.startswith("variants.")]
    quantized = [
        variant for name in ("quantize_openvino", "build_onnx") for variant in STAGES[name]["matrix"]["variant"]
    ]
    assert listed == [f"variants.{variant}.calibrated" for variant in quantized]
