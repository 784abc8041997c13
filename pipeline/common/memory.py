"""How much memory this process and its children take at their peak."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


def peak_memory() -> int:
    """Return the largest resident memory of this process or of any child that has ended, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    if sys.platform == "darwin":
        return max(own, children)
    # Linux carries ru_maxrss over from the program that started this one; VmHWM (proc_pid_status(5), kB) starts anew.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return max(int(status["VmHWM"].split()[0]), children) * 1024


@contextlib.contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """Yield a list of bytes of anonymous memory (which the kernel cannot drop), with a new sample twice a second.

    Mapped weights do not count: each figure is resident less shared memory, of this process or a child, whichever has
    more. The figures of processes are not added up, since a library's fork shares its parent's pages.
    """
    import psutil

    def anonymous() -> int:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        used = [process.memory_info() for process in family if process.is_running()]
        return max(memory.rss - getattr(memory, "shared", 0) for memory in used)

    samples, done = [anonymous()], threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            with contextlib.suppress(psutil.NoSuchProcess):
                samples.append(anonymous())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
