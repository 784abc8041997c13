"""A release of an OpenVINO variant loads in ONNX Runtime's OpenVINO execution provider, and in all others as before."""

import json
import os
import re
import subprocess
from pathlib import Path

import onnx
import pytest

from pipeline.chat import load_chat
from pipeline.common import paths
from pipeline.common.files import building, digest
from pipeline.common.manifest import Runtime, read_manifest, seal
from pipeline.common.paths import MANIFEST
from pipeline.release.openvino_ep import write_openvino_ep
from pipeline.release.pull import verify_release
from pipeline.release.registry import open_registry
from pipeline.run.openvino import F32, STATIC_ON_CPU, OpenvinoLogits, OptimumIntel
from tests.checkpoints import make_tokenizer
from tests.environments import python_of
from tests.helpers import ANSWER, QUESTION, ROOT, edit
from tests.manifests import variant_manifest
from tests.release_project import MODEL, NAME, VARIANT, build, make_blob, publish_version, pull_latest, validate

pytestmark = pytest.mark.usefixtures("release_folder")

# Parts of the page's program.
LIBRARY, INSTEAD = "openvino_ep.get_library_path()", '# config.set_provider_option("OpenVINO", "device_type", "GPU")'
NODE = """<
   ir_version: 10,
   opset_import: ["" : 21, "com.microsoft" : 1]
>
EP_Context_Model (int64[input_ids_0,input_ids_1] input_ids, int64[attention_mask_0,attention_mask_1] attention_mask, \
int64[position_ids_0,position_ids_1] position_ids, int32[beam_idx_0] beam_idx) => (float[logits_0,logits_1] logits) {
   [ContextNode] logits = com.microsoft.EPContext <embed_mode: int = 0, \
ep_cache_context: string = "openvino_model.xml", ep_sdk_version: string = "2026.4.1", main_context: int = 1, \
max_size: int = 0, source: string = "OpenVINOExecutionProvider"> (input_ids, attention_mask, position_ids, beam_idx)
}"""


def genai_config(options, longest):
    """Return what genai_config.json has for the tiny model."""
    return {
        "model": {
            "type": "phi3",
            "vocab_size": 320,
            "context_length": longest,
            "bos_token_id": 0,
            "eos_token_id": [1],
            "pad_token_id": 0,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{"OpenVINO": options}]},
                "filename": "openvino_model.onnx",
                "hidden_size": 128,
                "head_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": 2,
                "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")},
                "outputs": {"logits": "logits"},
            },
        },
        "search": {"max_length": longest},
    }


def test_a_release_has_node_and_config():
    """A release has one node with the IR's inputs and outputs, and a config for the CPU; the same artifact gives the
    same bytes."""
    release = publish_version()
    directory = pull_latest()
    assert onnx.printer.to_text(onnx.load(directory / "openvino_model.onnx")) == NODE
    onnx.checker.check_model(directory / "openvino_model.onnx")
    config = json.loads((directory / "genai_config.json").read_text())
    assert config == genai_config({"device_type": "CPU", "enable_causallm": "True"}, 512)
    build()
    assert publish_version(registry=open_registry("dir:another")) == release


def test_sampling_is_that_of_the_model(tmp_path):
    """The settings of generation_config.json that the runtime knows are taken over; without a padding token it is the
    first end token."""
    ir = paths.variant(MODEL, VARIANT)
    (ir / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.9, "use_cache": true}')
    manifest = variant_manifest(NAME, eos_token_ids=[7, 1])
    write_openvino_ep(tmp_path, ir, manifest, npu_lengths={})
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["search"] == {"max_length": 512, "do_sample": True, "top_p": 0.9}
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == ([7, 1], 7)


@pytest.mark.parametrize("with_blob", [False, True])
def test_an_npu_variant(with_blob):
    """The config of an NPU variant asks for the NPU and for the lengths that its blobs were asked for, else OpenVINO's;
    its context is no longer than both together, and no longer than the model's."""
    ir = paths.variant(MODEL, VARIANT)
    npu = Runtime(requires={"openvino-genai": "2026.4.1.0"}, devices=["NPU"])
    manifest = variant_manifest(NAME, runtime=npu, context={"max_position_embeddings": 600}, files={})
    (ir / MANIFEST).unlink()
    seal(ir, manifest)
    validate()
    if with_blob:
        make_blob("4000", compiled=False)
    else:
        edit(Path("params.yaml"), "npu_platforms: [4000]", "npu_platforms: []")
    publish_version()
    prompt, response = (256, 64) if with_blob else (1024, 128)
    lengths = f'{{"NPU": {{"MAX_PROMPT_LEN": "{prompt}", "MIN_RESPONSE_LEN": "{response}"}}}}'
    options = {"device_type": "NPU", "enable_causallm": "True", "load_config": lengths}
    config = json.loads((pull_latest() / "genai_config.json").read_text())
    assert config == genai_config(options, 320 if with_blob else 600)


def test_an_onnx_variant_stays_as_it_is():
    """A release of an ONNX variant has its own genai_config.json, the source's config.json, and no node."""
    directory = paths.variant(MODEL, VARIANT)
    with building(directory) as target:
        (target / "model.onnx").write_bytes(b"weights")
        (target / "genai_config.json").write_text('{"of": "the builder"}')
        make_tokenizer().save_pretrained(target)
        seal(target, variant_manifest(NAME, runtime=Runtime(requires={"onnxruntime-genai": "0.18.0"}, devices=["CPU"])))
    validate()
    release = publish_version()
    assert release.files["genai_config.json"] == read_manifest(directory).files["genai_config.json"]
    assert release.files["config.json"] == digest(paths.source(MODEL) / "config.json")
    assert "openvino_model.onnx" not in release.files


LOGITS = """
import json, sys
import numpy as np
import onnxruntime as ort

plugin, folder, ids, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
ort.register_execution_provider_library("openvino", plugin)
(device,) = (device for device in ort.get_ep_devices() if device.ep_name == "OpenVINOExecutionProvider")
settings = ort.SessionOptions()
settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
settings.add_provider_for_devices([device], {"load_config": json.dumps({"CPU": options})})
session = ort.InferenceSession(f"{folder}/openvino_model.onnx", settings)
tokens = np.array([ids])
inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(len(ids))[None]}
(logits,) = session.run(["logits"], inputs | {"beam_idx": np.zeros(1, np.int32)})
np.save(sys.argv[5], logits[0])
print([(value.name, value.type) for value in (*session.get_inputs(), *session.get_outputs())])
"""


@pytest.fixture(scope="module")
def python():
    """The Python of an environment with onnxruntime, onnxruntime-genai and the OpenVINO plugin."""
    return python_of("openvino-ep")


@pytest.fixture(scope="module")
def plugin(python, tmp_path_factory):
    """The OpenVINO plugin, which takes the CPU of this machine for one of Intel's."""
    target = tmp_path_factory.mktemp("plugin") / "libintel_cpu.so"
    compile_ = f"-m ziglang cc -target x86_64-linux-gnu -shared -fPIC -nostdlib -O1 -fno-sanitize=all -o {target}"
    source = Path(__file__).with_name("intel_cpu.c")
    subprocess.run([python, *compile_.split(), source], check=True)
    return target


def in_environment(python, *arguments):
    """Run Python there, with the plugin that intel_cpu.c passes on to, and return what it prints."""
    library = subprocess.run(
        [python, "-c", "import onnxruntime_ep_openvino as ep; print(ep.get_library_path())"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [python, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"OPENVINO_EP": library},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def directory(released):
    """A pulled IR with the files for ONNX Runtime, which no program changes."""
    directory = released("openvino-int4")
    yield directory
    assert verify_release(directory).files.keys() >= {"openvino_model.onnx", "genai_config.json"}


def snippet(model, folder):
    """Write the program of the page, with `model` for its model, into `folder`, and return its file.

    The page installs the versions that the tests have.
    """
    page = (ROOT / "docs/programs.md").read_text("utf-8").split("## ONNX Runtime's OpenVINO EP")[1]
    installed = (ROOT / "tests/environments/openvino-ep.txt").read_text("utf-8").split()
    assert set(re.search(r"^pip install (.*)$", page, re.MULTILINE)[1].split()) < set(installed)
    file = folder / "program.py"
    file.write_text(re.search(r"```py\n(.*?)```", page, re.DOTALL)[1])
    edit(file, "/tmp/model", str(model))
    return file


@pytest.mark.slow
def test_onnxruntime_genai(directory, python, plugin, tmp_path):
    """The page's program answers in onnxruntime-genai on the OpenVINO provider."""
    program = snippet(directory, tmp_path)
    edit(program, LIBRARY, repr(str(plugin)))
    assert in_environment(python, program) == ANSWER


@pytest.mark.slow
def test_onnxruntime(directory, python, plugin, tmp_path):
    """ONNX Runtime has the IR's inputs and outputs, and its logits are OpenVINO's own."""
    import numpy as np

    ids = list(range(100, 140))
    arguments = (plugin, directory, json.dumps(ids), json.dumps(F32), tmp_path / "logits.npy")
    assert in_environment(python, "-c", LOGITS, *arguments).strip() == str(
        [
            *[(name, "tensor(int64)") for name in ("input_ids", "attention_mask", "position_ids")],
            ("beam_idx", "tensor(int32)"),
            ("logits", "tensor(float)"),
        ]
    )
    expected = OpenvinoLogits(directory, device="CPU").logits(ids, last=len(ids))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-3)


@pytest.mark.slow
def test_openvino_genai(directory):
    """openvino-genai answers from the same folder."""
    import openvino_genai

    assert openvino_genai.LLMPipeline(directory, "CPU").generate(QUESTION, max_new_tokens=64) == ANSWER


@pytest.mark.slow
def test_optimum_intel(directory):
    """optimum-intel answers from the same folder."""
    optimum = OptimumIntel(directory, device="CPU")
    prompt = optimum.encode(optimum.render_chat([{"role": "user", "content": QUESTION}]))
    assert optimum.decode(optimum.generate(prompt, max_new_tokens=64).ids).startswith(ANSWER)


@pytest.mark.slow
def test_chat(directory):
    """`phi3 chat` answers from the same folder with openvino-genai, although the folder has an ONNX model, too."""
    chat, pieces = load_chat(directory), []
    chat.ask(QUESTION, on_text=pieces.append)
    assert ("".join(pieces), type(chat).__name__) == (ANSWER, "OpenvinoChat")


@pytest.mark.slow
def test_an_npu_variant_on_the_cpu(released, python, tmp_path):
    """The config of an NPU variant answers through the provider in OpenVINO's static pipeline for NPUs, which other
    options compile for the CPU. The program registers the plugin so that it offers NPUs which are not there."""
    directory = released("npu-int4-channelwise")
    config = json.loads((directory / "genai_config.json").read_text())
    (provider,) = config["model"]["decoder"]["session_options"]["provider_options"]
    lengths = json.loads(provider["OpenVINO"]["load_config"])["NPU"]
    assert lengths == {"MAX_PROMPT_LEN": "1024", "MIN_RESPONSE_LEN": "128"}  # as params.yaml says
    # The static pipeline computes as much for each prompt as for the longest.
    load_config = json.dumps({"NPU": lengths | STATIC_ON_CPU | {"MAX_PROMPT_LEN": "256"}})
    program = snippet(directory, tmp_path)
    edit(program, '("OpenVINOExecutionProvider"', '("OpenVINOExecutionProvider.virtual"')
    edit(program, INSTEAD, f"config.set_provider_option('OpenVINO', 'load_config', {load_config!r})")
    # In the default precision of some CPUs this variant says more after its answer.
    assert in_environment(python, program).startswith(ANSWER)
