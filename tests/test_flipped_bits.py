"""A flipped bit in any file of an artifact or of a signed release is found."""

import random
import shutil
from pathlib import Path

import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.manifest import verify
from pipeline.release.pull import verify_release
from tests.helpers import ROOT, built_once, run

pytestmark = pytest.mark.slow


def test_a_flipped_bit(smol_phi3, tmp_path):
    """One random bit, flipped in each file of any artifact of smol-phi3, is found in all of them. (The manifest's other
    fields are covered by the hash that validation keeps, and by a release's.)"""
    chance = random.Random(11)
    directories = [path.parent for path in sorted(smol_phi3.rglob("manifest.json"))]
    assert len(directories) == 7 + 2  # checkpoint, variants, NPU blobs
    for directory in directories:
        copy = tmp_path / directory.name
        shutil.copytree(directory, copy)
        verify(copy)
        changed = flip_each(copy, chance, besides={"manifest.json"})
        with pytest.raises(PipelineError) as refused:
            verify(copy)
        assert str(refused.value) == f"{copy}: {changed}. Build or pull it again."
        shutil.rmtree(copy)


@pytest.fixture(scope="session")
def signed(smol_phi3: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of smol-phi3, signed with ours.pem, as it was pulled."""

    def pull(folder: Path) -> None:
        registry, name = f"dir:{folder}/registry", "smol-phi3/openvino-int4"
        run("phi3", "publish", name, "--to", registry, "--version", "1.0.0", "--key", keys / "ours.pem", cwd=ROOT)
        key = ("--key", keys / "ours.pub")
        run("phi3", "pull", registry, name, "--to", "model", *key, cwd=folder, PHI3_CACHE=str(folder / "cache"))

    return built_once(tmp_path_factory, "signed", pull) / "model"


@pytest.fixture
def model(signed: Path, keys: Path, tmp_path: Path) -> Path:
    """A copy of the signed release, which a test may change."""
    model = tmp_path / "model"
    shutil.copytree(signed, model)
    verify_release(model, key=keys / "ours.pub")
    return model


def test_a_flipped_bit_in_a_release(model, keys):
    """One random bit, flipped in each file that a signed release lists, is found in all of them after its pull."""
    changed = flip_each(model, random.Random(13), besides={"release.json", "release.sig"})
    with pytest.raises(PipelineError) as refused:
        verify_release(model, key=keys / "ours.pub")
    assert str(refused.value) == f"{model}: {changed}. Remove it and pull it again."


@pytest.mark.parametrize(("file", "text"), [("release.json", b'"1.0.0'), ("release.sig", b'"sig":"M')])
def test_a_flipped_bit_of_what_is_signed(model, keys, file, text):
    """One bit, flipped in the version in release.json or in its signature, is found."""
    end = (model / file).read_bytes().index(text) + len(text)
    flip(model / file, 8 * (end - 1))
    with pytest.raises(PipelineError) as refused:
        verify_release(model, key=keys / "ours.pub")
    assert str(refused.value) == f"{model} is not signed by the owner of {keys / 'ours.pub'}: it is refused."


def test_a_flipped_bit_before_a_chat(model, tmp_path):
    """A file with a flipped bit is refused before a model is loaded."""
    flip(model / "openvino_model.bin", 12345)
    refused = run("phi3", "chat", model, cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"Error: {model}: openvino_model.bin has changed. Remove it and pull it again.\n"


def flip_each(folder: Path, chance: random.Random, *, besides: set[str]) -> str:
    """Flip one random bit of each file in `folder` but `besides`; return the faults that a check has to list."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in besides]
    for path in files:
        flip(path, chance.randrange(path.stat().st_size * 8))
    return "; ".join(sorted(f"{path.relative_to(folder).as_posix()} has changed" for path in files))


def flip(path: Path, bit: int) -> None:
    """Flip the bit number `bit` of a file."""
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        (byte,) = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))
