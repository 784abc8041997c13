"""The example applications and `phi3 check` run with only the base install and the runtimes."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from pipeline.common.manifest import VariantManifest, read_manifest
from pipeline.release.documents import card
from tests.environments import pip, pip_install
from tests.helpers import ANSWER, QUESTION, ROOT, run
from tests.oci_registry_server import OciRegistryServer
from tests.test_device_check import COMPARED, FIGURES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def oci(tmp_path_factory):
    """An empty OCI registry."""
    with OciRegistryServer(tmp_path_factory.mktemp("oci") / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with only phi3-pipeline's base install and the examples' requirements."""
    directory = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(directory)
    python = directory / "bin/python"
    requirements = [part for file in sorted((ROOT / "examples").glob("*/requirements.txt")) for part in ("-r", file)]
    project = shutil.copytree(ROOT / "pipeline", tmp_path_factory.mktemp("project") / "pipeline").parent
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    pip_install(python, project, *requirements)
    return python


def chat(python: Path, example: str, url: str, folder: Path, **environment: str) -> str:
    """Run the example without the project's folder on its path, and return what it prints."""
    program = ROOT / "examples" / example / "chat.py"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PHI3_CACHE": str(folder / "cache")} | environment
    result = subprocess.run(
        [python, program, url, QUESTION], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def publish(example: str, url: str, **environment: str) -> None:
    """Publish the artifact that the example pulls."""
    program = ROOT / "examples" / example / "chat.py"
    name = re.search(r'MODEL = "(.+)"', program.read_text("utf-8"))[1]
    run("phi3", "publish", name, "--to", url, "--version", "1.0.0", cwd=ROOT, **environment)


def library(package: str, pattern: str) -> Path:
    """Return the one file of an installed package that matches `pattern`."""
    (found,) = Path(importlib.util.find_spec(package).submodule_search_locations[0]).glob(pattern)
    return found


def test_openvino_chat(smol_phi3, tmp_path, hub_registry, oci, python):
    """With only the base install and the runtime, the example answers with a model from each kind of registry."""
    packages = pip(python, "list", "--format=freeze")
    assert not re.search(r"^(torch|transformers|optimum.*|nncf|dvc)==", packages, re.MULTILINE)
    registries = {f"dir:{tmp_path}/registry": {}, "hf:someone/smol-phi3-int4": hub_registry.environment, oci.url: {}}
    for number, (url, environment) in enumerate(registries.items()):
        publish("openvino-chat", url, **environment)
        folder = tmp_path / f"home{number}"  # each registry gets a cache of its own
        folder.mkdir()
        assert chat(python, "openvino-chat", url, folder, **environment) == ANSWER


def test_onnxruntime_chat(smol_phi3, tmp_path, python):
    """The example on onnxruntime-genai pulls its model and answers."""
    publish("onnxruntime-chat", f"dir:{tmp_path}/registry")
    assert chat(python, "onnxruntime-chat", f"dir:{tmp_path}/registry", tmp_path) == ANSWER


def test_cpp(released, tmp_path):
    """The example in C++ is linked with the library in the wheel of openvino-genai, and answers.

    The wheel has no headers of its own: those in tests/native declare what the example uses.
    """
    libraries = [library("openvino_genai", "libopenvino_genai.so.*"), library("openvino", "libs/libopenvino.so.*")]
    path = ":".join(str(file.parent) for file in libraries)
    headers = ["-I", ROOT / "tests/native", "-isystem", library("openvino", "include")]
    source, program = ROOT / "examples/openvino-cpp/chat.cpp", tmp_path / "chat"
    link = [*libraries, f"-Wl,--disable-new-dtags,-rpath,{path}"]
    run("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *headers, source, "-o", program, *link, cwd=tmp_path)
    tokenizers = {"OPENVINO_TOKENIZERS_PATH_GENAI": str(library("openvino_tokenizers", "lib/*.so"))}
    directory = released("openvino-int4")
    assert run(program, directory, QUESTION, cwd=tmp_path, **tokenizers).stdout.strip() == ANSWER


def test_csharp(released, tmp_path):
    """The example in C# runs on the library in the wheel of onnxruntime-genai, and answers a quoted question, too.

    The official classes are in a NuGet package: those in tests/native do the same calls of the library.
    """
    sources = [ROOT / "examples/onnxruntime-csharp/Chat.cs", ROOT / "tests/native/OnnxRuntimeGenAI.cs"]
    run("mcs", "-warnaserror", "-r:System.Web.dll", f"-out:{tmp_path}/Chat.exe", *sources, cwd=tmp_path)
    (tmp_path / "libonnxruntime-genai.so").symlink_to(library("onnxruntime_genai", "libonnxruntime-genai.so"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(library("onnxruntime", "capi/libonnxruntime.so.*"))
    directory = released("onnx-cpu-int4")
    for question in (QUESTION, QUESTION.replace("Japan", '"Japan"')):
        chat = run("mono", "Chat.exe", directory, question, cwd=tmp_path, LD_LIBRARY_PATH=str(tmp_path))
        assert chat.stdout.strip() == ANSWER


@pytest.mark.parametrize(
    ("variant", "options", "ran"),
    [
        ("openvino-int4", (), r"openvino-genai 2026\.4\.1\.0 on CPU \(.+\)"),
        ("onnx-cpu-int4", ("--device", "CPU"), r"onnxruntime-genai 0\.18\.0 on CPUExecutionProvider"),
        (
            "onnx-directml-int4",
            (),
            r"onnxruntime-genai 0\.18\.0 on CPUExecutionProvider \(not DirectML, for which the model is made\)",
        ),
    ],
)
def test_check(released, tmp_path, python, variant, options, ran):
    """`phi3 check` needs neither torch and transformers nor scipy and safetensors. A right artifact passes; what ran
    and each figure are shown, and written to a file for the model card."""
    packages = pip(python, "list", "--format=freeze")
    assert not re.search(r"^(torch|transformers|scipy|safetensors|tokenizers)==", packages, re.MULTILINE)
    directory, file = released(variant), tmp_path / "here.json"
    command = [python.parent / "phi3", "check", directory, *options, "--json", file]
    output = subprocess.run(command, cwd=tmp_path, env={}, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(file.read_text())
    assert "What is the capital of Japan? The capital of Japan is Tokyo." in output
    assert re.search(rf"^smol-phi3/{variant} 1\.0\.0: {ran}; .+ cores$", output, re.MULTILINE)
    assert (
        f"\nmean KL here    {found['kl_mean_default']:.4f} nats    at most {found['limits']['kl_mean']:.4f} nats\n"
        in output
    )
    assert re.search(COMPARED + r"\npassed\n$", output)
    assert (found["release"], found["passed"], found["failures"]) == (f"smol-phi3/{variant} 1.0.0", True, [])
    assert all(found[name] > 0 for name in FIGURES)
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["kl_mean"] / 2 < found["kl_mean_default"] < 1.3 * metrics["kl_mean"]
    shown = card(read_manifest(directory, VariantManifest), metrics, found, version="1.0.0")
    assert f"on {found['device']}: {found['machine']}" in shown
    assert f"| mean KL here | {found['kl_mean_default']:.4f} nats |" in shown
