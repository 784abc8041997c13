"""A stage runs as a process that is locked, ends with its parent, and explains why it ends early."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.programs import stream_lines
from pipeline.supervisor import runs
from tests.helpers import ROOT

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
STAGE = """
import sys, time
sys.path.insert(0, {root!r})
from pipeline.common.errors import PipelineError
from pipeline.process import stage_command
from pipeline.common.progress import Bar, say

@stage_command
def main(model: str, variant: str) -> None:
    "Work on VARIANT of MODEL."
    say(f"working on {{model}} {{variant}}")
    {body}

main()
"""


@pytest.fixture
def stage(tmp_path):
    """Return a function that starts a stage with a given body, as `work.py` in an empty folder."""
    started = []

    def start(body, stdout=subprocess.PIPE):
        (tmp_path / "work.py").write_text(STAGE.format(root=str(ROOT), body=body))
        command = [sys.executable, "work.py", "m", "v"]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_work(process):
    """Wait until the stage's body runs."""
    assert process.stdout.readline() == "work@m-v: started\n"
    assert process.stdout.readline() == "working on m v\n"


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="the kernel gives huge pages to all, or to nobody",
)
def test_large_matrices_lie_in_huge_pages(stage):
    """A stage's large arrays lie in pages of 2 MB, so that the kernel has far fewer pages to clear."""
    body = "kept = b'x' * 100_000_000; say(open('/proc/self/smaps_rollup').read())"
    output, _ = stage(body).communicate(timeout=30)
    assert int(re.search(r"AnonHugePages: +(\d+) kB", output)[1]) > 50_000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise PipelineError('no: do that.')", "error: work@m-v: no: do that.\n"),
        (
            "raise OSError(28, 'No space left on device', 'x.bin')",
            "error: work@m-v: the disk is full (x.bin): free some space and run again.\n",
        ),
    ],
)
def test_errors_are_sentences(stage, body, message):
    """A refused input and a full disk end a stage with status 1 and one sentence, no traceback."""
    process = stage(body)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (1, message)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise MemoryError", "memory ran out"),
        ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: ...')", "memory ran out"),
        (
            "from pipeline.common.programs import stream_lines; list(stream_lines(['sh', '-c', 'kill -9 $$']))",
            "memory ran out",
        ),
        (
            "import resource, numpy; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9)); numpy.ones(10**9)",
            "memory ran out",
        ),
        ("import os; os.kill(os.getpid(), 9)", "it was killed, as systems do when memory runs out"),
    ],
)
def test_killed_for_memory(stage, body, what):
    """Lack of memory ends with a sentence that names the free memory, if an allocation fails or the kernel kills."""
    process = stage(body)
    _, errors = process.communicate(timeout=30)
    sentence = rf"error: work@m-v: {what}: \d+\.\d GB are free now\. Close other programs, or use a larger machine\.\n"
    assert process.returncode == 1
    assert re.fullmatch(sentence, errors), errors


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize("name", ["SIGABRT", "SIGSEGV"])
def test_a_crash(stage, tmp_path, name):
    """A library that crashes ends the stage with a sentence that points to the log, which has what it printed."""
    body = f"import os, signal; os.write(2, b'assertion failed'); os.kill(os.getpid(), signal.{name})"
    process = stage(body)
    _, errors = process.communicate(timeout=30)
    log = "artifacts/logs/work@m-v.log"
    assert process.returncode == 1
    assert errors == f"error: work@m-v: it was ended by {name}. The whole story is in {log}.\n"
    assert "assertion failed" in (tmp_path / log).read_text()


def test_done(stage):
    """A stage that succeeds says how long it took and its peak memory."""
    output, errors = stage("pass").communicate(timeout=30)
    assert errors == ""
    done = output.splitlines()[2]
    assert re.fullmatch(r"work@m-v: done in \d+\.\d s, peak memory \d+\.\d\d GB, anonymous \d+\.\d\d GB", done)


def test_log(stage, tmp_path):
    """The log has the output of libraries and programs, all that the screen shows, and the traceback of an error."""
    body = "print('aside'); import os; os.system('echo program; echo complaint >&2'); print(1 / 0)"
    output, errors = stage(body).communicate(timeout=30)
    log = tmp_path / "artifacts/logs/work@m-v.log"
    shown = "work@m-v: started\nworking on m v\n"
    assert output == shown
    sentence = "ZeroDivisionError: division by zero. The whole story is in artifacts/logs/work@m-v.log."
    assert errors == f"error: work@m-v: {sentence}\n"
    written = log.read_text()
    assert written.startswith(f"{shown}aside\nprogram\ncomplaint\nTraceback (most recent call last):\n")
    assert written.endswith("ZeroDivisionError: division by zero\n")


def test_progress_without_a_terminal(stage):
    """Without a terminal a long loop prints plain lines with its progress and the time left."""
    body = "import pipeline.common.progress as p; p.LINE_EVERY = 0; [i for i in Bar(range(10), desc='counting')]"
    output, errors = stage(body).communicate(timeout=30)
    assert errors == ""
    lines = output.splitlines()[2:-1]
    assert [re.sub(r"\d\d:\d\d", "T", line) for line in lines] == [
        *(f"counting: {n} of 10, T left" for n in range(1, 10)),
        "counting: 10 of 10 in T",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_in_a_terminal(stage):
    """In a terminal a long loop shows a bar with the time left, and other lines appear above it."""
    import termios

    leader, follower = os.openpty()
    termios.tcsetwinsize(leader, (24, 80))
    process = stage("[say(f'at {i}') or time.sleep(0.2) for i in Bar(range(5), desc='counting')]", stdout=follower)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while part := os.read(leader, 1000):
            shown += part
    os.close(leader)
    assert process.wait() == 0
    assert re.search(rb"\rcounting: +60%\|\S+ +\| 3/5 \[\d\d:\d\d<\d\d:\d\d, ", shown), shown
    assert b"\rat 4\r\n" in re.sub(rb"\r +", b"", shown), shown


def test_interrupt(stage):
    """Ctrl-C ends a stage with status 130 and one line."""
    process = stage("time.sleep(60)")
    wait_for_work(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "work@m-v: interrupted; nothing half-built was left, run again to continue.\n"


def test_terminated(stage):
    """SIGTERM to the process that was started ends the stage, too."""
    process = stage("time.sleep(60)")
    wait_for_work(process)
    process.terminate()
    process.communicate(timeout=30)  # both have closed their output
    assert process.returncode == 128 + signal.SIGTERM


def test_one_at_a_time(stage):
    """A second build of the same cell is refused while the first runs, and runs once the first was killed."""
    first = stage("time.sleep(60)")
    wait_for_work(first)
    second = stage("pass")
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 1
    assert errors == "error: work@m-v: another process is building this: wait for it to end, or stop it.\n"
    first.kill()
    first.wait()
    third = stage("pass")
    third.communicate(timeout=30)
    assert third.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a program that its parent died")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("shell", [[], [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]])
def test_ends_with_dvc(stage, tmp_path, shell):
    """When dvc is killed, the stage and the program that it runs end too, even if a shell between them lives on."""
    program = ["sh", "-c", "echo ready; exec sleep infinity"]
    body = f"from pipeline.common.programs import stream_lines; [say(line.strip()) for line in stream_lines({program})]"
    script = tmp_path / "work.py"
    script.write_text(STAGE.format(root=str(ROOT), body=body))
    command = [*shell, sys.executable, str(script), "m", "v"]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({command}, env=dict(DVC_STAGE='work'))"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for_work(parent)
    assert parent.stdout.readline() == "ready\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == len(shell[:1]) + 3  # the stage's supervisor, the stage, and its program
    parent.kill()
    try:
        while any(map(runs, family)):
            time.sleep(0.05)
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    parent.communicate()


def test_stream_lines(capsys):
    """A program's output is yielded and printed; when it fails its last lines are in the message."""
    program = "print('one'); print('two'); raise SystemExit({})"
    assert list(stream_lines([sys.executable, "-c", program.format(0)])) == ["one\n", "two\n"]
    with pytest.raises(PipelineError, match=rf"^{Path(sys.executable).name} failed: one / two\.$"):
        list(stream_lines([sys.executable, "-c", program.format(3)]))
    assert capsys.readouterr().out == "one\ntwo\n" * 2
    with pytest.raises(PipelineError, match=r"^json\.tool failed: .* / .*No such file or directory: '/no/file'\.$"):
        list(stream_lines([sys.executable, "-m", "json.tool", "/no/file"]))
