"""Each key of params.yaml, removed, misspelt, of another type or out of range, is refused with file, key and remedy."""

import copy
import re
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.common import params
from pipeline.common.errors import PipelineError
from tests.helpers import ROOT

FILE = ROOT / "params.yaml"
CONTENT = YAML(typ="safe").load(FILE)
# These keys have defaults, so a file without them is complete.
OPTIONAL = {
    "calibrated",
    "rotated",
    "npu",
    "weightless",
    "required",
}


def keys(block: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key below `block`."""
    if not isinstance(block, dict):
        return []
    return [found for key, value in block.items() for found in ((*path, key), *keys(value, (*path, key)))]


KEYS = keys(CONTENT)
PATHS = {".".join(path): path for path in KEYS}


@pytest.fixture
def load(monkeypatch):
    """Return a `load_params` that takes the file's content, since parsing a file takes most of the time."""

    def load(content):
        class Loaded:
            def load(self, text):
                return content

        monkeypatch.setattr(params, "YAML", lambda **options: Loaded())
        return params.load_params(FILE)

    return load


def remove(block, key):
    del block[key]
    if key == "calibrated":  # `rotated` needs `calibrated`, so it is removed too
        block.pop("rotated", None)


def misspell(block, key):
    block[key + "x"] = block.pop(key)


def another_type(block, key):
    block[key] = [{"surprise": None}]


def out_of_range(block, key):
    block[key] = "" if isinstance(block[key], str) else -7


def sentence(mistake, path: tuple[str, ...]) -> str | None:
    """Return the pattern of the sentence that refuses `mistake` at `path`, or None where it is none."""
    *block, name = path
    key, parent = ".".join(path), ".".join(block)
    if mistake in (remove, misspell) and parent in ("models", "variants"):
        # The others may be missing or have another name.
        needed = {
            "smol-phi3": r"build: 'smol-phi3' is not in models; there are .+\.",
            "openvino-fp16": r"variants: there must be openvino-fp16 with stage: export_openvino, .+\.",
        }
        return needed.get(name)
    if name == "stage":
        return rf"{key}: allowed are export_openvino, quantize_openvino and build_onnx\."
    if mistake is remove:
        if name in ("hub", "pypi"):
            return rf"{parent}: give exactly one of hub, pypi and path\."
        return None if name in OPTIONAL else rf"{key}: is missing: add it\."
    if mistake is misspell:
        return (f"{parent}: " if parent else "") + rf"unknown key '{name}x'; allowed here: .+\."
    return rf"{key}(\.0)?: .+ is not allowed: .+\."


@pytest.mark.parametrize("mistake", [remove, misspell, another_type, out_of_range])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_each_key(load, path, mistake):
    """Every mistake is refused with one or more sentences, of which one names the file, the key and what is allowed."""
    content = copy.deepcopy(CONTENT)
    block = content
    for key in path[:-1]:
        block = block[key]
    mistake(block, path[-1])
    if (expected := sentence(mistake, path)) is None:
        load(content)
        return
    with pytest.raises(PipelineError) as refused:
        load(content)
    assert len(str(refused.value)) < 1500
    lines = str(refused.value).splitlines()
    assert any(re.fullmatch(f"{re.escape(str(FILE))}: {expected}", line) for line in lines), lines
