"""A folder with one small validated artifact, for tests of publishing and pulling."""

import hashlib
import json
import multiprocessing
import os
import shutil

import numpy as np

from pipeline.check.fidelity import Distributions, write_distributions
from pipeline.check.reference import Answer, Continuation, LongContext, Reference
from pipeline.check.report import FIGURES
from pipeline.common import paths
from pipeline.common.files import building
from pipeline.common.manifest import HubOrigin, read_manifest, seal
from pipeline.release import publish, pull
from pipeline.release.registry import open_registry
from tests.helpers import ROOT
from tests.manifests import blob_manifest, variant_manifest

KILLED = 9  # exit code
MODEL, VARIANT = "tiny", "openvino-int4"
NAME = f"{MODEL}/{VARIANT}"
LOCAL = ("kl_mean_default", "time_to_first_token_s", "tokens_per_second", "load_time_s", "peak_memory_bytes")
METRICS = {name: 0.1 for name in FIGURES if name not in LOCAL}  # always in the same order
METRICS |= {"passed": True, "runtime": "openvino-genai", "device": "CPU"}
MEASURED = dict.fromkeys(LOCAL, 0.3) | {"device": "GPU", "machine": "a laptop, 4 cores"}
ANSWER = {"question": "Why?", "prompt_ids": [3, 2], "ids": [4, 1], "text": "So.", "stopped": True}
REFERENCE = Reference(
    texts=[],
    chats=[],
    eos_token_ids=[1],
    answers=[Answer(**ANSWER)],
    near_ties=[],
    continuations=[Continuation(category="facts", **ANSWER)],
    residual_peak=1,
    long_context=LongContext(ids=[], lengths=[]),
)


CONFIG = {
    "model_type": "phi3",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
}


def quiet(*arguments):
    """Ignore progress."""


def build(weights=b"weights"):
    """Build and validate an artifact with the given weights in the current directory."""
    shutil.copy(ROOT / "params.yaml", ".")  # it names the platforms whose blobs are published
    directory = paths.variant(MODEL, VARIANT)
    with building(directory) as target:
        write_ir(target)
        (target / "openvino_model.bin").write_bytes(weights)
        (target / "config.json").write_text(json.dumps(CONFIG))
        (target / "generation_config.json").write_text('{"pad_token_id": 0}')
        (target / "tokenizer.json").write_text("{}")
        source = HubOrigin(hub="microsoft/Phi-3-mini-4k-instruct", revision="f" * 40)
        seal(target, variant_manifest(NAME, source=source))
    validate()


def make_blob(platform, *, compiled=True, ir="weights"):
    """Build a blob's directory for `platform`; by its manifest it was compiled from an IR with the weights `ir`."""
    directory = paths.blob(paths.variant(MODEL, VARIANT), platform)
    manifest = read_manifest(paths.variant(MODEL, VARIANT))
    with building(directory) as target:
        if compiled:
            (target / "x.blob").write_text(f"blob for {platform}")
        hashes = {"openvino_model.bin": hashlib.sha256(ir.encode()).hexdigest()}
        reason = None if compiled else "the NPU compiler refused"
        seal(target, blob_manifest(manifest, platform, hashes=hashes, not_compiled=reason))
    return directory


def write_ir(directory):
    """Write an IR with the inputs and the output of a language model, but without weights, into `directory`."""
    from openvino import Model, Type, opset15, save_model

    types = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), Type.i64)
    inputs = [opset15.parameter([-1, -1], type, name=name) for name, type in types.items()]
    inputs.append(opset15.parameter([-1], Type.i32, name="beam_idx"))
    logits = opset15.convert(inputs[0], "f32", name="logits")
    for node in (*inputs, logits):
        node.output(0).set_names({node.friendly_name})
    result = opset15.result(logits, name="result")
    save_model(Model([result], inputs, "tiny"), directory / "openvino_model.xml", compress_to_fp16=False)


def validate(failures=(), variant=VARIANT):
    """Write the files that the stage validate would write."""
    manifest = (paths.variant(MODEL, variant) / "manifest.json").read_bytes()
    evidence = {"manifest_sha256": hashlib.sha256(manifest).hexdigest(), "failures": list(failures)}
    for path, content in (
        (paths.validation(MODEL, variant), evidence),
        (paths.metrics(MODEL, variant), METRICS),
        (paths.measured(MODEL, variant), MEASURED),
        (paths.reference(MODEL), REFERENCE.model_dump()),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    ids = np.tile(np.arange(40, dtype=np.int32), (2, 1))
    write_distributions(paths.distributions(MODEL), Distributions(ids, np.full((2, 41), -3.7, dtype=np.float32)))


def publish_version(version="1.0.0", registry=None, aliases=("latest",), key=None, variant=VARIANT):
    """Publish the artifact of the current directory, signed if a key is given."""
    return publish.publish(
        MODEL,
        variant,
        registry=registry or open_registry("dir:registry"),
        version=version,
        aliases=aliases,
        key=key,
        progress=quiet,
    )


def pull_latest(to=None, version="latest", key=None):
    """Pull into the cache, or `to`."""
    return pull.pull(open_registry("dir:registry"), NAME, version=version, to=to, key=key, progress=quiet)


def exit_codes(function, *arguments, processes):
    """Call `function` in several processes at the same time, and return their exit codes."""
    started = [multiprocessing.get_context("fork").Process(target=function, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def dies(registry, method, *, calls, after):
    """Let the process be killed when it calls `method` of `registry` for the n-th time, or after that call."""
    original, left = getattr(registry, method), [calls]

    def call(*arguments):
        left[0] -= 1
        if left[0] == 0 and not after:
            os._exit(KILLED)
        original(*arguments)
        if left[0] == 0:
            os._exit(KILLED)

    setattr(registry, method, call)
