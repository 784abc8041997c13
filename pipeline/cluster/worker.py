"""What a worker does with a cell: clone the project, pull the cell's inputs, run `dvc repro` on it alone, and push.

Outputs are pushed before their entry in the run cache, so that all outputs that the run cache names exist.

Run as a program in the clone, this module runs the DVC commands in one process, since each start of DVC takes seconds.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.common.errors import PipelineError
from pipeline.common.programs import search_path, stream_lines
from pipeline.graph import Node

TOPIC = "phi3-build"
LOCK = Path("dvc.lock")
_busy = threading.Lock()  # a worker has one clone, however many threads


@dataclass(frozen=True)
class Origin:
    """Where workers clone from, which commit, and environment variables that must be the same in all builds."""

    repository: str
    commit: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Built:
    """The results of a cell that later cells need: its entry in dvc.lock, and the texts that git keeps, not DVC."""

    lock: dict[str, Any]
    texts: dict[str, str]
    seconds: float = 0.0  # that the worker took


def read_built(node: Node, project: Path) -> Built:
    """Return the results of `node` from the project in the directory `project`."""
    lock = YAML(typ="safe").load(project / LOCK)["stages"][str(node.cell)]
    return Built(lock, {path: (project / path).read_text("utf-8") for path in node.uncached})


def run_cell(node: Node, needed: dict[str, Built], *, origin: Origin, disk: float) -> Built:
    """Build the cell `node` in this Dask worker's clone; each line that it prints becomes an event of TOPIC.

    `needed` has the results of the cells that it depends on, `disk` is the number of bytes of disk that it takes.

    Raises PipelineError with the last lines when a command fails.
    """
    from distributed import get_worker

    worker, started = get_worker(), time.monotonic()
    # A scheduler may get cells of several projects.
    repository = hashlib.sha256(origin.repository.encode()).hexdigest()[:16]
    clone = Path(worker.local_directory).absolute() / f"clone-{repository}"
    with _busy:
        if clone.exists() and shutil.disk_usage(clone).free < disk:
            shutil.rmtree(clone)  # the results of earlier cells are on the remote
        _check_out(origin, clone)
        lock = {"schema": "2.0", "stages": {name: built.lock for name, built in needed.items()}}
        with (clone / LOCK).open("w", encoding="utf-8") as stream:
            YAML().dump(lock, stream)
        for built in needed.values():
            for path, text in built.texts.items():
                (clone / path).parent.mkdir(parents=True, exist_ok=True)
                (clone / path).write_text(text, "utf-8", newline="\n")  # on Windows, too: DVC hashes it
        command = [sys.executable, "-m", __name__, str(node.cell), *needed]
        # The events have every line; a local worker's own output would show it twice.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            for line in stream_lines(command, cwd=clone, env=_environment(origin)):
                worker.log_event(TOPIC, [str(node.cell), line.rstrip()])
        return replace(read_built(node, clone), seconds=time.monotonic() - started)


def _check_out(origin: Origin, clone: Path) -> None:
    if not clone.exists():
        _git("clone", "--quiet", "--no-checkout", origin.repository, str(clone))
    checkout = ("-C", str(clone), "checkout", "--quiet", "--force", "--detach", origin.commit)
    try:
        _git(*checkout)
    except PipelineError:  # the commit is newer than the clone
        _git("-C", str(clone), "fetch", "--quiet", "origin")
        _git(*checkout)
    _git("-C", str(clone), "clean", "-ffdxq", "--exclude=.dvc")  # files of other cells; DVC's cache has them


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"git {' '.join(arguments)} failed: {' '.join(done.stderr.split())}")


def _environment(origin: Origin) -> dict[str, str]:
    # Leave out the variables with which Dask limits its workers to one thread.
    from dask.config import get

    kept = {name: value for name, value in os.environ.items() if name not in get("distributed.nanny.pre-spawn-environ")}
    return kept | origin.environment | {"PATH": search_path()}


def _dvc(cell: str, *needed: str) -> int:
    from dvc.cli import main
    from dvc.repo import Repo

    commands = [["pull", "--force", *needed]] if needed else []
    for command in (*commands, ["repro", "--single-item", "--pull", cell], ["push", cell]):
        if code := int(main(command)):
            return code
    with Repo() as repo:  # `dvc push` leaves out files in git, but the run cache names them
        for stage in repo.stage.collect(cell):
            hashes = [out.hash_info for out in stage.outs if not out.use_cache]
            if failed := repo.cloud.push(hashes).failed:
                print(f"error: {len(failed)} files could not be pushed to the DVC remote")
                return 1
    return int(main(["push", "--run-cache", cell]))


if __name__ == "__main__":
    sys.exit(_dvc(*sys.argv[1:]))
