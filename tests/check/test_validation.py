"""Deliberately broken artifacts of smol-phi3 are each caught by the check that is meant to catch them."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.check.checks import CHECKS, check_answers, check_runtime
from pipeline.check.fidelity import Distributions, read_distributions
from pipeline.check.measurement import load_runtime
from pipeline.check.reference import read_reference
from pipeline.check.validation import check_files, departure, validate
from pipeline.common.checkpoint import read_json
from pipeline.common.manifest import read_manifest, seal
from pipeline.common.params import load_params
from pipeline.convert.openvino_format import REQUIRED
from tests.checkpoints import make_tokenizer
from tests.helpers import ROOT, edit

pytestmark = pytest.mark.slow
PARAMS = load_params(ROOT / "params.yaml")
MODEL = PARAMS.models["smol-phi3"]


@pytest.fixture
def artifact(smol_phi3, tmp_path):
    """A copy of smol-phi3's INT4 IR that a test may break."""
    return shutil.copytree(smol_phi3 / "openvino-int4", tmp_path / "openvino-int4", copy_function=shutil.copyfile)


def reseal(directory):
    """Give a broken artifact a manifest that fits its files, as a faulty build would."""
    manifest = read_manifest(directory)
    (directory / "manifest.json").unlink()
    seal(directory, manifest)


def file_failures(directory, smol_phi3, variant="openvino-int4"):
    """Return the failures of the checks on files alone."""
    return check_files(
        directory,
        variant=PARAMS.variants[variant],
        model=MODEL,
        source=smol_phi3 / "source",
        params=PARAMS.validate_,
    )


def runtime_failures(directory, smol_phi3):
    """Return the failures of the checks on the loaded artifact, by name."""
    runtime = load_runtime(directory, variant=PARAMS.variants["openvino-int4"])
    reference = read_reference(smol_phi3 / "reference.json")
    failures, answers = check_runtime(runtime, reference, max_new_tokens=PARAMS.validate_.max_new_tokens)
    if answers:
        failures += check_answers(answers, reference, params=PARAMS.validate_)
    return {failure.check: failure for failure in failures}


def validate_artifact(directory, smol_phi3):
    """Return metrics, evidence and measurements of the INT4 IR, compared at every 16th answer and all long prompts."""
    every = 16
    reference = read_reference(smol_phi3 / "reference.json")
    distributions = read_distributions(smol_phi3 / "reference.safetensors")
    ends = np.cumsum([len(answer.ids) for answer in reference.continuations])
    answers = [np.arange(ends[i] - len(c.ids), ends[i]) for i, c in enumerate(reference.continuations)]
    rows = np.concatenate([*answers[::every], np.arange(ends[-1], len(distributions.ids))])
    return validate(
        directory,
        variant=PARAMS.variants["openvino-int4"],
        model=MODEL,
        source=smol_phi3 / "source",
        reference=reference.model_copy(update={"continuations": reference.continuations[::every]}),
        distributions=Distributions(distributions.ids[rows], distributions.log_probs[rows]),
        params=PARAMS.validate_,
    )


def test_a_good_artifact(smol_phi3):
    """An unbroken artifact passes every check and is measured; figures that depend on the machine are kept apart."""
    metrics, evidence, measured = (
        read_json(smol_phi3 / kind / "openvino-int4.json") for kind in ("metrics", "validation", "measured")
    )
    assert (metrics["passed"], evidence["failures"], evidence["checks"]) == (True, [], list(CHECKS))
    assert 0 < metrics["kl_mean"] < PARAMS.variants["openvino-int4"].limits.kl_mean
    assert (metrics["runtime"], metrics["device"], metrics["answer_recall"]) == ("openvino-genai", "CPU", 1.0)
    times = {"load_time_s", "time_to_first_token_s", "tokens_per_second", "peak_memory_bytes"}
    assert measured.keys() == times | {"machine", "runtime", "device", "kl_mean_default"}
    assert all(measured[name] > 0 for name in times)
    assert metrics["kl_mean"] / 2 < measured["kl_mean_default"] < 2 * metrics["kl_mean"]
    assert evidence["optimum-intel"]["text"].strip() == "The capital of Japan is Tokyo."
    assert evidence["answers"][0] == {
        "question": "What is the capital of Japan?",
        "common_tokens": 8,
        "departs": False,
        "same": "The capital of Japan is Tokyo.",
        "differs": "",
        "rest": "",
    }


@pytest.mark.parametrize("honest", [False, True], ids=["deleted-later", "never-written"])
def test_detokenizer_deleted(artifact, smol_phi3, honest):
    """A missing detokenizer is found, whether the manifest lists it or not."""
    (artifact / "openvino_detokenizer.xml").unlink()
    if honest:
        reseal(artifact)
    (failure,) = file_failures(artifact, smol_phi3)
    assert failure.check == "files"
    assert "openvino_detokenizer.xml" in str(failure.actual)


def test_a_flipped_bit(artifact, smol_phi3):
    """One changed bit in the weights is found by its hash; OpenVINO would load it silently."""
    path = artifact / "openvino_model.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (failure,) = file_failures(artifact, smol_phi3)
    assert (failure.check, failure.expected) == ("files", "the files of the manifest")
    assert str(failure.actual).endswith("openvino_model.bin has changed. Build or pull it again.")


def test_tokenizer_swapped(artifact, smol_phi3):
    """The tokenizer of another model is found by the ids of the first text."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    models = convert_tokenizer(make_tokenizer(), with_detokenizer=True)
    for model, name in zip(models, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        openvino.save_model(model, artifact / name)
    reseal(artifact)
    assert file_failures(artifact, smol_phi3) == []
    failure = runtime_failures(artifact, smol_phi3)["tokenizer"]
    assert failure.expected["text"] == "Hello, world!"
    assert failure.actual != failure.expected["ids"]


def test_eos_removed(artifact, smol_phi3):
    """An artifact without its eos id, which would never stop, is found before it is asked anything."""
    for name in ("generation_config.json", "config.json"):
        content = json.loads((artifact / name).read_text())
        del content["eos_token_id"]
        (artifact / name).write_text(json.dumps(content))
    edit(artifact / "openvino_tokenizer.xml", '<eos_token_id value="2" />', "")
    reseal(artifact)
    failures = runtime_failures(artifact, smol_phi3)
    assert {name: (failure.expected, failure.actual) for name, failure in failures.items()} == {"eos": ([2], [-1])}


def test_a_model_that_does_not_load(artifact, smol_phi3):
    """An IR that the runtime cannot read is a failed check with the runtime's reason, not a traceback."""
    edit(artifact / "openvino_detokenizer.xml", "</net>", "")
    reseal(artifact)
    metrics, evidence, _ = validate_artifact(artifact, smol_phi3)
    assert metrics.keys() == {"passed", "size_bytes"}
    (failure,) = evidence["failures"]
    assert failure.startswith("check 'load' failed: expected \"a runtime that loads it\", got ")


def test_chat_template_changed(artifact, smol_phi3):
    """A chat template with another default system turn is found, since it renders differently."""
    edit(artifact / "openvino_tokenizer.xml", "You are a helpful AI assistant", "You are a pirate")
    reseal(artifact)
    failure = runtime_failures(artifact, smol_phi3)["chat-template"]
    assert failure.actual == failure.expected.replace("You are a helpful AI assistant", "You are a pirate")


def test_one_weight_block_zeroed(artifact, smol_phi3):
    """A block of weights that a faulty build left zero has the right size and hash, and is found by wrong answers."""
    path = artifact / "openvino_model.bin"
    with path.open("r+b") as stream:
        stream.seek(1_000_000)
        stream.write(bytes(4_000_000))
    reseal(artifact)
    assert file_failures(artifact, smol_phi3) == []
    assert runtime_failures(artifact, smol_phi3).keys() & {"answer", "loop", "stop", "empty"}


def test_a_small_weight_block_zeroed(artifact, smol_phi3, monkeypatch):
    """Damage too small to show in the answers fails the fidelity gate, with metric, limit and value."""
    monkeypatch.setattr("pipeline.check.long_context.choose", lambda context, most: [256])
    path = artifact / "openvino_model.bin"
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size * 2 // 3)
        stream.write(bytes(200_000))
    reseal(artifact)
    (artifact / ".DS_Store").write_bytes(bytes(6148))  # Finder's, and no part of the artifact
    metrics, evidence, _ = validate_artifact(artifact, smol_phi3)
    files = read_manifest(artifact).files.values()
    assert metrics["size_bytes"] == sum(file.size for file in files) + (artifact / "manifest.json").stat().st_size
    limit = PARAMS.variants["openvino-int4"].limits.kl_mean
    assert metrics["passed"] is False
    assert (
        f"check 'fidelity' failed: expected \"kl_mean at most {limit}\", got {metrics['kl_mean']}"
        in evidence["failures"]
    )
    assert not any("'answer'" in failure for failure in evidence["failures"])
    assert evidence["optimum-intel"]["text"].strip()  # the tutorials' way to load it was tried, too


def test_departure():
    """A text is split where its tokens leave the source's: the part before, the differing token, and the rest."""
    words = dict(enumerate(["The", "sky", "is", "blue", "and", "wide"]))

    def decode(ids):
        return " ".join(words[i] for i in ids)

    assert departure([0, 1, 2, 4, 5], [0, 1, 2, 3], decode) == {
        "common_tokens": 3,
        "departs": True,
        "same": "The sky is",
        "differs": " and",
        "rest": " wide",
    }
    assert departure([0, 1], [0, 1], decode)["departs"] is False


def test_recipe_lied_about(artifact, smol_phi3):
    """An IR with another group size or ratio than its variant's block asks for is found by reading it back."""
    claim, fault = file_failures(artifact, smol_phi3, variant="npu-int4-channelwise")[:2]
    assert (claim.check, claim.expected["asked"]["ratio"], claim.actual["asked"]["ratio"]) == ("recipe", 1.0, 0.6)
    assert fault.check == "recipe"
    assert fault.expected.startswith("int4-sym-channel for model.layers.")
    assert {f.check for f in file_failures(artifact, smol_phi3, variant="openvino-fp16")} == {"recipe", "size"}


def test_a_source_with_more_tensors(artifact, smol_phi3, tmp_path):
    """A variant needs the matrices of the architecture, not others that the source stores, such as a tied head."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(smol_phi3 / "source/config.json", source / "config.json")
    save_file({"lm_head.weight": torch.ones(49152, 576)}, source / "model.safetensors")
    variant, params = PARAMS.variants["openvino-int4"], PARAMS.validate_
    assert check_files(artifact, variant=variant, model=MODEL, source=source, params=params) == []


def test_a_manifest_that_lies(artifact, smol_phi3):
    """A manifest that claims another ratio than the built file holds is refused."""
    manifest = read_manifest(artifact)
    built = manifest.recipe.achieved.int4_ratio
    lie = manifest.recipe.achieved.model_copy(update={"int4_ratio": 0.6})
    (artifact / "manifest.json").unlink()
    seal(artifact, manifest.model_copy(update={"recipe": manifest.recipe.model_copy(update={"achieved": lie})}))
    (failure,) = file_failures(artifact, smol_phi3)
    ratios = [side["achieved"]["int4_ratio"] for side in (failure.expected, failure.actual)]
    assert (failure.check, ratios) == ("recipe", [built, 0.6])


def test_size(artifact, smol_phi3):
    """A weights' file that is 5 % too large fails, since it is outside the size that the recipe predicts."""
    weights = artifact / "openvino_model.bin"
    grown = weights.stat().st_size + 6_000_000
    with weights.open("ab") as stream:
        stream.write(bytes(6_000_000))
    reseal(artifact)
    (failure,) = file_failures(artifact, smol_phi3)
    assert (failure.check, failure.expected, failure.actual) == ("size", "104.7 MB ±3%", f"{grown / 1e6:.1f} MB")


def test_required_files_are_those_that_genai_reads():
    """All four tokenizer files are required, since optimum-intel can leave them out without an error."""
    assert {
        "openvino_tokenizer.xml",
        "openvino_tokenizer.bin",
        "openvino_detokenizer.xml",
        "openvino_detokenizer.bin",
    } <= set(REQUIRED)
