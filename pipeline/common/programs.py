"""Run other programs: yield their output line by line, report errors as sentences, and end them with this process."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.common.errors import PipelineError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
KILLED = -9  # the return code of a process that SIGKILL ended


def stream_lines(arguments: list[str], **options: Any) -> Iterator[str]:
    """Run a program, print its output, which goes to the stage's log, and yield it line by line.

    Raises PipelineError with the last lines of the output when the program fails, and MemoryError when it is killed,
    as the kernel does for lack of memory. The program ends with this process.
    """
    tail: list[str] = []
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
        **options,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                tail = [*tail[-4:], line.strip()]
                yield line
        except BaseException:
            process.kill()
            raise
    if process.returncode == KILLED:
        raise MemoryError
    if process.returncode != 0:
        program = arguments[2] if arguments[1:2] == ["-m"] else Path(arguments[0]).name
        raise PipelineError(f"{program} failed: {' / '.join(filter(None, tail))}.")


def run_dvc(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this environment's DVC, which need not be on PATH, with `options` of subprocess.run; return how it ended."""
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, env=os.environ | {"PATH": search_path()}, text=True, check=False, **options)


def search_path() -> str:
    """Return PATH with this interpreter's folder first, so that `python` in dvc.yaml is this interpreter."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
