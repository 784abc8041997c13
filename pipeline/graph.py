"""The cells of dvc.yaml and the cells that each of them needs, as DVC reads them.

`python -m pipeline.graph` ends with status 1 when an output is not in DVC's cache.
"""

import functools
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.common.errors import PipelineError
from pipeline.common.params import Params, load_params
from pipeline.common.programs import run_dvc


@dataclass(frozen=True)
class Cell:
    """One stage for one model and, where the stage has them, one variant and one NPU platform.

    DVC's name of it is such as `quantize_openvino@smol-phi3-openvino-int4`.
    """

    stage: str
    model: str
    variant: str = ""
    platform: str = ""  # of an NPU

    def __str__(self) -> str:
        return f"{self.stage}@{'-'.join(filter(None, (self.model, self.variant, self.platform)))}"

    @classmethod
    def parse(cls, name: str, params: Params) -> "Cell":
        """Return the cell with DVC's name `name`; of several models or variants that fit, it is the longest name's."""
        stage, _, item = name.partition("@")
        model = _first(item, params.models)
        rest = item[len(model) + 1 :]
        variant = _first(rest, params.variants)
        return cls(stage, model, variant, rest[len(variant) + 1 :])


def _first(item: str, names: Iterable[str]) -> str:
    return max((name for name in names if f"{item}-".startswith(f"{name}-")), key=len, default="")


@dataclass(frozen=True)
class Node:
    """A cell in the graph of dvc.yaml."""

    cell: Cell
    needs: tuple[str, ...]  # the cells whose outputs it reads
    cached: tuple[str, ...]  # the paths of its outputs that DVC's cache keeps
    uncached: tuple[str, ...]  # the paths of its outputs that git keeps, not DVC's cache
    features: tuple[str, ...]  # what its machine must have: `meta: {needs: [...]}` in dvc.yaml


def read_graph(params: Params, targets: Sequence[str] = ()) -> dict[str, Node]:
    """Return the cells that `dvc repro TARGETS` (by default all) considers, by name and in DVC's order.

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
            stage.addressing: Node(
                Cell.parse(stage.addressing, params),
                needs=tuple(sorted(needed.addressing for needed in graph.successors(stage))),
                cached=tuple(str(out.def_path) for out in stage.outs if out.use_cache),
                uncached=tuple(str(out.def_path) for out in stage.outs if not out.use_cache),
                features=tuple((stage.meta or {}).get("needs", ())),
            )
            for stage in reversed(list(topological_sort(graph)))
            if stage in wanted
        }


def changed(graph: dict[str, Node], *, remote: bool = False) -> set[str]:
    """Return the names of the cells of `graph` that have to run.

    A cell has to run when it differs from dvc.lock, when its outputs are missing, or when a cell that it needs has to
    run. With `remote`, outputs that are on the DVC remote do not count as missing.

    Raises PipelineError when another DVC command is at work.
    """
    gone = _gone(remote=remote)
    found: set[str] = set()
    for name, node in graph.items():
        if name in _dry_run() or gone & set(node.cached) or found & set(node.needs):
            found.add(name)
    return found


def require_cached(graph: dict[str, Node]) -> None:
    """Raise PipelineError when an output of a cell of `graph` is not in DVC's cache.

    That happens when the cache's disk is full: `dvc repro` says so, but ends with status 0.
    """
    from dvc.repo import Repo

    with Repo() as repo:
        missing = {path.rstrip("/") for path in repo.data_status()["not_in_cache"]}
    if names := [name for name, node in graph.items() if missing & set(node.cached)]:
        raise PipelineError(
            f"the output of {', '.join(names)} is not in DVC's cache, as after its disk was full: make room "
            "there, then run `dvc commit -f`."
        )


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
    done = run_dvc("repro", "--dry", "--allow-missing", "--keep-going", capture_output=True)
    if re.search("Unable to acquire lock|is being blocked by", done.stderr):
        raise PipelineError("another DVC command is at work here, and changes what has to run: wait for it to end.")
    return frozenset(re.findall(r"Running stage '([^']+)'", done.stdout))


if __name__ == "__main__":
    try:
        require_cached(read_graph(load_params()))
    except PipelineError as failure:
        sys.exit(f"error: {failure}")
