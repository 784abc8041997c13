"""`phi3 build` with worker processes on this machine."""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.common.manifest import verify
from tests.cluster.project import CELLS, MODEL, REPORT, VARIANTS, build, built, lock, ran, settings, use_store
from tests.helpers import REPRODUCED, commit, edit, run

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)
def test_a_killed_worker(finished):
    """A cell whose worker is killed ends, and is finished by another worker; every other cell runs once."""
    assert built((finished / "output").read_text()) == CELLS
    once = ["download", "npu-int4-channelwise", "report", "validate-npu-int4-channelwise", "validate-openvino-int4"]
    assert ran(finished / "project") == sorted([*once, "openvino-int4", "openvino-int4"])
    orphan = int((finished / "pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        while "cell.py" in psutil.Process(orphan).cmdline():
            time.sleep(0.05)


def test_the_same_as_dvc_repro(finished, quick):
    """The results and dvc.lock are those of `dvc repro`."""
    run("dvc", "repro", "--no-run-cache", cwd=quick, **settings(quick))
    assert lock(quick) == lock(finished / "project")
    for project in (quick, finished / "project"):
        assert (project / "artifacts/report").read_text() == REPORT


def test_what_cells_print(finished):
    """Each line of a cell is printed with the cell's name before it."""
    line = f"validate@{MODEL}-openvino-int4| validate-openvino-int4 wrote metrics/openvino-int4.json"
    assert line in (finished / "output").read_text().splitlines()


def test_nothing_to_build(again):
    """What another clone has built is fetched, and nothing runs."""
    assert "cells to build" not in build(again, "local:2").stdout
    assert (again / "artifacts/report").read_text() == REPORT
    assert ran(again) == []


def test_an_edit(again):
    """After an edit only the cells that depend on it run."""
    edit(again / "dvc.yaml", "cell.py report ", "cell.py another ")
    commit(again)
    assert built(build(again, "local:2").stdout) == [f"report@{MODEL}"]
    assert ran(again) == ["another"]


def test_lost_outputs(again):
    """Outputs that dvc.lock names but that are nowhere to be found are built again."""
    shutil.rmtree(again.parent / "store")
    assert built(build(again, "local:2", CELLS[1]).stdout) == CELLS[:2]


def test_a_full_cache(quick, mount):
    """When the disk of DVC's cache is full, the build ends with an error that says so; once there is room it works."""
    cache = mount(quick / ".dvc/cache", 0.1)
    ballast = cache / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(cache).free)
    full = build(quick, "local:1", "download", check=False)
    assert (full.returncode, "No space left on device" in full.stderr) == (1, True)
    ballast.unlink()
    build(quick, "local:1", "download")


def test_a_failing_cell(quick):
    """Cells that depend on a failed cell are skipped and all others are built; status and summary say so, and the next
    build continues from there."""
    failed = build(quick, "local:2", check=False, FAILS="openvino-int4")
    assert failed.returncode == 1
    assert built(failed.stdout) == [CELLS[0], CELLS[1], CELLS[4]]
    assert failed.stderr.splitlines()[-1] == "Error: 3 cells built and pushed, 1 failed, 2 skipped."
    summary = failed.stdout.splitlines()[-3:]
    assert sorted(line for line in summary if line.endswith(": skipped")) == [
        f"{CELLS[3]}: skipped",
        f"{CELLS[5]}: skipped",
    ]
    assert any(line.startswith(f"{CELLS[2]}: failed: ") and "openvino-int4: no luck" in line for line in summary)
    build(quick, "local:2")
    assert (quick / "artifacts/report").read_text() == REPORT
    assert ran(quick).count("download") == 1


def test_a_full_remote(quick, mount):
    """A full DVC remote is a clear error; no file on it is truncated, and once there is space the next build
    continues."""
    store = mount(quick.parent / "store", 0.015)
    full = build(quick, "local:1", "quantize_openvino", check=False)
    assert full.returncode == 1
    assert "No space left on device" in full.stdout
    assert re.search(r"^Error: \d cells built and pushed, \d failed, \d skipped\.$", full.stderr, re.MULTILINE)
    objects = [path for path in (store / "files/md5").rglob("*") if path.is_file() and path.suffix != ".tmp"]
    assert objects
    for path in objects:
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name
    run("mount", "-o", "remount,size=9M", store, cwd=quick)
    # DVC 3.67.1 may take an unfinished file for the newest entry of its run cache, and would run the cell again.
    for unfinished in store.rglob("*.tmp"):
        unfinished.unlink()
    build(quick, "local:1", "quantize_openvino")
    assert [(quick / f"artifacts/{name}").read_text() for name in VARIANTS] == [f"{name}download" for name in VARIANTS]
    assert ran(quick).count("download") == 1


def test_without_an_activated_environment(project):
    """`phi3 build` runs DVC and `python` of dvc.yaml in its own environment, which need not be on PATH."""
    use_store(project, project.parent / "store")
    path = str(Path(shutil.which("git")).parent)
    run(sys.executable, "-m", "pipeline.cli", "build", "--scheduler", "local:1", "download", cwd=project, PATH=path)
    verify(project / "artifacts/tiny/source")


def test_real_cells_have_the_same_hashes(project, built_project):
    """Two workers build the same bytes as `dvc repro`, from a checkpoint that is only on the coordinator."""
    use_store(project, project.parent / "store")
    done = run("phi3", "build", "--scheduler", "local:2", REPRODUCED[0], cwd=project)
    assert built(done.stdout) == ["calibrate@tiny", "export_openvino@tiny-openvino-fp16", REPRODUCED[0]]
    assert "http://127.0.0.1:" in done.stdout  # the dashboard
    expected = lock(built_project)
    del expected["stages"][REPRODUCED[1]]
    assert lock(project) == expected
