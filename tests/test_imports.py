"""The modules import each other in one direction."""

import ast

import networkx

from tests.conftest import ROOT


def test_no_circles():
    """There are no circular imports in the project; imports inside functions count."""
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").glob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = networkx.DiGraph()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            else:
                continue
            graph.add_edges_from((name, other) for other in found & modules.keys() - {name, "pipeline"})
    assert len(graph) > 60
    assert list(networkx.simple_cycles(graph)) == []
