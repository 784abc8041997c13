"""Run onnxruntime-genai's builder in a fork of a process that has already imported its libraries, to save time."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.common.errors import PipelineError

# The builder's folder, which onnxruntime_genai.models puts on the path.
BUILDERS = str(Path(find_spec("onnxruntime_genai").origin).with_name("models"))
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["onnxruntime_genai.models", "builders"])


def stream_lines(arguments: list[str], *, env: dict[str, str]) -> Iterator[str]:
    """Do what `pipeline.common.programs.stream_lines` does with a module of Python."""
    read, write = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_run_module, args=(arguments[2:], env, write))
    process.start()
    write.close()
    with open(read.fileno(), closefd=False) as lines:
        for line in lines:
            print(line, end="")
            yield line
    process.join()
    if process.exitcode:
        raise PipelineError(f"{arguments[2]} failed: {line}")


def _run_module(arguments: list[str], environment: dict[str, str], output: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    output.close()
    sys.path.append(BUILDERS)  # lost, since a fork gets the path of the process that asks for it
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
