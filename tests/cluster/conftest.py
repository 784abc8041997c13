"""Fixtures of the tests of builds on clusters."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.project import CELL, DVC_YAML, MODEL, build, use_store
from tests.helpers import built_once, commit, edit


@pytest.fixture
def quick(project: Path) -> Path:
    """A project whose cells take no time, with a DVC remote that .dvc/config names."""
    edit(project / "params.yaml", "build: [tiny]", f"build: [{MODEL}]")
    (project / "dvc.yaml").write_text(DVC_YAML, "utf-8")
    (project / "cell.py").write_text(CELL, "utf-8")
    with (project / ".gitignore").open("a", encoding="utf-8") as stream:
        stream.write("/artifacts/\n")
    use_store(project, project.parent / "store")
    return project


@pytest.fixture
def finished(quick: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one build, in which a worker was killed: `project`, `store`, what `phi3 build` printed as `output`,
    which cells `ran`, and the process id of the cell whose worker was killed as `pid`."""

    def finish(folder: Path) -> None:
        project = folder / "project"
        shutil.copytree(quick, project)
        use_store(project, folder / "store")
        done = build(project, "local:2", KILLS_ITS_WORKER="openvino-int4")
        (folder / "output").write_text(done.stdout, "utf-8")

    return built_once(tmp_path_factory, "cluster", finish)


@pytest.fixture
def again(quick: Path, finished: Path) -> Path:
    """The finished project as another clone of it is: git has metrics and dvc.lock, the rest is only on the remote."""
    shutil.copytree(finished / "project/metrics", quick / "metrics")
    shutil.copyfile(finished / "project/dvc.lock", quick / "dvc.lock")
    shutil.copytree(finished / "store", quick.parent / "store")
    commit(quick)
    return quick
