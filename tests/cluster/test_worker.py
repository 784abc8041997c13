"""What a worker does with a cell."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import distributed
import pytest

from pipeline.cluster import worker as module
from pipeline.cluster.worker import Built, Origin, run_cell
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


def test_texts_on_windows(tmp_path, monkeypatch):
    """The texts of earlier cells have the same line endings on every system."""
    written, worker = [], SimpleNamespace(local_directory=tmp_path)
    node = Node(Cell("validate", MODEL), needs=(), cached=(), uncached=(), features=())
    monkeypatch.setattr(distributed, "get_worker", lambda: worker)
    monkeypatch.setattr(module, "_check_out", lambda origin, clone: clone.mkdir())
    monkeypatch.setattr(module, "stream_lines", lambda command, cwd, env: [])
    monkeypatch.setattr(module, "read_built", lambda node, clone: Built({}, {}))
    monkeypatch.setattr(Path, "write_text", lambda path, text, encoding, newline=None: written.append((text, newline)))
    run_cell(node, {"x": Built({}, {"metrics/x.json": "{}\n"})}, origin=Origin("x", "y", {}), disk=0.0)
    assert written == [("{}\n", "\n")]
