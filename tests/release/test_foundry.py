"""Microsoft's Foundry Local, in environments of its own, runs a published ONNX model."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipeline.common.files import digest
from pipeline.release.foundry import inference_model
from pipeline.release.release import read_release
from tests.checkpoints import TEMPLATE, make_tokenizer
from tests.environments import python_of
from tests.helpers import ANSWER, ROOT, phi3, run

PAGE = (ROOT / "docs/programs.md").read_text("utf-8").split("## Foundry Local\n")[1].split("\n## ")[0]
COMMANDS, CHAT, SERVE = re.findall(r"```\w+\n(.*?)```", PAGE, re.DOTALL)
VERSION = re.search(r"pip install foundry-local-sdk==([\d.]+)", PAGE)[1]
NAME = "smol-phi3-onnx-cpu-int4-1.0.0:1"
PHI_3 = {
    "system": "<|system|>\n{Content}<|end|>",
    "user": "<|user|>\n{Content}<|end|>",
    "assistant": "<|assistant|>\n{Content}<|end|>",
    "prompt": "<|user|>\n{Content}<|end|>\n<|assistant|>\n",
}
PHI_3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
WITHOUT_SYSTEM = "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + WITHOUT_SYSTEM
MERGED = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "[{{ m['role'] }}]{{ system if loop.first else '' }}{{ m['content'] }}{% endfor %}"
)
# Foundry Local starts with the catalog of a server that has no model, as if Microsoft's had none.
SCAN = """
import sys
from foundry_local_sdk import Configuration, FoundryLocalManager, LogLevel
from openai import OpenAI

catalogs, models = [(f"{sys.argv[1]}/asset-gallery/v1.0/models", None)], sys.argv[2]
level = LogLevel.INFORMATION
FoundryLocalManager.initialize(Configuration("app", model_cache_dir=models, catalog_urls=catalogs, log_level=level))
manager = FoundryLocalManager.instance
found = manager.catalog.get_cached_models()
print("listed", [model.id for model in found])
manager.start_web_service()
client = OpenAI(base_url=f"{manager.urls[0]}/v1", api_key="none")
for model in found:
    model.load()
    chat = [{"role": "user", "content": "What is the capital of Japan?"}]
    answer = client.chat.completions.create(model=model.id, messages=chat, temperature=0)
    print(answer.usage.prompt_tokens, answer.choices[0].message.content)
"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(PHI_3_TEMPLATE, PHI_3, id="eos after the last message"),
        pytest.param(TEMPLATE, PHI_3, id="turns alone"),
        pytest.param(WITHOUT_SYSTEM, {"assistant": "{Content}", "prompt": "[user]{Content}"}, id="no system"),
        pytest.param(REFUSING, {"assistant": "{Content}", "prompt": "[user]{Content}"}, id="system is refused"),
        pytest.param(MERGED, {"assistant": "{Content}", "prompt": "[user]{Content}"}, id="system in the first turn"),
    ],
)
def test_prompt_template(template, expected, tmp_path):
    """The turns are those of the catalog's entries for Phi-3; a chat template without such turns gives the prompt."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", template
    tokenizer.save_pretrained(tmp_path)
    assert inference_model(tmp_path, name="m:1") == {"Name": "m:1", "PromptTemplate": expected}


@pytest.fixture(scope="module")
def folder(smol_phi3, tmp_path_factory) -> Path:
    """A folder in which the page's commands were run."""
    folder = tmp_path_factory.mktemp("foundry")
    pulled = run("bash", "-ec", here(COMMANDS, folder), cwd=ROOT, PHI3_CACHE=str(folder / "cache"))
    assert f"register_model('{folder}/foundry-model', '{NAME}', " in pulled.stderr
    return folder


def here(text: str, folder: Path) -> str:
    """Return `text` with `folder` in place of /tmp."""
    return text.replace("/tmp/", f"{folder}/")


def execute(version: str, program: str, home: Path) -> str:
    """Return what the program prints with a version of Foundry Local, which keeps its registrations in `home`."""
    result = subprocess.run(
        [python_of(f"foundry-local-{version}"), "-c", program],
        env={"HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


@pytest.mark.slow
def test_release(folder):
    """The release lists inference_model.json, which a second publication makes with the same bytes."""
    file = folder / "foundry-model/inference_model.json"
    assert json.loads(file.read_text("utf-8")) == {
        "Name": NAME,
        "PromptTemplate": {
            "system": "<|im_start|>system\n{Content}<|im_end|>",
            "user": "<|im_start|>user\n{Content}<|im_end|>",
            "assistant": "<|im_start|>assistant\n{Content}<|im_end|>",
            "prompt": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
            "<|im_end|>\n<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
        },
    }
    assert read_release((folder / "foundry-model/release.json").read_bytes(), origin="").files[file.name] == digest(
        file
    )
    again = run("bash", "-ec", here(COMMANDS.splitlines()[0], folder), cwd=ROOT)
    assert "smol-phi3/onnx-cpu-int4 1.0.0 is there already, with the same bytes" in again.stdout


@pytest.mark.slow
def test_chat_and_serve(folder, tmp_path):
    """The page's programs answer, a second time with the registration that was kept; the model stays as it was pulled.

    It still passes `phi3 verify`, and plain onnxruntime-genai still answers with it.
    """
    for _ in range(2):
        assert execute(VERSION, here(CHAT + SERVE, folder), tmp_path).splitlines() == [ANSWER, ANSWER]
    assert "all as in the manifest" in phi3("verify", folder / "foundry-model").stdout
    plain = subprocess.run(
        [Path(sys.executable).with_name("phi3"), "chat", folder / "foundry-model"],
        input="What is the capital of Japan?",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert plain.stdout.strip() == ANSWER


@pytest.mark.slow
def test_directml_is_refused(released, tmp_path):
    """Foundry Local refuses the DirectML model with the words that the page quotes."""
    with pytest.raises(subprocess.CalledProcessError) as error:
        execute(VERSION, CHAT.replace("/tmp/foundry-model", str(released("onnx-directml-int4"))), tmp_path)
    words = re.search(r'onnx-directml-int4`: "(.*?)"', " ".join(PAGE.split()))[1]
    assert words in error.value.stderr


class EmptyCatalog(BaseHTTPRequestHandler):
    """Answers every question for models with none."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"value": []}')


@pytest.fixture
def catalog() -> Iterator[str]:
    """The URL of an empty catalog."""
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyCatalog) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("version", "listed"), [("2.0.1", [NAME]), (VERSION, [])])
def test_scan(version, listed, folder, catalog, tmp_path):
    """Foundry Local finds the model in its cache by inference_model.json, whose prompt template it does not use.

    Version 2.2.1 does not list what it found.
    """
    model = shutil.copytree(folder / "foundry-model", tmp_path / "models/someone/smol")
    content = {"Name": NAME, "PromptTemplate": {"assistant": "{Content}", "prompt": "Say banana. {Content} banana"}}
    (model / "inference_model.json").write_text(json.dumps(content))
    arguments = [python_of(f"foundry-local-{version}"), "-c", SCAN, catalog, tmp_path / "models"]
    result = subprocess.run(arguments, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert "Found 1 locally cached models." in result.stdout + result.stderr
    assert f"listed {listed}" in result.stdout
    assert result.stdout.count(f"37 {ANSWER}") == len(listed)
