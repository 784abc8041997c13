"""The cells of dvc.yaml and the cells that each of them needs, as DVC reads them."""

import functools
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.common.errors import PipelineError


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
    """Return the cells of `models` that `dvc repro TARGETS` (by default all) considers, by name and in DVC's order.

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
    """Return the one of `models` to which `cell` belongs: the longest that fits, as one name may begin with another."""
    item = cell.partition("@")[2]
    return max((name for name in models if f"{item}-".startswith(f"{name}-")), key=len)


def changed(cells: dict[str, Cell], *, remote: bool = False) -> set[str]:
    """Return the names of those of `cells` that have to run.

    A cell has to run when it differs from dvc.lock, when its outputs are missing, or when a cell that it needs has to
    run. With `remote`, outputs that are on the DVC remote do not count as missing.
    """
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
    # DVC stops at outputs that do not exist yet, but only after it has named the stages that make them.
    command = ["dvc", "repro", "--dry", "--allow-missing", "--keep-going"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return frozenset(re.findall(r"Running stage '([^']+)'", listed))
