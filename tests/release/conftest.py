"""The folder in which tests publish and pull."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.common import paths
from tests.helpers import built_once, commit, run
from tests.release_project import MODEL, build


@pytest.fixture(scope="session")
def release_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `release_folder` is a copy of."""

    def make(folder: Path) -> None:
        run("git", "init", "-q", cwd=folder)
        (folder / "dvc.lock").write_text("")
        commit(folder)
        before = Path.cwd()
        os.chdir(folder)
        try:
            paths.source(MODEL).mkdir(parents=True)
            (paths.source(MODEL) / "LICENSE").write_text("MIT")
            (paths.source(MODEL) / "config.json").write_text('{"model_type": "phi3"}')
            build()
        finally:
            os.chdir(before)

    return built_once(tmp_path_factory, "release-template", make)


@pytest.fixture
def release_folder(release_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: it has git, a validated artifact, a source with a licence, and a cache of its own."""
    shutil.copytree(release_template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path / "cache"))
    return tmp_path
