"""Run a stage as a process: one at a time per artifact, ended together with `dvc repro`, with errors as sentences."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import click
from filelock import FileLock, Timeout

from pipeline.common.errors import PipelineError, full_disk, lacks_memory, lines
from pipeline.common.memory import anonymous_memory, peak_memory
from pipeline.common.paths import ARTIFACTS, log
from pipeline.common.programs import KILLED, run_dvc
from pipeline.common.progress import logged, say
from pipeline.graph import Cell
from pipeline.supervisor import DVC, supervise, supervised

LOCK_TIMEOUT = 2  # seconds, enough for a killed stage to end


def stage_command(function: Callable[..., None]) -> click.Command:
    """Return the command of a stage: it has the name of `function`'s module, and its parameters as arguments.

    A PipelineError, a full disk, lack of memory or an error in a library ends the command with one sentence and status
    1, Ctrl-C with status 130. What libraries print and the traceback of their errors are in the cell's log.
    """
    stage = function.__module__.rsplit(".", 1)[-1] if function.__module__ != "__main__" else Path(sys.argv[0]).stem
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    @functools.wraps(function)
    def run(**arguments: str) -> None:
        from pipeline.plan import require  # loaded only when a stage runs

        cell = Cell(stage, **arguments)
        if sys.platform != "win32" and not supervised():
            _explain(cell, supervise())
        started = time.monotonic()
        try:
            with _lock(cell), logged(log(str(cell))), anonymous_memory() as anonymous:
                say(f"{cell}: started")
                require(cell)
                function(**arguments)
        except PipelineError as error:
            _fail(f"{cell}: {full_disk(error) or error}")
        except KeyboardInterrupt:
            _fail(f"{cell}: interrupted; nothing half-built was left, run again to continue.", status=130)
        except Exception as error:
            if lacks_memory(error):
                _fail(f"{cell}: {_lack_of_memory('memory ran out', cell)}")
            unknown = f"{type(error).__name__}: {lines(error)[0]}. The whole story is in {log(str(cell))}."
            _fail(f"{cell}: {full_disk(error) or unknown}")
        seconds = time.monotonic() - started
        memory = f"{peak_memory() / 1e9:.2f} GB, anonymous {max(anonymous) / 1e9:.2f} GB"
        click.echo(f"{cell}: done in {seconds:.1f} s, peak memory {memory}")

    command = click.command(name=stage, help=function.__doc__)(run)
    for name in names:
        command = click.argument(name)(command)
    return command


def _explain(cell: Cell, status: int) -> NoReturn:
    # End this process as the child ended, whose exit `status` it is.
    if status:
        _restore_outputs()
    if status == KILLED:
        _fail(f"{cell}: {_lack_of_memory('it was killed, as systems do when memory runs out', cell)}")
    if status < 0 and status != -signal.SIGTERM:
        _fail(f"{cell}: it was ended by {signal.Signals(-status).name}. The whole story is in {log(str(cell))}.")
    raise SystemExit(status if status >= 0 else 128 - status)


def _restore_outputs() -> None:
    # DVC removes the outputs of a stage before it runs the stage; those of the last success are still in its cache.
    # When there are none, or the stage wrote new ones before it failed, DVC refuses, and nothing changes.
    if stage := os.environ.get(DVC):
        run_dvc("checkout", "--quiet", stage, stdin=subprocess.DEVNULL, capture_output=True)


def _lack_of_memory(what: str, cell: Cell) -> str:
    from pipeline.plan import available, needed

    need = needed(cell)
    figures = f"it needs some {need.memory / 1e9:.1f} GB, " if need else ""
    figures += f"{available().memory / 1e9:.1f} GB are free now"
    return f"{what}: {figures}. Close other programs, or use a larger machine."


@contextlib.contextmanager
def _lock(cell: Cell) -> Iterator[None]:
    path = ARTIFACTS / ".locks" / f"{cell}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=LOCK_TIMEOUT):
            yield
    except Timeout:
        raise PipelineError("another process is building this: wait for it to end, or stop it.") from None


def _fail(message: str, *, status: int = 1) -> NoReturn:
    click.echo(f"error: {message}" if status == 1 else message, err=True)
    # The message must appear even if a library's thread or atexit hook hangs afterwards.
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(status)
