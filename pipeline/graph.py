"""The cells of dvc.yaml and what each of them needs, as DVC has it."""

import functools
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Cell:
    """A cell of dvc.yaml, such as `quantize_openvino@smol-phi3-openvino-int4`."""

    name: str
    model: str
    needs: tuple[str, ...]  # the cells whose outputs it reads
    cached: tuple[str, ...]  # the paths of its outputs that DVC's cache keeps
    uncached: tuple[str, ...]  # the paths of its outputs that git keeps, not DVC's cache
    features: tuple[str, ...]  # what its machine must have: `meta: {needs: [...]}` in dvc.yaml


def read_cells(models: Sequence[str], targets: Sequence[str] = ()) -> dict[str, Cell]:
    """Return by name the cells of `models` that `dvc repro TARGETS` (by default all) looks at, in its order.

    Raises PipelineError when DVC knows no such target.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from networkx import descendants, topological_sort

    with Repo() as repo:
        graph = repo.index.graph  # an edge leads from a stage to one that it needs
        stages = list(graph)
        if targets:
            try:
                stages = [stage for target in targets for stage in repo.stage.collect(target)]
            except DvcException as error:
                raise PipelineError(f"{error}: `dvc stage list` names what there is.") from error
        wanted = set(stages).union(*(descendants(graph, stage) for stage in stages))
        return {
            stage.addressing: Cell(
                stage.addressing,
                model_of(stage.addressing, models),
                needs=tuple(sorted(needed.addressing for needed in graph.successors(stage))),
                cached=tuple(str(out.def_path) for out in stage.outs if out.use_cache),
                uncached=tuple(str(out.def_path) for out in stage.outs if not out.use_cache),
                features=tuple((stage.meta or {}).get("needs", ())),
            )
            for stage in reversed(list(topological_sort(graph)))
            if stage in wanted
        }


def model_of(cell: str, models: Sequence[str]) -> str:
    """Return the one of `models` to which `cell` belongs: a name may begin with another's."""
    item = cell.partition("@")[2]
    return max((name for name in models if f"{item}-".startswith(f"{name}-")), key=len)


def changed(cells: dict[str, Cell], *, remote: bool = False) -> set[str]:
    """Return the names of those of `cells` that have to run: they, or cells that they need, are not as in dvc.lock, or
    what they made is gone. With `remote`, what is on the DVC remote is not gone."""
    gone = _gone(remote=remote)
    found: set[str] = set()
    for cell in cells.values():
        if cell.name in _dry_run() or gone & set(cell.cached) or found & set(cell.needs):
            found.add(cell.name)
    return found


@functools.cache
def _gone(*, remote: bool) -> frozenset[str]:
    from dvc.repo import Repo

    with Repo() as repo:
        status = repo.data_status(not_in_remote=remote, remote_refresh=remote)
    elsewhere = status["not_in_remote"] if remote else status["uncommitted"].get("deleted", [])
    return frozenset(path.rstrip("/") for path in set(status["not_in_cache"]) & set(elsewhere))


@functools.cache
def _dry_run() -> frozenset[str]:
    # It stops at outputs that are not there yet, but not before it named what makes them.
    command = ["dvc", "repro", "--dry", "--allow-missing", "--keep-going"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return frozenset(re.findall(r"Running stage '([^']+)'", listed))
