"""The README's snippets run as they are written, and its table of checks is complete."""

import json
import re
import sys

import pytest

from pipeline.smoke import CHECKS
from tests.conftest import ROOT, run

README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=["openvino", "optimum-intel", "npu", "npu-blob", "onnx"])
def test_a_snippet_answers(embedded, snippet):
    """Each snippet prints an answer with the last word of the source model's."""
    answers = json.loads((embedded / "reference.json").read_text("utf-8"))["answers"]
    expected = re.findall(r"\w+", answers[0]["text"])[-1]
    assert expected in run(sys.executable, "-c", snippet, cwd=ROOT).stdout


@pytest.mark.slow
def test_publish_and_pull(embedded, tmp_path):
    """The commands of the section on registries work in their order, and so does the snippet for applications."""
    section = README.split("## Registries")[1]
    commands, snippet = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("sh", "py"))
    here = {"PHI3_CACHE": str(tmp_path / "cache")}
    output = run("bash", "-ec", commands.replace("/tmp/", f"{tmp_path}/"), cwd=ROOT, **here).stdout
    assert "smol-phi3/openvino-int4 1.0.0 latest" in output
    assert output.strip().endswith("The capital of Japan is Tokyo.")
    snippet = snippet.replace("/tmp/", f"{tmp_path}/") + "print(sorted(path.name for path in directory.iterdir()))"
    output = run(sys.executable, "-c", snippet, cwd=ROOT, **here).stdout
    assert output.startswith("The capital of Japan is Tokyo.")
    assert "openvino_model.bin" in output


def test_every_check_is_explained():
    """The README's table of checks names all of them, in their order."""
    table = README.split("### Checks")[1].split("\n\n")[1]
    assert [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])] == list(
        CHECKS
    )
