"""An artifact can be distributed with DVC alone: push it, register a version with GTO, get it elsewhere."""

import shutil

import pytest

from pipeline.common.manifest import verify
from tests.helpers import ROOT, run

NAME = "smol-phi3-onnx-cpu-int4"


@pytest.mark.slow
def test_push_register_get(embedded, tmp_path):
    """An artifact pushed to a DVC remote and registered with GTO can be fetched by name in another directory; one that
    the remote has damaged is refused."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("git", "clone", "-q", ROOT, project, cwd=tmp_path)
    for file in ("dvc.lock", "dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / file, project / file)
    (project / "artifacts/smol-phi3").mkdir(exist_ok=True)
    run("dvc", "cache", "dir", "--local", ROOT / ".dvc/cache", cwd=project)
    run("dvc", "remote", "add", "-d", "store", tmp_path / "store", cwd=project)
    run("dvc", "config", "remote.store.verify", "true", cwd=project)
    run("dvc", "push", "artifacts/smol-phi3/onnx-cpu-int4", cwd=project)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    run(*git, "commit", "-qam", "build", cwd=project)
    author = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    run("gto", "register", NAME, "--version", "v1.0.0", cwd=project, **author)
    run("dvc", "artifacts", "get", project, NAME, "--rev", "v1.0.0", "-o", "model", cwd=elsewhere)
    assert verify(elsewhere / "model").name == "smol-phi3/onnx-cpu-int4"

    # A damaged object of the remote that is not in the cache is refused, since the remote's config sets `verify`.
    largest = max((path for path in (tmp_path / "store").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    largest.chmod(0o644)
    with largest.open("r+b") as stream:
        stream.write(b"damaged")
    other = tmp_path / "other"
    run("git", "clone", "-q", project, other, cwd=tmp_path)
    refused = run("dvc", "pull", "artifacts/smol-phi3/onnx-cpu-int4", cwd=other, check=False)
    assert refused.returncode != 0
    assert not (other / "artifacts/smol-phi3/onnx-cpu-int4/model.onnx.data").exists()
