"""`phi3 build`: submit every cell that has to run to Dask, report what happens, and fetch the results."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, as_completed
from dvc.config import Config
from dvc.exceptions import DvcException

from pipeline import plan
from pipeline.cluster.worker import LOCK, TOPIC, Origin, read_built, run_cell
from pipeline.common.errors import PipelineError, lines
from pipeline.common.params import OnnxInt4, Params, load_params
from pipeline.common.programs import run_dvc
from pipeline.costs import estimate
from pipeline.graph import Node, changed, read_graph, require_cached
from pipeline.release.device import openvino_devices

SCRATCH = Path(".dvc/tmp/cluster")  # on the project's disk, and ignored by git
Say = Callable[[str], None]
Needs = dict[str, dict[str, float]]


def build(scheduler: str, targets: tuple[str, ...], *, say: Say) -> None:
    """Build what `dvc repro TARGETS` would build, but on the Dask cluster at `scheduler`; then fetch the results.

    `scheduler` is an address, or `local:N` for N worker processes on this machine, or `local` for as many as fit.

    Raises PipelineError when the build cannot start, or at its end when cells failed.
    """
    params = load_params()
    cells = read_graph(params, targets)
    local = re.fullmatch(r"local(?::([1-9]\d*))?", scheduler)
    origin = _origin(cells, local=bool(local))
    # Workers have no local checkpoint, and a package shows its config only once it is downloaded: run these cells here.
    for name, node in cells.items():
        if not node.needs and not params.get_model(node.cell.model).source.hub:
            _dvc("repro", "--pull", name)
    try:
        runs = changed(cells, remote=True)
    except (OSError, DvcException) as error:
        raise PipelineError(
            f"the DVC remote cannot be read ({lines(error)[0]}): correct its url, or try later."
        ) from error
    given = sorted({name for run in runs for name in cells[run].needs} - runs)
    if given:
        _dvc("push", *given)
    if runs:
        models = [] if os.environ.get(plan.IGNORE) else sorted({cells[name].cell.model for name in runs})
        configs = {model: plan.read_config(model, params.get_model(model), progress=say) for model in models}
        needs = {
            name: _needs(node, [cells[before] for before in node.needs], params, configs.get(node.cell.model))
            for name, node in cells.items()
            if name in runs
        }
        with _local(int(local[1] or 0), needs) if local else _remote(scheduler) as client:
            say(f"{len(runs)} cells to build; dashboard: {client.dashboard_link}")
            client.subscribe_topic(TOPIC, lambda event: say("| ".join(event[1])))
            tasks: dict[str, Any] = {name: read_built(cells[name], Path()) for name in given}
            for name, need in needs.items():
                needed = {before: tasks[before] for before in cells[name].needs}
                task = {"origin": origin, "disk": need.get("disk", 0.0)}
                key = f"{name}-{origin.commit}"
                tasks[name] = client.submit(run_cell, cells[name], needed, **task, key=key, resources=need)
                if not any(_offers(worker, need) for worker in client.scheduler_info()["workers"].values()):
                    say(f"{name} waits for a worker with {_words(need)}")
            _follow({name: tasks[name] for name in needs}, cells, say)
    _dvc("repro", "--pull", *targets)
    require_cached(cells)


def _origin(cells: dict[str, Node], *, local: bool) -> Origin:
    kept = {str(LOCK), *(path for node in cells.values() for path in node.uncached)}
    edited = [line[3:] for line in _git("status", "--porcelain", "--untracked-files=no").splitlines()]
    if edited := sorted(set(edited) - kept):
        raise PipelineError(f"{edited[0]} differs from the last commit, which workers build: commit or undo it first.")
    commit = _git("rev-parse", "HEAD")
    config = Config(".dvc").read("repo")
    url = config["remote"].get(config["core"].get("remote"), {}).get("url")
    if not url:
        raise PipelineError(
            "workers share results by a DVC remote, and .dvc/config names none: `dvc remote add -d store URL`, commit."
        )
    if url not in Path(".dvc/config").read_text("utf-8"):  # because dvc has resolved a relative url
        raise PipelineError("the DVC remote's url is relative, and workers' clones are elsewhere: make it absolute.")
    repository = str(Path.cwd())
    if not local:
        repository = _git("remote", "get-url", "origin")
        if not repository or not _git("branch", "--remotes", "--contains", commit):
            raise PipelineError(f"commit {commit[:8]} is not on the git remote `origin`, where workers clone: push it.")
    threads = dask.config.get("distributed.nanny.pre-spawn-environ")
    return Origin(repository, commit, {name: os.environ[name] for name in threads if name in os.environ})


def _needs(node: Node, before: list[Node], params: Params, config: dict[str, Any] | None) -> dict[str, float]:
    # Return the Dask resources that a cell needs of a worker: bytes of memory and disk, and 1 of each feature. `before`
    # has the cells whose outputs it reads.
    need, cell = dict.fromkeys(node.features, 1.0), node.cell
    variant = params.get_variant(cell.variant) if cell.stage == "validate" else None
    on_device = variant and not (isinstance(variant, OnnxInt4) or variant.npu)
    if on_device and params.validate_.openvino_device != "CPU":
        need[params.validate_.openvino_device] = 1.0
    if config:
        cost = estimate(cell, params=params, config=config)
        inputs = [estimate(other.cell, params=params, config=config) for other in before]
        need |= {"memory": cost.memory, "disk": cost.disk + cost.temporary + sum(other.disk for other in inputs)}
    return need


@contextmanager
def _local(workers: int, needs: Needs) -> Iterator[Client]:
    free = plan.available()
    largest = max(need.get("memory", 1.0) for need in needs.values())
    workers = workers or max(1, min(os.cpu_count() or 1, int(free.memory / largest)))
    features = [*openvino_devices(), *(["windows"] if os.name == "nt" else [])]
    offer = {"memory": free.memory / workers, "disk": free.disk / workers} | dict.fromkeys(features, 1.0)
    for name, need in needs.items():
        if not _offers({"resources": offer}, need):
            raise PipelineError(
                f"{name} needs {_words(need)}, and each of {workers} workers here would have {_words(offer)}: "
                f"use fewer, make room, or set {plan.IGNORE}=1 to try all the same."
            )
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,  # no limit, since it would measure the worker, not its stage
            host="127.0.0.1",
            dashboard_address="127.0.0.1:8787",
            local_directory=SCRATCH.absolute(),
            resources=offer,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _remote(scheduler: str) -> Iterator[Client]:
    try:
        client = Client(scheduler)
    except (OSError, TypeError, ValueError) as error:  # no answer, no certificate, no address
        raise PipelineError(
            f"no Dask scheduler answers at {scheduler} ({lines(error)[0]}): start one, or use local:N."
        ) from error
    with client:
        yield client


def _offers(worker: dict[str, Any], need: dict[str, float]) -> bool:
    return all(worker["resources"].get(name, 0) >= amount for name, amount in need.items())


def _words(resources: dict[str, float]) -> str:
    sizes = {name: f"{amount / 1e9:.1f} GB of {name}" for name, amount in resources.items() if amount > 1}
    return ", ".join(sizes.get(name, name) for name in resources)


def _follow(tasks: dict[str, Future], cells: dict[str, Node], say: Say) -> None:
    names = {task.key: name for name, task in tasks.items()}
    failed: dict[str, str] = {}
    for count, task in enumerate(as_completed(tasks.values()), start=1):
        if task.status == "finished":
            say(f"[{count}/{len(tasks)}] {names[task.key]}: built in {task.result().seconds:.0f} s")
        elif task.status == "error":
            failed[names[task.key]] = lines(task.exception())[0]
        else:
            raise PipelineError(
                "the scheduler is gone: start it and this command again; what was pushed is not built again."
            )
    skipped = {name for name in failed if failed.keys() & set(cells[name].needs)}
    for name, reason in failed.items():
        say(f"{name}: {'skipped' if name in skipped else f'failed: {reason}'}")
    if failed:
        built, own = len(tasks) - len(failed), len(failed) - len(skipped)
        raise PipelineError(f"{built} cells built and pushed, {own} failed, {len(skipped)} skipped.")


def _dvc(*arguments: str) -> None:
    if code := run_dvc(*arguments).returncode:
        raise PipelineError(f"dvc {' '.join(arguments)} ended with status {code}.")


def _git(*arguments: str) -> str:
    # Return what git prints; nothing when it fails, as it does for a remote that does not exist.
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.rstrip()
