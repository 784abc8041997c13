"""Measure a program, and each stage that it runs: wall time, CPU time, memory, bytes written; and name the machine."""

import os
import platform
import re
import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import psutil

from pipeline.common.manifest import tool_versions

WORK = Path("bench/work")  # each bench builds in a folder of its own there
INTERVAL = 0.5  # seconds between samples
STAGE = re.compile(r"-m stages\.(.+)$")


@dataclass
class Cost:
    """Wall time and CPU time of all cores in seconds, peak memory and written data in bytes."""

    wall: float = 0.0
    cpu: float = 0.0
    anonymous: int = 0  # memory that the kernel cannot drop
    file_backed: int = 0  # mapped files, which the kernel can drop
    written: int = 0  # data sent to the disk

    def figures(self) -> dict[str, float]:
        """Return the figures for the table: seconds and gigabytes."""
        return {
            "wall_s": round(self.wall, 1),
            "cpu_s": round(self.cpu, 1),
            "anonymous_gb": round(self.anonymous / 1e9, 2),
            "file_backed_gb": round(self.file_backed / 1e9, 2),
            "written_gb": round(self.written / 1e9, 2),
        }


def measure(command: list[str], *, step: str, cwd: Path, log: Path, **environment: str) -> dict[str, Cost]:
    """Run `command` and return what it cost: as a whole, under `step`, and each stage of the pipeline that it ran.

    The output goes to the file `log`. Stages may run side by side. The memory of a stage is that of its largest
    process, as proc_pid_status(5) has it, since a library's fork shares its parent's pages; the whole is the sum of the
    stages. Shares (PSS) would count each page once, but asking for them holds up a process that has many.

    Raises subprocess.CalledProcessError when the command fails.
    """
    costs: dict[str, Cost] = defaultdict(Cost)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        done = threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, step, costs, done))
        sampler.start()
        process.wait()
        done.set()
        sampler.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    costs[step].wall = time.monotonic() - started
    return dict(costs)


def _sample(root: int, step: str, costs: dict[str, Cost], done: threading.Event) -> None:
    last = time.monotonic()
    while not done.wait(INTERVAL):
        try:
            family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        now: dict[str, Cost] = defaultdict(Cost)
        stages: dict[int, str] = {}
        for process in family:  # parents come before their children
            try:
                found = STAGE.search(" ".join(process.cmdline()))
                if stage := stages.get(process.ppid()) or (found[1] if found else None):
                    stages[process.pid] = stage
                folder = Path("/proc", str(process.pid))
                pages = dict(re.findall(r"(\w+):\s+(\d+) kB", (folder / "status").read_text("utf-8")))
                written = re.search(r"^write_bytes: (\d+)", (folder / "io").read_text("utf-8"), re.MULTILINE)
                cpu = sum(process.cpu_times()[:4])
            except (psutil.Error, OSError):
                continue  # the process has ended
            own = now[stage or step]
            own.anonymous = max(own.anonymous, int(pages.get("RssAnon", 0)) * 1024)
            own.file_backed = max(own.file_backed, int(pages.get("RssFile", 0)) * 1024)
            # The kernel adds an ended child's use to its parent; the child is no longer listed, so it counts once.
            own.written += int(written[1]) if written else 0
            own.cpu += cpu
        figures = ("anonymous", "file_backed", "written", "cpu")
        now[step] = Cost(**{figure: sum(getattr(cost, figure) for cost in now.values()) for figure in figures})
        seconds, last = time.monotonic() - last, time.monotonic()
        for name, cost in now.items():
            for figure in figures:
                setattr(costs[name], figure, max(getattr(costs[name], figure), getattr(cost, figure)))
            costs[name].wall += seconds


def require_free(directory: Path, size: float) -> None:
    """Raise click.ClickException when the disk of `directory` has less than `size` bytes free."""
    if (free := psutil.disk_usage(str(directory)).free) < size:
        raise click.ClickException(f"{directory} has {free / 1e9:.0f} GB free, {size / 1e9:.0f} GB are needed.")


def disk_used(directory: Path) -> int:
    """Return the bytes that the files below `directory` take on the disk; hard links count once."""
    blocks = {}
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            blocks[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(blocks.values())


def made_by(*packages: str) -> dict[str, str]:
    """Return the date, the machine and the versions of `packages`, to record where figures come from."""
    memory = psutil.virtual_memory().total
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {memory / 1e9:.0f} GB, {platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {version}" for name, version in tool_versions(*packages).items()),
    }
