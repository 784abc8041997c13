"""Run this program once more as a child, and watch over it.

The kernel kills a process that takes too much memory without a message, so somebody has to be left to report it. And
when DVC is killed its stages should end, too; DVC starts them by a shell, which may survive (dash does).
"""

import contextlib
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil

from pipeline.common.programs import end_with_parent

PARENT = "PHI3_SUPERVISOR"  # in the child's environment, the process id of its supervisor
DVC = "DVC_STAGE"  # dvc sets this variable for its stages
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # glibc's manual, "Memory Allocation Tunables"
WATCHED_EVERY = 0.2  # seconds


def supervised() -> bool:
    """Return whether this process is the child of a supervisor; if it is, it ends together with it (Linux)."""
    supervisor = os.getppid()
    if os.environ.get(PARENT) != str(supervisor):
        return False
    end_with_parent()
    if os.getppid() != supervisor:  # it has died before
        raise SystemExit(1)
    return True


def supervise() -> int:
    """Run this program again, with huge pages, and return its exit status, which is negative if a signal ended it.

    SIGTERM is passed on, and Ctrl-C reaches the child from the terminal. When DVC, which started this process, ends,
    the child is terminated.
    """
    # A program that allocates and frees large matrices spends half its time while the kernel clears small pages. glibc
    # reads this setting only when a program starts.
    tunables = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES"), HUGE_PAGES]))
    signal.signal(signal.SIGINT, _do_nothing)
    dvc = _dvc()
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {PARENT: str(os.getpid()), "GLIBC_TUNABLES": tunables},
    )
    signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(WATCHED_EVERY if dvc else None)
        if dvc and not runs(dvc):
            child.terminate()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    # Unlike SIG_IGN, a handler is not inherited by the child.
    pass


def _dvc() -> psutil.Process | None:
    # The first ancestor without the variable that dvc sets for its stages is dvc itself.
    if DVC not in os.environ:
        return None
    for ancestor in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if DVC in ancestor.environ():
                continue
        return ancestor
    return None


def runs(process: psutil.Process) -> bool:
    """Return whether `process` has not ended; one whose parent has not asked for its status yet has ended, too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
