"""The one exception for users' mistakes and refused artifacts, and functions that put other errors in a sentence."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

FULL = 1 << 20  # bytes; a disk with less free space counts as full when a write fails
# How torch, OpenVINO, ONNX Runtime, the system and its loader report a lack of memory.
NO_MEMORY = re.compile(
    "bad.alloc|(can.t|cannot|failed to) alloc|(out of|not enough) memory|failed to map segment", re.IGNORECASE
)
REINSTALL = "pip install it again; on Windows, install the Microsoft Visual C++ Redistributable, too"


class PipelineError(Exception):
    """An error whose message is the sentence that the user reads: what failed, why, and what to do."""


def lines(error: BaseException) -> list[str]:
    """Return the lines of the message of `error`, or the name of its type when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()


def require_runtime(module: str, needs: str) -> None:
    """Import `module`; raise PipelineError, which begins with `needs`, when it is not installed or does not load."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise PipelineError(f"{needs}: pip install it.") from error
    except (ImportError, OSError) as error:  # onnxruntime-genai loads a library by ctypes, which raises OSError
        raise PipelineError(f"{needs}, which does not load ({lines(error)[-1]}): {REINSTALL}.") from error


def full_disk(error: Exception) -> str | None:
    """Return a sentence for the user when `error`, from this program or a library, means a full disk, else None."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not known and os.strerror(errno.ENOSPC) not in str(error):
        return None
    return f"the disk is full ({getattr(error, 'filename', None) or 'while writing'}): free some space and run again."


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Raise OSError when a full disk caused the block's RuntimeError: OpenVINO reports only that a stream failed."""
    try:
        yield
    except RuntimeError as error:
        if shutil.disk_usage(directory).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
        raise


def lacks_memory(error: Exception) -> bool:
    """Return whether a runtime's `error` means that memory ran out, which is no fault of the model."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def refusal(error: Exception) -> str:
    """Return the message of a runtime's `error` on one line; raise MemoryError when it means that memory ran out."""
    if lacks_memory(error):
        raise MemoryError(str(error)) from error
    return " ".join(str(error).split())
