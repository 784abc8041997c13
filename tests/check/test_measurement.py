"""What a machine lacks, a device or memory, is not held against a variant: here the FP16 IR of a tiny model."""

import numpy as np
import pytest

from pipeline.check import measurement, recording, validation
from pipeline.check.validation import validate
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits
from pipeline.common.files import building
from pipeline.common.manifest import Recipe, Runtime, seal
from pipeline.common.matrices import summary
from pipeline.common.params import OpenvinoFp16, load_params
from pipeline.convert.openvino import export_fp16
from pipeline.convert.openvino_format import read_matrices
from pipeline.convert.variant import asked
from pipeline.run.source_model import Torch
from tests.checkpoints import make_checkpoint
from tests.helpers import LIMITS, ROOT
from tests.manifests import variant_manifest

pytestmark = pytest.mark.slow
FP16 = OpenvinoFp16(stage="export_openvino", limits=LIMITS)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The arguments of `validate`; the model has clear preferences, and two reference prompts."""
    root, params = tmp_path_factory.mktemp("tiny"), load_params(ROOT / "params.yaml")
    checkpoint, directory = make_checkpoint(root / "source", on_grid=True), root / "openvino-fp16"
    config = read_json(checkpoint / "config.json")
    context = limits(config, directml=False)
    with building(directory) as build:
        export_fp16(checkpoint, build)
        recipe = Recipe(asked=asked(FP16, config), achieved=summary(read_matrices(build)))
        runtime = Runtime(requires={"openvino-genai": "2026.4.1.0"}, devices=["CPU"])
        seal(build, variant_manifest("tiny/openvino-fp16", recipe=recipe, context=context, runtime=runtime))
    short = params.model_copy(
        update={
            "validate_": params.validate_.model_copy(update={"prompts": ["Who are you?"], "max_new_tokens": 8}),
            "reference": params.reference.model_copy(update={"max_new_tokens": 6}),
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        prompts = recording.load_prompts("reference")[:2]
        patch.setattr(recording, "load_prompts", lambda name: prompts)
        patch.setattr(recording, "MIN_MARGIN", 0.0)
        reference, distributions = recording.record(
            Torch(checkpoint), directory, params=short, limits=context, eos_token_ids=[0, 1]
        )
    return {
        "directory": directory,
        "variant": FP16,
        "model": params.models["smol-phi3"],
        "source": checkpoint,
        "reference": reference,
        "distributions": distributions,
        "params": short.validate_,
    }


def test_a_device_that_is_not_here(case, capsys):
    """On a machine without the device of `validate.openvino_device` nothing is measured, which is told, and all figures
    that judge the variant are those of any other machine."""
    metrics, evidence, measured = validate(**case)
    assert (metrics["passed"], evidence["failures"], measured["device"]) == (True, [], "CPU")
    capsys.readouterr()
    elsewhere = case["params"].model_copy(update={"openvino_device": "GPU.7"})
    assert validate(**case | {"params": elsewhere}) == (metrics, evidence, {})
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "not measured" in line)
    assert told.startswith("not measured: Exception from ")
    assert "GPU" in told


@pytest.mark.parametrize("precision", ["default", "f32"])
def test_lack_of_memory(case, monkeypatch, precision):
    """When memory runs out, in measuring or in judging, there is no verdict: the stage ends and says so."""
    load_runtime = validation.load_runtime

    def load(*arguments, **options):
        if options.get("precision", "f32") == precision:
            raise RuntimeError("Exception from core.cpp:84:\nstd::bad_alloc\n")
        return load_runtime(*arguments, **options)

    monkeypatch.setattr(validation, "load_runtime", load)
    with pytest.raises(MemoryError, match="bad_alloc"):
        validate(**case)


def test_logits_that_are_not_finite(case, monkeypatch):
    """Logits that are no numbers fail, and neither a judging nor a measured figure is made of them."""

    class Nothing:
        def __init__(self, *_, **__):
            pass

        def logits(self, ids, *, last):
            return np.full((last, 320), np.nan, dtype=np.float32)

    monkeypatch.setattr(measurement, "OpenvinoLogits", Nothing)
    metrics, evidence, measured = validate(**case)
    assert metrics.keys() == {"passed", "size_bytes", "runtime", "device", "answer_recall"}
    assert evidence["failures"][0].startswith("check 'finite' failed")
    assert "kl_mean_default" not in measured
