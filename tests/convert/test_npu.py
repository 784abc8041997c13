"""NPU blobs: the NPU's rules, the compiler's reasons, real binaries that are read back, and the pipeline on the CPU."""

import json
import sys

import numpy as np
import pytest
from scipy.special import log_softmax

from pipeline.check.reference import read_reference
from pipeline.common.errors import PipelineError
from pipeline.common.files import building
from pipeline.common.manifest import read_manifest, seal, verify
from pipeline.common.params import OWN_PROPERTIES, Npu
from pipeline.convert.npu import compiler
from pipeline.convert.npu.blob import read_blob
from pipeline.convert.npu.build import build_blob
from pipeline.run.blobs import choose
from pipeline.run.openvino import F32, OpenvinoLogits, model_inputs
from tests.helpers import ROOT, run
from tests.manifests import recipe, variant_manifest

NPU = Npu(max_prompt_len=256, min_response_len=64)
VARIANT = "npu-int4-channelwise"
REFUSAL = r"""openvino 2026.4.1-22982-e213a147257-releases/2026/4
[ERROR] 12:45:02.815 [vpux-compiler] UnrollPermuteDMA Pass failed : The size of sub output shape [256, 64] is not 3
[ERROR] 12:45:02.816 [vpux-compiler] Failed Pass UnrollPermuteDMA on Operation loc(fused<{name = "main"}>["main"])
compiling failed: Exception from src\inference\src\cpp\core.cpp:135:
Exception from src\plugins\intel_npu\src\compiler_adapter\src\compiler_impl.cpp:323:
Compilation failed. vclAllocatedExecutableCreate4 result: 0x78000004 - [NPU_VCL] Compiler returned msg:
Compilation failed


"""
# This program loads a model as an application does, and answers a question and prompts of the given lengths.
ASK = """
import json, sys, numpy, openvino, openvino_genai
directory, options, lengths = json.loads(sys.argv[1])
pipeline = openvino_genai.LLMPipeline(directory, "NPU", NPU_USE_NPUW="YES", NPUW_DEVICES="CPU", **options)
texts = [pipeline.generate("What is the capital of Japan?", max_new_tokens=40)]
for length in lengths:
    ids = numpy.full((1, length), 260, dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    try:
        texts.append(len(pipeline.generate(inputs, max_new_tokens=2, ignore_eos=True).tokens[0]))
    except RuntimeError as error:
        texts.append(str(error).strip().splitlines()[-1])
print(json.dumps(texts))
"""


def manifest(**fields):
    """Return a manifest of an NPU variant's IR, with `fields` changed."""
    return variant_manifest(f"m/{VARIANT}", **{"context": {"max_position_embeddings": 4096}} | fields)


def test_lint_takes_what_the_npu_takes():
    """A symmetric, channel-wise IR that is INT4 throughout passes."""
    compiler.lint(manifest(), NPU)


@pytest.mark.parametrize(
    ("asked", "achieved", "context", "reason"),
    [
        ({"symmetric": False, "group_size": -1}, 1.0, 4096, "its INT4 weights must be symmetric"),
        ({"symmetric": True, "group_size": -1}, 0.6, 4096, "all layers must be INT4, ratio 1.0, and 0.6 are"),
        ({"symmetric": True, "group_size": 64}, 1.0, 4096, "group size must be -1 or 128, not 64"),
        (
            {"symmetric": True, "group_size": 128},
            1.0,
            256,
            "max_prompt_len + min_response_len is 320, beyond the model's context of 256",
        ),
    ],
)
def test_lint_refuses(asked, achieved, context, reason):
    """Each rule of the NPU that an IR breaks is named before any compilation."""
    with pytest.raises(PipelineError) as error:
        compiler.lint(manifest(recipe=recipe(asked, achieved), context={"max_position_embeddings": context}), NPU)
    assert str(error.value) == (
        f"m/{VARIANT} cannot be compiled for the NPU: {reason}: correct its block in params.yaml."
    )


def test_params_refuse_as_hints_what_the_pipeline_sets():
    """The hints that params refuse are the NPUW properties that a compilation sets itself."""
    assert {
        key for key in compiler.properties(NPU, platform="4000", bank="x") if key.startswith("NPUW_")
    } == OWN_PROPERTIES


def test_reason_of_a_refusal():
    """A compiler's output is shortened to the lines that matter, without time stamps and C++ files."""
    assert compiler.reason_of(REFUSAL) == (
        "[vpux-compiler] UnrollPermuteDMA Pass failed : The size of sub output shape [256, 64] is not 3 / "
        '[vpux-compiler] Failed Pass UnrollPermuteDMA on Operation loc(fused<{name = "main"}>["main"]) / '
        "Compilation failed. vclAllocatedExecutableCreate4 result: 0x78000004 - [NPU_VCL] Compiler returned msg:"
    )
    assert compiler.reason_of("") == "it gave no reason"


def test_a_file_that_is_no_blob(tmp_path):
    """A file of another kind, or an export without an NPU binary, is refused as an NPU blob."""
    path = tmp_path / "x.blob"
    path.write_bytes(b"hello")
    with pytest.raises(PipelineError, match="is not a blob that OpenVINO's NPUW exported"):
        read_blob(path)
    path.write_bytes(b"\x13\x37npuwLLMCMO" + bytes(100))
    with pytest.raises(PipelineError, match="should hold NPU binaries of one kind, it has none"):
        read_blob(path)


def properties_for_the_cpu(params):
    """Return the properties of a compilation with the subgraphs for the CPU, which needs no NPU compiler."""
    own = compiler.properties(params, platform="", bank="test") | {"NPUW_DEVICES": "CPU"}
    return {name: value for name, value in own.items() if name not in ("NPU_PLATFORM", "NPU_COMPILER_TYPE")}


@pytest.fixture
def ir(tmp_path, monkeypatch):
    """The directory of an NPU variant in the current folder; its files have no real content."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiler, "has_native_compiler", lambda: False)
    with building(tmp_path / "artifacts/m" / VARIANT) as build:
        for suffix in ("xml", "bin"):
            (build / f"openvino_model.{suffix}").write_text("no IR")
        seal(build, manifest())
    return tmp_path / "artifacts/m" / VARIANT


def test_a_compiler_that_cannot_be_fetched(ir, monkeypatch):
    """Without a network the stage fails and leaves no directory, so that the next `dvc repro` tries again."""

    def install():
        raise PipelineError("pip failed: no network.")

    monkeypatch.setattr(compiler.wine, "unavailable", lambda: None)
    monkeypatch.setattr(compiler.wine, "install", install)
    with pytest.raises(PipelineError, match=r"^pip failed: no network\.$"):
        build_blob("m", VARIANT, "4000", params=NPU)
    assert list((ir.parent / "blobs").iterdir()) == []


def test_no_compiler(ir, monkeypatch, capsys):
    """Where there is no compiler, the directory has a manifest with the reason, which is shown with what to do."""
    monkeypatch.setattr(compiler.wine, "unavailable", lambda: "there is no Wine: install it")
    reason = (
        "no NPU compiler here: there is no Wine: install it, and run this cell again with `dvc repro --force "
        "--single-item`"
    )
    assert build_blob("m", VARIANT, "4000", params=NPU).not_compiled == reason
    assert capsys.readouterr().out == f"not compiled: {reason}\n"
    directory = ir.parent / "blobs" / f"{VARIANT}-4000"
    assert [path.name for path in directory.iterdir()] == ["manifest.json"]
    assert verify(directory).not_compiled == reason


@pytest.mark.slow
@pytest.mark.parametrize("name", [VARIANT, "npu-int4-group128"])
def test_the_blobs_of_smol_phi3(smol_phi3, name):
    """`dvc repro` makes blobs with NPU 4000 binaries and describes them."""
    directory = smol_phi3 / "blobs" / f"{name}-4000"
    built = verify(directory)
    if built.not_compiled:
        pytest.skip(built.not_compiled)
    assert list(built.files) == ["openvino_model-npu4000-2026.4.1-p1024.blob"]
    blob = read_blob(directory / "openvino_model-npu4000-2026.4.1-p1024.blob")
    assert (blob.openvino, blob.platform, blob.images > 1) == ("2026.4.1", "4000", True)
    assert blob.compatibility.startswith(f"compiler={blob.compiler};npu=4000;")
    assert built.recipe.achieved == blob
    ir = read_manifest(smol_phi3 / name)
    assert built.source.files == {file: ir.files[file].sha256 for file in ("openvino_model.xml", "openvino_model.bin")}
    assert (
        choose(smol_phi3 / name, architecture="4000", openvino="2026.4.1").options["BLOB_PATH"].endswith("p1024.blob")
    )


@pytest.mark.slow
def test_a_refused_model_is_not_compiled(smol_phi3, project, monkeypatch, capfd):
    """When the compiler refuses smol-phi3 on 3720, its reason is shown and kept and no blob is left; with
    `required` the refusal is an error."""
    if (reason := compiler.wine.unavailable()) and not compiler.has_native_compiler():
        pytest.skip(reason)
    monkeypatch.chdir(project)
    (project / "artifacts").mkdir(exist_ok=True)
    target = project / "artifacts/smol-phi3"
    target.mkdir()
    (target / VARIANT).symlink_to(smol_phi3 / VARIANT)
    built = build_blob("smol-phi3", VARIANT, "3720", params=NPU)
    assert "UnrollPermuteDMA Pass failed" in built.not_compiled
    shown = capfd.readouterr().out
    assert "compiler_impl.cpp" in shown
    assert shown.endswith(f"not compiled: {built.not_compiled}\n")
    assert [path.name for path in (target / "blobs" / f"{VARIANT}-3720").iterdir()] == ["manifest.json"]
    required = NPU.model_copy(update={"required": True})
    with pytest.raises(PipelineError, match="UnrollPermuteDMA"):
        build_blob("smol-phi3", VARIANT, "3720", params=required)


def ask(directory, options, *lengths):
    """Return what ASK prints."""
    return json.loads(run(sys.executable, "-c", ASK, json.dumps([str(directory), options, lengths]), cwd=ROOT).stdout)


@pytest.fixture(scope="module")
def said(smol_phi3):
    """The answer of the IR in the static pipeline."""
    return ask(smol_phi3 / VARIANT, {"MAX_PROMPT_LEN": 256, "MIN_RESPONSE_LEN": 64})[0]


@pytest.mark.slow
@pytest.mark.parametrize("weightless", [True, False])
def test_a_blob_compiled_for_the_cpu_answers_as_its_ir(smol_phi3, said, tmp_path, monkeypatch, weightless):
    """A blob with subgraphs compiled for the CPU, imported in a new process, gives its IR's answer; it takes prompts up
    to max_prompt_len and refuses longer ones."""
    params = NPU.model_copy(update={"weightless": weightless})
    directory, blob = smol_phi3 / VARIANT, tmp_path / "cpu.blob"
    monkeypatch.setattr(compiler, "has_native_compiler", lambda: True)
    compiler.compile_blob(directory / "openvino_model.xml", blob, properties=properties_for_the_cpu(params))
    with pytest.raises(PipelineError, match="it has none: it is no NPU blob"):
        read_blob(blob)
    options = {"BLOB_PATH": str(blob)} | ({"WEIGHTS_PATH": str(directory / "openvino_model.bin")} if weightless else {})
    answer, below, limit, above = ask(directory, options, 255, 256, 257)
    assert answer == said
    assert "Tokyo" in answer
    assert (below, limit) == (2, 2)
    assert above.strip() == 'Set the "MAX_PROMPT_LEN" config option to increase the limit.'


@pytest.mark.slow
def test_the_static_pipeline_computes_what_the_ir_does(smol_phi3):
    """The NPU's static pipeline gives only the logits of a prompt's last token; they equal those of the plain CPU, with
    which fidelity is measured."""
    import openvino

    directory = smol_phi3 / VARIANT
    static = openvino.Core().compile_model(directory / "openvino_model.xml", "NPU", properties_for_the_cpu(NPU) | F32)
    request, plain = static.create_infer_request(), OpenvinoLogits(directory, device="CPU")
    short = [
        answer for answer in read_reference(smol_phi3 / "reference.json").continuations if len(answer.prompt_ids) < 250
    ]
    for answer in short[::24]:
        request.reset_state()
        inputs = model_inputs(answer.prompt_ids)
        logits = np.array(request.infer(inputs)["logits"][0, -1:], dtype=np.float64)
        p, q = (log_softmax(x, axis=1) for x in (plain.logits(answer.prompt_ids, last=1).astype(float), logits))
        assert (np.exp(p) * (p - q)).sum() < 1e-4
