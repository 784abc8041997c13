"""Each key of params.yaml, removed, misspelt, of another type or out of range, is refused with file, key and remedy."""

import copy
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.common import params
from pipeline.common.errors import PipelineError
from tests.helpers import ROOT

CONTENT = YAML(typ="safe").load(ROOT / "params.yaml")
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
        return params.load_params(ROOT / "params.yaml")

    return load


def refused(load, path: tuple[str, ...], change) -> str | None:
    """Apply `change` to the block that holds `path`; return the message that refuses the file, or None."""
    content = copy.deepcopy(CONTENT)
    block = content
    for key in path[:-1]:
        block = block[key]
    change(block, path[-1])
    try:
        load(content)
    except PipelineError as error:
        message = str(error)
        assert message.startswith(str(ROOT / "params.yaml"))
        assert len(message) < 1500
        return message
    return None


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_each_key(load, path):
    """Every mistake is refused with one or more sentences that name the file and the key."""

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

    key = path[-1]
    named = path[-2] if len(path) > 1 else ""
    for change in (remove, misspell, another_type, out_of_range):
        free = path[0] in ("models", "variants") and len(path) == 2 and key not in CONTENT["build"]
        if change in (remove, misspell) and free:
            continue  # a variant, or an unused model of the catalogue, may be missing or have another name
        if change is remove and key in OPTIONAL:
            assert refused(load, path, change) is None
            continue
        message = refused(load, path, change)
        assert message, (path, change.__name__)
        assert key in message or named in message, (path, change.__name__, message)
