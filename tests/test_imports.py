"""The modules import each other in one direction."""

import ast
from pathlib import Path

import networkx

from tests.conftest import ROOT


def imported_names(file: Path) -> set[str]:
    """Return the names that `file` imports, also inside functions, with those of the modules they come from."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_circles():
    """There are no circular imports in the project; imports inside functions count."""
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").glob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = networkx.DiGraph()
    for name, path in modules.items():
        found = imported_names(path) & modules.keys()
        graph.add_edges_from((name, other) for other in found - {name, "pipeline"})
    assert len(graph) > 60
    assert list(networkx.simple_cycles(graph)) == []
