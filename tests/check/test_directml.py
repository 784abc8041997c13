"""The DirectML variant runs on DirectML in software; tests of it are skipped unless `make directml` has set it up."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.check.checks import Failure
from pipeline.check.directml import wine
from pipeline.check.directml.operators import find_faults
from pipeline.check.directml.runtime import DEVICE, SHARE, Recorded, Request, check_directml, run
from pipeline.check.fidelity import distributions, divergence
from pipeline.check.reference import read_reference
from pipeline.common.errors import PipelineError
from pipeline.common.params import load_params
from pipeline.convert.onnx_format import CONFIG, MODEL
from pipeline.run.onnx import OnnxGenai
from tests.checkpoints import make_tokenizer
from tests.convert.test_conversion import undivided
from tests.helpers import LIMITS, ROOT, edit
from tests.release_project import REFERENCE

PARAMS = load_params(ROOT / "params.yaml")
VARIANT = "onnx-directml-int4"


def test_recorded():
    """Recorded logits are found by their ids, and the last rows asked for are returned."""
    logits = np.arange(6.0).reshape(3, 2)
    recorded = Recorded([Request([1, 2, 3], last=3)], [logits])
    np.testing.assert_array_equal(recorded.logits([1, 2, 3], last=2), logits[1:])


@pytest.mark.parametrize(
    ("system", "user", "reason"),
    [
        ("Windows", 0, "DirectML is run in software on Linux x86-64, not on Windows x86_64"),
        ("Linux", 1000, "DirectML in software needs a chroot, which only root can enter"),
    ],
)
def test_unavailable(monkeypatch, system, user, reason):
    """A machine that cannot run DirectML gets the reason in one sentence, with which `make directml` ends."""
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("os.geteuid", lambda: user)
    assert wine.unavailable() == reason
    with pytest.raises(PipelineError, match=reason):
        wine.install()


@pytest.mark.parametrize(("message", "memory"), [("CreateModel failed: no such operator", False), ("bad_alloc", True)])
def test_a_model_that_does_not_run(monkeypatch, message, memory):
    """A model that DirectML refuses is a failure with the reason; lack of memory is no fault of the model."""

    def refuse(directory, requests):
        raise PipelineError(message)

    monkeypatch.setattr(wine, "unavailable", lambda: None)
    monkeypatch.setattr("pipeline.check.directml.runtime.run", refuse)
    case = {"cpu": None, "reference": REFERENCE, "limits": LIMITS, "params": PARAMS.validate_}
    if memory:
        with pytest.raises(MemoryError, match="bad_alloc"):
            check_directml(Path("x"), **case)
    else:
        failure = Failure("directml", "a model that onnxruntime-genai runs on DirectML as a whole", message)
        assert check_directml(Path("x"), **case) == ([failure], {"device": DEVICE})


@pytest.mark.parametrize(
    ("factor", "said", "found"),
    [
        (1, "the water", []),
        (0, "the water", [Failure("directml", "a mean KL divergence from the CPU provider of at most 0.1", 2.2039)]),
        (np.nan, "the water", [Failure("directml", "finite logits", "600 logits that are not")]),
        (1, "Paris", [Failure("directml", {"question": "Why?", "answer": "the water"}, "Paris")]),
    ],
    ids=["right", "other-logits", "no-numbers", "another-answer"],
)
def test_what_directml_computes(monkeypatch, tmp_path, factor, said, found):
    """Logits that are not finite or far from those of the CPU provider, and an answer that says something else than the
    source's, are failures; what ran is recorded."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    first, prompt = REFERENCE.answers[0], REFERENCE.continuations[0]
    reference = REFERENCE.model_copy(update={"answers": [first.model_copy(update={"text": "the water"})]})
    ids = prompt.prompt_ids + prompt.ids[:-1]
    logits = 30 * np.random.default_rng(0).random((len(prompt.ids), 300), dtype=np.float32)
    monkeypatch.setattr(wine, "unavailable", lambda: None)
    monkeypatch.setattr(
        "pipeline.check.directml.runtime.run",
        lambda directory, requests: ([factor * logits, logits[:1]], [[], [*tokenizer.encode(said), 1]]),
    )
    cpu = Recorded([Request(ids, last=len(prompt.ids))], [logits])
    options = {"limits": LIMITS, "params": PARAMS.validate_}
    failures, ran = check_directml(tmp_path, cpu=cpu, reference=reference, **options)
    assert failures == found
    assert ran == {"device": DEVICE, "runtime": "onnxruntime-genai", "prompts": 1, "tokens": 2}


def copy(smol_phi3, tmp_path):
    """Return a copy of the DirectML variant that a test may break."""
    shutil.copytree(smol_phi3 / VARIANT, tmp_path / VARIANT, copy_function=shutil.copyfile)
    return tmp_path / VARIANT


def distance(logits, directory, ids):
    """Return the mean KL divergence of `logits` from those of the model in `directory` on the CPU provider."""
    return divergence(logits, distributions(OnnxGenai(directory).logits(ids, last=len(logits)))).mean()


needs_directml = pytest.mark.skipif(wine.unavailable() is not None, reason=f"{wine.unavailable()}")


@pytest.mark.slow
@needs_directml
def test_the_build_ran_on_directml(smol_phi3):
    """`dvc repro` has compared the variant on DirectML with the CPU provider, and asked it the first question."""
    metrics = json.loads((smol_phi3 / f"metrics/{VARIANT}.json").read_text())
    measured = json.loads((smol_phi3 / f"measured/{VARIANT}.json").read_text())["directml"]
    if measured["device"] is None:
        pytest.skip(
            f"DirectML was set up after the build: `dvc repro -f -s validate@smol-phi3-{VARIANT}` runs it there"
        )
    assert (metrics["passed"], measured["device"], measured["prompts"]) == (True, DEVICE, 2)


@pytest.mark.slow
@needs_directml
def test_runs_on_directml(smol_phi3, tmp_path):
    """On DirectML the logits are those of the CPU provider, and the answer begins as the source's; each further token
    takes five seconds. The model's config names tokens for tool calls, as Phi-4-mini's does."""
    directory = copy(smol_phi3, tmp_path)
    edit(directory / CONFIG, '"model": {', '"model": {"bot_token_id": 5, "eot_token_id": 6,')
    first = read_reference(smol_phi3 / "reference.json").answers[0]
    logits, tokens = run(directory, [Request(first.prompt_ids, last=8, max_new_tokens=2)])
    assert tokens == [first.ids[:2]]
    assert distance(logits[0], directory, first.prompt_ids) < SHARE * PARAMS.variants[VARIANT].limits.kl_mean


@pytest.mark.slow
@needs_directml
def test_an_undivided_stream_overflows(smol_phi3, tmp_path):
    """If the residual stream is not divided, the logits on DirectML are far from those of the CPU provider."""
    directory = copy(smol_phi3, tmp_path)
    model = undivided(onnx.load(directory / MODEL[0]))
    (directory / MODEL[1]).unlink()
    onnx.save(model, directory / MODEL[0], save_as_external_data=True, location=MODEL[1])
    ids = read_reference(smol_phi3 / "reference.json").answers[0].prompt_ids
    logits, _ = run(directory, [Request(ids, last=8)])
    assert not distance(logits[0], directory, ids) < 1


@pytest.mark.slow
@needs_directml
def test_an_operator_that_directml_lacks(smol_phi3, tmp_path):
    """A graph with GatherBlockQuantized, which the CPU provider runs, is refused, and so is any fallback to the CPU."""
    directory = copy(smol_phi3, tmp_path)
    model = onnx.load(directory / MODEL[0], load_external_data=False)
    (gather,) = (node for node in model.graph.node if node.name == "/model/embed_tokens/Gather")
    rows, columns = 49152, 576
    tables = {"codes": np.zeros((rows, columns), np.uint8), "scales": np.zeros((rows, columns // 32), np.float16)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(table, name) for name, table in tables.items())
    attributes = {"bits": 8, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    gather.CopyFrom(
        onnx.helper.make_node(
            "GatherBlockQuantized",
            ["codes", "input_ids", "scales"],
            gather.output,
            name=gather.name,
            domain="com.microsoft",
            **attributes,
        )
    )
    onnx.save(model, directory / MODEL[0])
    assert find_faults(directory / MODEL[0]) == [f"{gather.name}: GatherBlockQuantized is not registered for DirectML"]
    assert OnnxGenai(directory).logits([1, 2, 3], last=1).shape == (1, rows)
    with pytest.raises(PipelineError, match=r"CreateModel failed: .*"):
        run(directory, [Request([1, 2, 3], last=1)])
