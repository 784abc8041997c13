"""params.yaml is checked for types, and unknown keys are refused."""

import jsonschema
import pytest
from ruamel.yaml import YAML

from pipeline.common.errors import PipelineError
from pipeline.common.params import Npu, OpenvinoInt4, json_schema, load_params
from tests.helpers import ROOT

TEXT = (ROOT / "params.yaml").read_text("utf-8")


def refusal(tmp_path, old, new):
    """Return the message with which params.yaml is refused after replacing `old` by `new` once."""
    assert old in TEXT
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace(old, new, 1), "utf-8")
    with pytest.raises(PipelineError) as refused:
        load_params(path)
    return str(refused.value).replace(str(tmp_path) + "/", "")


def test_the_project_s_file():
    """The committed file is accepted, builds smol-phi3, pins every Hub model, and has the six variants."""
    params = load_params(ROOT / "params.yaml")
    assert params.build == ["smol-phi3"]
    assert {name for name, model in params.models.items() if model.source.hub} == {
        "phi-3-mini-4k-instruct",
        "phi-3-mini-128k-instruct",
        "phi-3-5-mini-instruct",
        "phi-4-mini-instruct",
    }
    assert all(len(model.source.hub.revision) == 40 for model in params.models.values() if model.source.hub)
    npu = params.get_variant("npu-int4-channelwise")
    assert npu == OpenvinoInt4(
        stage="quantize_openvino",
        limits=npu.limits,
        symmetric=True,
        group_size=-1,
        ratio=1.0,
        calibrated=True,
        rotated=True,
        npu=Npu(max_prompt_len=1024, min_response_len=128),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "build:",
            "buidl:",
            "params.yaml: unknown key 'buidl'; allowed here: build, models, variants, npu_platforms, ",
        ),
        (
            "ratio: 0.6",
            "ration: 0.6",
            "params.yaml: variants.openvino-int4: unknown key 'ration'; allowed here: stage, limits, symmetric, "
            "group_size, ratio, calibrated, rotated, npu.",
        ),
        (
            "ratio: 0.6",
            "ratio: 7",
            "params.yaml: variants.openvino-int4.ratio: 7 is not allowed: Input should be less than or equal to 1.",
        ),
        (
            "group_size: 128",
            "group_size: 100",
            "params.yaml: variants.openvino-int4.group_size: 100 is not allowed: Input should be -1, 32, 64, 128 or "
            "256.",
        ),
        (
            "symmetric: true",
            "symmetric: 1",
            "params.yaml: variants.openvino-int4.symmetric: 1 is not allowed: Input should be a valid boolean.",
        ),
        (
            "stage: build_onnx",
            "stage: onnx",
            "params.yaml: variants.onnx-directml-int4.stage: allowed are export_openvino, quantize_openvino and "
            "build_onnx.",
        ),
        (
            "    ratio: 1.0",
            "    ratio: 0.5",
            "params.yaml: variants.npu-int4-channelwise: the NPU takes symmetric: true, ratio: 1.0 and group_size: -1 "
            "or 128 only.",
        ),
        (
            "platforms: [4000]",
            "platforms: [4001]",
            "params.yaml: npu_platforms.0: 4001 is not allowed: Input should be 3720, 4000, 5010 or 5020.",
        ),
        (
            "weightless: true",
            "hints: {NPUW_DEVICES: CPU}",
            "params.yaml: variants.npu-int4-channelwise.npu: hints: NPUW_DEVICES is set by the pipeline: remove it.",
        ),
        (
            "    limits: {kl_mean: 0.072, kl_p99: 0.6, top1_agreement: 0.875, perplexity_ratio: 1.08}\n",
            "",
            "params.yaml: variants.onnx-cpu-int4.limits: is missing: add it.",
        ),
        (
            "calibrated: true\n    rotated: false",
            "calibrated: false\n    rotated: true",
            "params.yaml: variants.openvino-int4: rotated: true needs calibrated: true.",
        ),
        ("license: MIT", "", "params.yaml: models.phi-3-mini-4k-instruct.license: is missing: add it."),
        (
            "revision: f39ac1d28e925b323eae81227eaba4464caced4e",
            "revision: main",
            "params.yaml: models.phi-3-mini-4k-instruct.source.hub: revision 'main' can move: give the 40-digit "
            "commit, or set allow_branch: true.",
        ),
        (
            "revision: f39ac1d28e925b323eae81227eaba4464caced4e",
            "revision: main\n        allow_branch: true\n        trust_remote_code: true",
            "params.yaml: models.phi-3-mini-4k-instruct.source.hub: trust_remote_code: true needs a 40-digit commit as "
            "revision.",
        ),
        (
            "    source:\n      pypi:",
            "    source:\n      path: x\n      pypi:",
            "params.yaml: models.smol-phi3.source: give exactly one of hub, pypi and path.",
        ),
        ("build: [smol-phi3]", "build: [phi-2]", "params.yaml: build: 'phi-2' is not in models; there are smol-phi3, "),
        ("build: [smol-phi3]", "build: [smol-phi3, smol-phi3]", "params.yaml: build: every model once only."),
        ("  openvino-fp16:", "  source:", "params.yaml: models, variants: the name 'source' is taken by the pipeline"),
        (
            "  openvino-fp16:",
            "  fp16:",
            "params.yaml: variants: there must be openvino-fp16 with stage: export_openvino, from which others are "
            "made.",
        ),
        (
            "  smol-phi3:",
            "  Smol.phi3:",
            'params.yaml: models.Smol.phi3: "Smol.phi3" is not allowed: String should match',
        ),
        ("build:", "build: {", "params.yaml is not valid YAML: "),
        ("validate:", "build:", "params.yaml is not valid YAML: "),
        (
            "algorithm: rtn\n    symmetric: false\n    block_size: 32\n    calibrated: true\n    rotated: false\n    "
            "int8: []",
            "algorithm: default\n    symmetric: false\n    block_size: 32\n    int8: [last_matmul]",
            "params.yaml: variants.onnx-directml-int4: int8 needs algorithm: rtn or",
        ),
        (
            "algorithm: rtn\n    symmetric: false",
            "algorithm: k_quant\n    symmetric: true",
            "params.yaml: variants.onnx-directml-int4: k_quant always stores zero points: set symmetric: false, or",
        ),
        (
            "symmetric: false\n    block_size: 32",
            "symmetric: false\n    block_size: 128",
            "params.yaml: variants.onnx-directml-int4: the builder's rtn has block_size: 32 only; another size needs d",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, old, new, message):
    """Unknown, missing, mistyped and impossible values are refused, naming file, key and what is allowed."""
    sentence = refusal(tmp_path, old, new)
    assert sentence.startswith(message)
    assert "\n" not in sentence


def test_a_missing_file(tmp_path):
    """Outside the project's folder the message says where to go."""
    with pytest.raises(PipelineError, match=r"params\.yaml is missing: run this in the project's folder\."):
        load_params(tmp_path / "params.yaml")


def test_the_schema_accepts_the_file_and_refuses_a_typo():
    """The JSON Schema that editors use agrees with the loader."""
    content = YAML(typ="safe").load(TEXT)
    jsonschema.validate(content, json_schema())
    content["variants"]["openvino-int4"]["ration"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json_schema())


def test_an_unknown_variant():
    """A stage that is asked for an unknown variant names the known ones."""
    with pytest.raises(PipelineError, match="variants has no 'x'; there are openvino-fp16, openvino-int4, "):
        load_params(ROOT / "params.yaml").get_variant("x")
