"""The example applications and `phi3 check` run with only the base install and the runtimes."""

import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT, run
from tests.oci_registry_server import Registry

pytestmark = pytest.mark.slow
QUESTION, ANSWER = "What is the capital of Japan?", "The capital of Japan is Tokyo."


@pytest.fixture(scope="module")
def oci(tmp_path_factory):
    """An empty OCI registry."""
    registry = Registry(tmp_path_factory.mktemp("oci") / "registry")
    yield registry
    registry.stop()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with only phi3-pipeline's base install and the examples' requirements."""
    directory = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(directory, with_pip=True)
    python = directory / "bin/python"
    requirements = [part for file in sorted((ROOT / "examples").glob("*/requirements.txt")) for part in ("-r", file)]
    project = shutil.copytree(ROOT / "pipeline", tmp_path_factory.mktemp("project") / "pipeline").parent
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", project, *requirements]
    subprocess.run(pip, check=True)
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


def test_openvino_chat(embedded, tmp_path, hub_registry, oci, python):
    """With only the base install and the runtime, the example answers with a model from each kind of registry."""
    packages = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
    assert not re.search(r"^(torch|transformers|optimum.*|nncf|dvc)==", packages, re.MULTILINE)
    token = {"HF_ENDPOINT": hub_registry.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
    registries = {f"dir:{tmp_path}/registry": {}, "hf:someone/smol-phi3-int4": token, oci.url: {}}
    for number, (url, environment) in enumerate(registries.items()):
        publish("openvino-chat", url, **environment)
        folder = tmp_path / f"home{number}"  # each registry gets a cache of its own
        folder.mkdir()
        assert chat(python, "openvino-chat", url, folder, **environment) == ANSWER


def test_onnxruntime_chat(embedded, tmp_path, python):
    """The example on onnxruntime-genai pulls its model and answers."""
    publish("onnxruntime-chat", f"dir:{tmp_path}/registry")
    assert chat(python, "onnxruntime-chat", f"dir:{tmp_path}/registry", tmp_path) == ANSWER


@pytest.mark.parametrize("variant", ["openvino-int4", "onnx-cpu-int4"])
def test_check(embedded, tmp_path, python, variant):
    """`phi3 check` needs neither torch and transformers nor scipy and safetensors."""
    packages = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
    assert not re.search(r"^(torch|transformers|scipy|safetensors|tokenizers)==", packages, re.MULTILINE)
    registry, environment = f"dir:{tmp_path}/registry", {"PHI3_CACHE": str(tmp_path / "cache")}
    run("phi3", "publish", f"smol-phi3/{variant}", "--to", registry, "--version", "1.0.0", cwd=ROOT)
    for arguments in (("pull", registry, f"smol-phi3/{variant}", "--to", "model"), ("check", "model")):
        command = [python.parent / "phi3", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.endswith("compared at 442 tokens of 17 prompts\npassed\n")
