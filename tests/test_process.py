"""A stage as a process: locked, ended with its parent, and clear when it ends early."""

import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.errors import PipelineError
from pipeline.process import stream_lines
from tests.conftest import ROOT

STAGE = """
import sys, time
sys.path.insert(0, {root!r})
from pipeline.errors import PipelineError
from pipeline.process import stage_command

@stage_command
def main(model: str, variant: str) -> None:
    "Work on VARIANT of MODEL."
    print("working on", model, variant, flush=True)
    {body}

main()
"""


@pytest.fixture
def stage(tmp_path):
    """Start a stage with a given body, as python file `work.py` in an empty folder."""
    started = []

    def start(body):
        (tmp_path / "work.py").write_text(STAGE.format(root=str(ROOT), body=body))
        command = [sys.executable, "work.py", "m", "v"]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_work(process):
    """Return when the stage's body runs."""
    assert process.stdout.readline() == "work@m-v: started\n"
    assert process.stdout.readline() == "working on m v\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise PipelineError('no: do that.')", "error: work@m-v: no: do that.\n"),
        (
            "raise OSError(28, 'No space left on device', 'x.bin')",
            "error: work@m-v: the disk is full (x.bin): free some space and run again.\n",
        ),
        (
            "raise MemoryError",
            "error: work@m-v: not enough memory: close other programs, or build on a machine with more.\n",
        ),
    ],
)
def test_errors_are_sentences(stage, body, message):
    """A refused input, a full disk and lack of memory end with status 1 and one sentence, no traceback."""
    process = stage(body)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (1, message)


def test_done(stage):
    """A stage that succeeds says how long it took and its peak memory."""
    output, errors = stage("pass").communicate(timeout=30)
    assert errors == ""
    done = output.splitlines()[2]
    assert re.fullmatch(r"work@m-v: done in \d\.\d s, peak memory 0\.\d\d GB, anonymous 0\.\d\d GB", done)


def test_interrupt(stage):
    """Ctrl-C ends a stage with status 130 and one line."""
    process = stage("time.sleep(60)")
    wait_for_work(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "work@m-v: interrupted; nothing half-built was left, run again to continue.\n"


def test_one_at_a_time(stage):
    """A second build of the same cell refuses while the first runs, and runs when the first was killed."""
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
@pytest.mark.parametrize("shell", [[], [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]])
def test_ends_with_dvc(stage, tmp_path, shell):
    """When dvc is killed the stage ends too, even behind a shell that lives on, and so does the program it runs."""
    body = "from pathlib import Path; from pipeline.process import stream_lines as run; "
    body += "list(run(['sleep', '61.5'], Path('l')))"
    (tmp_path / "work.py").write_text(STAGE.format(root=str(ROOT), body=body))
    command = [*shell, sys.executable, "work.py", "m", "v"]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({command}, env=dict(DVC_STAGE='work'))"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for_work(parent)
    while not running("61.5"):
        time.sleep(0.05)
    parent.kill()
    deadline = time.monotonic() + 10
    while (running("61.5") or running("work.py m v")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running("61.5")
    assert not running("work.py m v")
    parent.communicate()


def running(text):
    """Return whether a process with `text` in its command line runs."""
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if text in command and "subprocess.run" not in command:
            return True
    return False


def test_stream_lines_keeps_the_log_and_tells_the_end(tmp_path):
    """A program's output is yielded and kept; when it fails its last lines are in the message."""
    log = tmp_path / "logs/x.log"
    program = "print('one'); print('two'); raise SystemExit({})"
    assert list(stream_lines([sys.executable, "-c", program.format(0)], log)) == ["one\n", "two\n"]
    with pytest.raises(PipelineError, match=r"failed: one / two\. The whole log is .*x\.log\."):
        list(stream_lines([sys.executable, "-c", program.format(3)], log))
    assert log.read_text() == "one\ntwo\n"
