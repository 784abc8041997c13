"""An artifact exists if and only if its manifest does, and every byte is accounted for."""

import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.files import File, building
from pipeline.common.manifest import Manifest, Nothing, PathOrigin, VariantManifest, read_manifest, seal, verify
from tests.helpers import edit_json

MANIFEST = Manifest(
    name="m/v",
    model="m",
    variant="v",
    source=PathOrigin(path="x"),
    license="MIT",
    recipe=Nothing(),
    eos_token_ids=[1],
    context={},
    runtime=Nothing(),
    tools={},
)
HELLO = File(size=5, sha256="2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")


@pytest.fixture
def sealed(tmp_path):
    """A sealed artifact of two files."""
    with building(tmp_path / "v") as build:
        (build / "a.bin").write_text("hello")
        (build / "sub").mkdir()
        (build / "sub/b.bin").write_text("hello")
        seal(build, MANIFEST)
    return tmp_path / "v"


def test_building_seals_and_names(sealed):
    """After a build the directory holds the files and a manifest with their hashes, and nothing else is left."""
    assert [path.name for path in sealed.parent.iterdir()] == ["v"]
    assert verify(sealed) == MANIFEST.model_copy(update={"files": {"a.bin": HELLO, "sub/b.bin": HELLO}})


def test_two_builds_give_the_same_manifest(sealed, tmp_path):
    """Nothing in a manifest depends on the time."""
    with building(tmp_path / "again") as build:
        (build / "a.bin").write_text("hello")
        (build / "sub").mkdir()
        (build / "sub/b.bin").write_text("hello")
        seal(build, MANIFEST)
    assert (tmp_path / "again/manifest.json").read_bytes() == (sealed / "manifest.json").read_bytes()


def test_what_finder_and_explorer_leave(sealed):
    """Files that the systems' file managers leave anywhere in an artifact are no part of it; similar names are."""
    for name in (".DS_Store", "sub/._b.bin", "Thumbs.db", "sub/desktop.ini"):
        (sealed / name).touch()
    assert verify(sealed).files == {"a.bin": HELLO, "sub/b.bin": HELLO}
    for name in ("x.DS_Store", "Thumbs.db.bin", ".bin"):
        (sealed / name).touch()
    with pytest.raises(PipelineError) as refused:
        verify(sealed)
    assert str(refused.value) == (
        f"{sealed}: .bin is not listed; Thumbs.db.bin is not listed; x.DS_Store is not listed. Build or pull it again."
    )


def test_verify_lists_every_fault(sealed):
    """Missing, changed (even with the same size) and additional files are all named in one sentence."""
    (sealed / "a.bin").write_text("hellO")
    (sealed / "sub/b.bin").unlink()
    (sealed / "c.bin").touch()
    with pytest.raises(PipelineError) as refused:
        verify(sealed)
    assert str(refused.value) == (
        f"{sealed}: a.bin has changed; c.bin is not listed; sub/b.bin is missing. Build or pull it again."
    )


def test_a_link_in_the_place_of_a_file(sealed, tmp_path):
    """A link is refused even if it leads to the same bytes: what it leads to could change after the check."""
    (sealed / "a.bin").rename(tmp_path / "elsewhere")
    (sealed / "a.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match=r"v: a\.bin has changed\. Build or pull it again"):
        verify(sealed)


def test_another_kind_of_artifact(sealed):
    """Where a variant is expected, the manifest of something else is refused with the field that differs."""
    with pytest.raises(PipelineError, match=r"manifest\.json is not a manifest \(recipe.*\): build or pull it again"):
        verify(sealed, VariantManifest)


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 1}', "[" * 100_000])
def test_a_damaged_manifest(sealed, content):
    """A truncated or foreign manifest is refused with a sentence."""
    (sealed / "manifest.json").write_text(content)
    with pytest.raises(PipelineError, match=r"manifest\.json is not a manifest \(.*\): build or pull it again\."):
        read_manifest(sealed)


def test_a_newer_manifest(sealed):
    """A manifest of another schema version is refused by its number."""
    edit_json(sealed / "manifest.json", schema_version=2)
    with pytest.raises(PipelineError, match="has schema version 2, this phi3-pipeline reads 1: install the version"):
        read_manifest(sealed)
