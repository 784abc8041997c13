"""The modules import each other in one direction."""

import networkx

from pipeline.dvc_yaml import imported_names
from tests.helpers import ROOT

# Each package of the pipeline may import itself and those before it. Modules outside of them may import all.
LAYERS = ("common", "source", "run", "convert", "check", "release")


def test_one_direction():
    """There are no circular imports, and no package imports one above it; imports inside functions count."""
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").glob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = networkx.DiGraph()
    for name, path in modules.items():
        found = imported_names(path) & modules.keys()
        graph.add_edges_from((name, other) for other in found - {name, "pipeline"})
    assert len(graph) > 60
    for name, other in graph.edges:
        rooms = [path.split(".")[1] for path in (name, other) if path.startswith("pipeline.")]
        if rooms and rooms[0] in LAYERS:
            assert rooms[-1] in LAYERS[: LAYERS.index(rooms[0]) + 1], f"{name} imports {other}"
    assert list(networkx.simple_cycles(graph)) == []
