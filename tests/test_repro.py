"""`dvc repro` on a tiny model: nothing to do, one edited variant, killed, interrupted, another model."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.common.manifest import verify
from tests.helpers import REPRODUCED, commit, edit, environment, run

pytestmark = pytest.mark.slow


def ran(output: str) -> list[str]:
    """Return the cells that `dvc repro` ran (or would run)."""
    return re.findall(r"Running stage '([^']+)'", output)


def start(project: Path, **more: str) -> subprocess.Popen[str]:
    """Start `dvc repro export_openvino` as a terminal would: in a process group of its own."""
    return subprocess.Popen(
        ["dvc", "repro", "export_openvino"],
        cwd=project,
        env=environment(project, **more),
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read the output of `process` until a line has `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed")


def unfinished(project: Path) -> list[str]:
    """Return the names of artifact directories without a manifest, and of temporary ones."""
    folder = project / "artifacts/tiny"
    directories = [
        path for path in folder.iterdir() if path.is_dir() and path.name not in ("logs", "metrics", "calibration")
    ]
    return sorted(path.name for path in directories if not (path / "manifest.json").exists() or path.name[0] == ".")


def test_a_build(built_project):
    """A build runs each cell once, and makes sealed artifacts that share disk space with the cache."""
    cells = ["download@tiny", "calibrate@tiny", "export_openvino@tiny-openvino-fp16"]
    assert sorted(ran((built_project / "output").read_text())) == sorted([*cells, *REPRODUCED])
    for variant in ("source", "openvino-fp16", "openvino-int4", "npu-int4-group128"):
        manifest = verify(built_project / "artifacts/tiny" / variant)
        assert manifest.name == f"tiny/{variant}"
        assert manifest.eos_token_ids == [0, 1]
    achieved = manifest.recipe.achieved
    assert (achieved.int4_ratio, achieved.matrices["model.layers.0.mlp.down_proj.weight"]) == (
        1.0,
        "int4-sym-g128",
    )
    assert (built_project / "artifacts/tiny/openvino-int4/openvino_model.bin").stat().st_nlink > 1
    assert unfinished(built_project) == []


def test_build_again(built_project, tmp_path):
    """A second run does nothing, and after an edit of one variant's block only that variant is built again."""
    project = shutil.copytree(built_project, tmp_path / "copy")
    again = run("dvc", "repro", *REPRODUCED, cwd=project).stdout
    assert ran(again) == []
    assert again.endswith("Data and pipelines are up to date.\n")
    edit(project / "params.yaml", "ratio: 0.6", "ratio: 0.8")
    assert ran(run("dvc", "repro", *REPRODUCED, cwd=project).stdout) == [REPRODUCED[0]]


def test_killed_then_continued(project):
    """SIGKILL of dvc in the middle of an export ends the stage too, whichever shell dvc runs it with, and leaves no
    artifact without a manifest; the next run removes leftovers and completes."""
    for shell in ("/bin/sh", "/bin/bash"):
        process = start(project, SHELL=shell)
        wait_for(process, "exporting the IR")
        process.kill()
        process.communicate(timeout=60)  # the pipe closes only after the stage has ended too
        assert unfinished(project) == [".openvino-fp16.partial"]
    assert ran(run("dvc", "repro", "export_openvino", cwd=project).stdout) == ["export_openvino@tiny-openvino-fp16"]
    assert unfinished(project) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise SystemExit('error: no luck')", "error: no luck\n"),
        ("os.abort()", "error: download@tiny: it was ended by SIGABRT. The whole story is in artifacts/logs/"),
        ("os.kill(os.getpid(), 15)", "failed to reproduce 'download@tiny'"),
    ],
    ids=["fails", "crashes", "is terminated"],
)
def test_a_failed_stage_leaves_the_earlier_artifact(project, fault, message):
    """When a stage fails, crashes or is terminated under `dvc repro`, which removes its outputs first, the earlier
    artifact is there again."""
    source = project / "artifacts/tiny/source"
    run("dvc", "repro", "download", cwd=project)
    before = verify(source)
    edit(project / "stages/download.py", "    entry = ", f"    import os; {fault}\n    entry = ")
    failed = run("dvc", "repro", "download", cwd=project, check=False)
    assert failed.returncode != 0
    assert message in failed.stderr
    assert verify(source) == before


def test_interrupted(project):
    """Ctrl-C ends with a line that says so and a non-zero status, and leaves no temporary data."""
    process = start(project)
    wait_for(process, "exporting the IR")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "export_openvino@tiny-openvino-fp16: interrupted; nothing half-built was left" in output
    assert "Traceback" not in output
    assert unfinished(project) == []


def test_one_word_switches_the_model(project, tiny_checkpoint):
    """`dvc exp run -S 'build=[...]'` builds another model of the catalogue."""
    edit(project / "params.yaml", "build: [tiny]", "build: [smol-phi3]")
    commit(project)
    result = run("dvc", "exp", "run", "-S", "build=[tiny]", "download", cwd=project)
    assert ran(result.stdout) == ["download@tiny"]
    assert verify(project / "artifacts/tiny/source").name == "tiny/source"


def test_bad_params_are_refused_before_any_work(project):
    """A typo in params.yaml stops the first stage with one sentence, and nothing is built."""
    edit(project / "params.yaml", "min_recall", "min_recal")
    result = run("dvc", "repro", "download", cwd=project, check=False)
    assert result.returncode != 0
    assert (
        "error: download@tiny: params.yaml: validate: unknown key 'min_recal'; allowed here: prompts," in result.stderr
    )
    assert "Traceback" not in result.stderr + result.stdout
    assert not (project / "artifacts/tiny/source").exists()
