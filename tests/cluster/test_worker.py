"""What a worker does with a cell."""

import shutil
from types import SimpleNamespace

import distributed
import pytest

from pipeline.cluster.worker import Origin, run_cell
from pipeline.graph import Cell, Node
from tests.cluster.project import MODEL, settings, use_store
from tests.helpers import edit, run

pytestmark = pytest.mark.slow


def test_two_projects(quick, tmp_path, monkeypatch):
    """A worker builds cells of one project after those of another."""
    other = tmp_path / "other/project"
    shutil.copytree(quick, other)
    edit(other / "cell.py", "print(cell,", "print('other', cell,")
    use_store(other, other.parent / "store")
    said = []
    worker = SimpleNamespace(local_directory=tmp_path / "worker", log_event=lambda topic, event: said.append(event[1]))
    monkeypatch.setattr(distributed, "get_worker", lambda: worker)
    node = Node(Cell("download", MODEL), needs=(), cached=("artifacts/source",), uncached=(), features=())
    for project in (quick, other):
        commit = run("git", "rev-parse", "HEAD", cwd=project).stdout.strip()
        run_cell(node, {}, origin=Origin(str(project), commit, settings(project)), disk=0.0)
    assert [line for line in said if "wrote" in line] == [
        "download wrote artifacts/source",
        "other download wrote artifacts/source",
    ]
