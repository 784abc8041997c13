"""What a program costs: wall and CPU time, memory and bytes written, for each step that its processes name."""

import os
import re
import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL = 0.5  # seconds between samples
STAGE = re.compile(r"-m stages\.(.+)$")


@dataclass
class Cost:
    """Seconds, and bytes at their peak; `_wrote` and `_cpu` keep each process's last figure."""

    wall: float = 0.0
    anonymous: int = 0  # what the kernel cannot drop
    file_backed: int = 0  # mapped files, which it can
    _wrote: dict[int, int] = field(default_factory=dict)
    _cpu: dict[int, float] = field(default_factory=dict)

    @property
    def written(self) -> int:
        """Bytes given to the disk."""
        return sum(self._wrote.values())

    @property
    def cpu(self) -> float:
        """Seconds of all cores."""
        return sum(self._cpu.values())

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
    """Run `command` and return its cost, by step: `step`, and one for each stage of the pipeline that it starts.

    The output goes to the file `log`. Memory is the sum of its processes' proportional shares (PSS), so that pages
    which two of them share count once; proc_pid_smaps_rollup(5).

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
    stages = sum(cost.wall for name, cost in costs.items() if name != step)
    costs[step].wall = time.monotonic() - started - stages
    return dict(costs)


def _sample(root: int, step: str, costs: dict[str, Cost], done: threading.Event) -> None:
    last = time.monotonic()
    while not done.wait(INTERVAL):
        memory: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        try:
            family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        stages: dict[int, str] = {}
        for process in family:  # parents come before their children
            try:
                found = STAGE.search(" ".join(process.cmdline()))
                name = stages.get(process.ppid()) or (found[1] if found else step)
                if name != step:
                    stages[process.pid] = name
                folder = Path("/proc", str(process.pid))
                pages = dict(re.findall(r"(\w+): +(\d+) kB", (folder / "smaps_rollup").read_text("utf-8")))
                memory[name][0] += int(pages.get("Pss_Anon", 0)) * 1024
                memory[name][1] += int(pages.get("Pss_File", 0)) * 1024
                times = process.cpu_times()
                costs[name]._cpu[process.pid] = times.user + times.system
                written = re.search(r"write_bytes: (\d+)", (folder / "io").read_text("utf-8"))
                costs[name]._wrote[process.pid] = int(written[1]) if written else 0
            except (psutil.Error, OSError):
                continue  # it has ended
        now = time.monotonic()
        for name, (anonymous, file_backed) in memory.items():
            cost = costs[name]
            cost.anonymous, cost.file_backed = max(cost.anonymous, anonymous), max(cost.file_backed, file_backed)
            if name != step:
                cost.wall += now - last
        last = now


def disk_used(directory: Path) -> int:
    """Return the bytes that the files below `directory` take on the disk, hard links counted once."""
    blocks = {}
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            blocks[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(blocks.values())
