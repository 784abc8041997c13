"""An artifact can be distributed with DVC alone: push it, register a version with GTO, get it elsewhere."""

import shutil

import pytest

from pipeline.common.manifest import verify
from tests.helpers import ROOT, commit, run

NAME = "smol-phi3-onnx-cpu-int4"
ARTIFACT = "artifacts/smol-phi3/onnx-cpu-int4"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(smol_phi3, tmp_path_factory):
    """A clone of this project that has pushed an artifact to the DVC remote `store` beside it, and committed that."""
    folder = tmp_path_factory.mktemp("dvc")
    project = folder / "project"
    run("git", "clone", "-q", ROOT, project, cwd=folder)
    for file in ("dvc.lock", "dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / file, project / file)
    (project / "artifacts/smol-phi3").mkdir(exist_ok=True)
    run("dvc", "cache", "dir", "--local", ROOT / ".dvc/cache", cwd=project)
    run("dvc", "remote", "add", "-d", "store", folder / "store", cwd=project)
    run("dvc", "config", "remote.store.verify", "true", cwd=project)
    run("dvc", "push", ARTIFACT, cwd=project)
    commit(project)
    return project


def test_register_and_get(project, tmp_path):
    """An artifact that was registered with GTO can be fetched by name in another directory."""
    author = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    run("gto", "register", NAME, "--version", "v1.0.0", cwd=project, **author)
    run("dvc", "artifacts", "get", project, NAME, "--rev", "v1.0.0", "-o", "model", cwd=tmp_path)
    assert verify(tmp_path / "model").name == "smol-phi3/onnx-cpu-int4"


def test_a_damaged_remote(project, tmp_path):
    """An object that the remote has damaged is refused, since the remote's config sets `verify`."""
    store = shutil.copytree(project.parent / "store", tmp_path / "store")
    largest = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.chmod(0o644)
    with largest.open("r+b") as stream:
        stream.write(b"damaged")
    other = tmp_path / "other"
    run("git", "clone", "-q", project, other, cwd=tmp_path)
    run("dvc", "remote", "modify", "--local", "store", "url", store, cwd=other)
    refused = run("dvc", "pull", ARTIFACT, cwd=other, check=False)
    assert refused.returncode == 1
    sentence = "ERROR: failed to pull data from the cloud - Checkout failed for following targets:"
    assert refused.stderr.splitlines()[:2] == [sentence, ARTIFACT]
    assert not (other / ARTIFACT / "model.onnx.data").exists()
