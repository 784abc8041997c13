"""`phi3 build` on Dask clusters on this machine: results, killed workers and schedulers, failures, the remote, TLS."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from ruamel.yaml import YAML

from tests.helpers import edit, run

pytestmark = pytest.mark.slow
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
MODEL = "phi-3-mini-4k-instruct"
# This program replaces a stage: it writes its name and its inputs' content, and adds a line to the file `ran`.
CELL = """
import os, pathlib, signal, sys, time
import psutil
cell, out, *needed = sys.argv[1:]
ran = pathlib.Path({ran!r})
with ran.open("a") as stream:
    stream.write(cell + "\\n")
if cell == os.environ.get("KILLS_ITS_WORKER") and ran.read_text().splitlines().count(cell) == 1:
    runner = next(p for p in psutil.Process().parents() if "pipeline.cluster.worker" in p.cmdline())
    runner.parent().send_signal(signal.SIGKILL)
    time.sleep(60)
    pathlib.Path({ran!r}).with_name("outlived").touch()
if cell == os.environ.get("FAILS"):
    sys.exit(f"error: {{cell}}: no luck")
pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
pathlib.Path(out).write_text(cell + "".join(pathlib.Path(path).read_text() for path in needed))
print(cell, "wrote", out)
"""
DVC_YAML = """
stages:
  download:
    matrix: {model: "${build}"}
    cmd: python cell.py download artifacts/source
    deps: [cell.py]
    outs: [artifacts/source]
  quantize_openvino:
    matrix: {model: "${build}", variant: [openvino-int4, npu-int4-channelwise]}
    cmd: python cell.py ${item.variant} artifacts/${item.variant} artifacts/source
    deps: [cell.py, artifacts/source]
    outs: ["artifacts/${item.variant}"]
  validate:
    matrix: {model: "${build}", variant: [openvino-int4, npu-int4-channelwise]}
    cmd: python cell.py validate-${item.variant} metrics/${item.variant}.json artifacts/${item.variant}
    deps: [cell.py, "artifacts/${item.variant}"]
    metrics: ["metrics/${item.variant}.json": {cache: false}]
  report:
    matrix: {model: "${build}"}
    cmd: python cell.py report artifacts/report metrics/openvino-int4.json metrics/npu-int4-channelwise.json
    deps: [cell.py, metrics]
    outs: [artifacts/report]
"""
CELLS = [
    f"download@{MODEL}",
    f"quantize_openvino@{MODEL}-npu-int4-channelwise",
    f"quantize_openvino@{MODEL}-openvino-int4",
    f"report@{MODEL}",
    f"validate@{MODEL}-npu-int4-channelwise",
    f"validate@{MODEL}-openvino-int4",
]
TEXT = "".join(f"validate-{variant}{variant}download" for variant in ("openvino-int4", "npu-int4-channelwise"))


@pytest.fixture
def quick(project: Path) -> Path:
    """A project whose cells take no time, with a DVC remote that .dvc/config names."""
    edit(project / "params.yaml", "build: [tiny]", f"build: [{MODEL}]")
    (project / "dvc.yaml").write_text(DVC_YAML, "utf-8")
    (project / "cell.py").write_text(CELL.format(ran=str(project.parent / "ran")), "utf-8")
    (project.parent / "ran").touch()
    with (project / ".gitignore").open("a", encoding="utf-8") as stream:
        stream.write("/artifacts/\n")
    run("dvc", "remote", "add", "-d", "store", project.parent / "store", cwd=project)
    commit(project)
    return project


def commit(project: Path) -> None:
    """Commit all that is in `project`."""
    run("git", "add", "-A", cwd=project)
    run(*GIT, "commit", "-qm", "change", cwd=project)


def build(project: Path, scheduler: str, *targets: str, check: bool = True, **environment: str):
    """Run `phi3 build` without the check of what the cells need."""
    command = ("phi3", "build", "--scheduler", scheduler, *targets)
    return run(*command, cwd=project, check=check, PHI3_IGNORE_PLAN="1", **environment)


def ran(project: Path) -> list[str]:
    """Return the cells that have run so far, sorted."""
    return sorted((project.parent / "ran").read_text().splitlines())


def lock(project: Path) -> dict[str, Any]:
    """Return the content of dvc.lock as a dict, since the order of its cells is random."""
    return YAML(typ="safe").load(project / "dvc.lock")


def built(output: str) -> list[str]:
    """Return the cells that `phi3 build` says were built, sorted."""
    return sorted(re.findall(r"^\[\d+/\d+\] (\S+): built in \d+ s$", output, re.MULTILINE))


def test_a_killed_worker(quick):
    """A cell whose worker is killed is finished by another, and the result and dvc.lock are those of `dvc repro`.

    Every other cell runs once, and a second build runs nothing. After an edit in another clone only the cells that
    depend on it run. Outputs that dvc.lock names but that are nowhere to be found are built again.
    """
    first = build(quick, "local:2", KILLS_ITS_WORKER="openvino-int4").stdout
    assert built(first) == CELLS
    assert f"validate@{MODEL}-openvino-int4| validate-openvino-int4 wrote metrics/openvino-int4.json" in first
    once = ["download", "npu-int4-channelwise", "report", "validate-npu-int4-channelwise", "validate-openvino-int4"]
    assert ran(quick) == sorted([*once, "openvino-int4", "openvino-int4"])
    assert not (quick.parent / "outlived").exists()
    assert (quick / "artifacts/report").read_text() == f"report{TEXT}"
    serial = quick.parent / "serial"
    run("git", "clone", "-q", quick, serial, cwd=quick)
    run("dvc", "repro", "--no-run-cache", cwd=serial)
    assert lock(serial) == lock(quick)

    before = ran(quick)
    assert "cells to build" not in build(quick, "local:2").stdout
    commit(quick)  # metrics and dvc.lock; the other outputs are only on the remote
    clone = quick.parent / "clone"
    run("git", "clone", "-q", quick, clone, cwd=quick)
    edit(clone / "dvc.yaml", "cell.py report ", "cell.py another ")
    refused = build(clone, "local:2", check=False)
    assert refused.stderr.startswith("Error: dvc.yaml differs from the last commit, which workers build: commit or")
    assert ran(quick) == before
    commit(clone)
    assert built(build(clone, "local:2").stdout) == [f"report@{MODEL}"]
    assert ran(quick) == sorted([*before, "another"])

    shutil.rmtree(quick.parent / "store")
    shutil.rmtree(clone)
    run("git", "clone", "-q", quick, clone, cwd=quick)
    assert built(build(clone, "local:2", "quantize_openvino").stdout) == CELLS[:3]


def test_a_full_cache(quick, mount):
    """When the disk of DVC's cache is full, the build ends with an error that says so; once there is room it works."""
    cache = mount(quick / ".dvc/cache", 0.1)
    ballast = cache / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(cache).free)
    full = build(quick, "local:2", "quantize_openvino", check=False)
    assert (full.returncode, "No space left on device" in full.stderr) == (1, True)
    ballast.unlink()
    build(quick, "local:2", "quantize_openvino")


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
    assert (quick / "artifacts/report").read_text() == f"report{TEXT}"
    assert ran(quick).count("download") == 1


@contextmanager
def dask(
    folder: Path, protocol: str, *workers: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `dask scheduler`, and a `dask worker` for each item of `workers`; yield the scheduler and its address."""
    environment = os.environ | environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"{protocol}://127.0.0.1:{probe.getsockname()[1]}"
    options: dict[str, Any] = {"env": environment, "cwd": folder, "stdout": subprocess.DEVNULL}
    with (folder / "dask.log").open("ab") as log:
        scheduler = ["dask", "scheduler", "--host", address, "--dashboard-address", "127.0.0.1:0"]
        processes = [subprocess.Popen(scheduler, stderr=log, **options)]
        for resources in workers:
            worker = ["dask", "worker", address, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"]
            worker += ["--resources", resources] if resources else []
            processes.append(subprocess.Popen(worker, stderr=log, **options))
        try:
            yield processes[0], address
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)


def publish(project: Path) -> None:
    """Give `project` a git remote `origin` that contains its commit."""
    origin = project.parent / "origin.git"
    run("git", "clone", "-q", "--bare", project, origin, cwd=project)
    run("git", "remote", "add", "origin", origin, cwd=project)
    run("git", "fetch", "-q", "origin", cwd=project)


def test_a_killed_scheduler(quick, tmp_path):
    """The build prints the address of Dask's dashboard; when the scheduler dies the build says so, and the next one, on
    another cluster, does not repeat cells whose results were pushed."""
    publish(quick)
    with dask(tmp_path, "tcp", "", "") as (scheduler, address):
        command = ["phi3", "build", "--scheduler", address]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PHI3_IGNORE_PLAN": "1", "PATH": path, "PYTHONPATH": str(quick)}
        building = subprocess.Popen(
            command, cwd=quick, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert building.stdout is not None
        for line in building.stdout:
            if link := re.search(r"dashboard: (\S+)", line):
                with urlopen(link[1], timeout=30) as page:
                    assert b"<title>Dask Diagnostic UI</title>" in page.read()
            if line.startswith("[1/6] "):
                break
        scheduler.kill()
        _, errors = building.communicate(timeout=120)
        assert building.returncode == 1
        assert errors.splitlines()[-1].startswith("Error: the scheduler is gone: start it and this command again")
    with dask(tmp_path, "tcp", "") as (_, address):
        assert built(build(quick, address).stdout) == CELLS
    assert ran(quick).count("download") == 1


def test_tls_and_what_a_cell_needs(quick, tmp_path):
    """With certificates in Dask's configuration all traffic is encrypted and a client without them gets no answer; a
    cell that needs Windows goes to a worker that offers it."""
    report = "    cmd: python cell.py report"
    edit(quick / "dvc.yaml", report, "    meta: {needs: [windows]}\n" + report)
    commit(quick)
    publish(quick)
    subject = ("-subj", "/CN=localhost", "-days", "1", "-nodes", "-keyout", "key.pem", "-out", "cert.pem")
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, cwd=tmp_path)
    files = {"CERT": "cert.pem", "KEY": "key.pem"}
    tls = {f"{role}__{item}": file for role in ("SCHEDULER", "WORKER", "CLIENT") for item, file in files.items()}
    tls = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(tmp_path / file) for name, file in tls.items()}
    tls["DASK_DISTRIBUTED__COMM__TLS__CA_FILE"] = str(tmp_path / "cert.pem")
    tls["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "true"
    with dask(tmp_path, "tls", "", "windows=1", **tls) as (_, address):
        stranger = build(quick, address, check=False)
        assert stranger.returncode == 1
        assert stranger.stderr.startswith(f"Error: no Dask scheduler answers at {address}")
        done = build(quick, address, **tls)
        assert built(done.stdout) == CELLS
    local = build(quick, "local:1", f"report@{MODEL}", check=False)
    assert "cells to build" not in local.stdout  # every cell is built already


def test_a_remote_that_takes_nothing(quick, mount):
    """A DVC remote that is full or out of reach is a clear error; no file on it is truncated, and once there is space
    the next build continues."""
    store = mount(quick.parent / "store", 0.03)
    full = build(quick, "local:2", check=False)
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
    build(quick, "local:2")
    assert (quick / "artifacts/report").read_text() == f"report{TEXT}"
    assert ran(quick).count("download") == 1

    run("dvc", "remote", "modify", "store", "url", "/dev/null/store", cwd=quick)
    (quick / "cell.py").write_text((quick / "cell.py").read_text() + "\n")
    commit(quick)
    before = ran(quick)
    away = build(quick, "local:2", check=False)
    assert away.returncode == 1
    assert away.stderr.startswith("Error: the DVC remote cannot be read ([Errno 20] Not a directory: '/dev/null/store/")
    assert ran(quick) == before


def test_what_is_refused_before_any_work(quick):
    """A scheduler that does not answer, a commit that workers cannot clone, and a DVC remote that is missing or out of
    their reach are each refused with one sentence."""
    command = ("phi3", "build", "--scheduler")
    refused = run(*command, "tcp://127.0.0.1:9", cwd=quick, check=False)
    assert refused.stderr.startswith("Error: commit ")
    assert refused.stderr.endswith("is not on the git remote `origin`, where workers clone: push it.\n")
    publish(quick)
    refused = build(quick, "tcp://127.0.0.1:9", check=False)
    assert refused.stderr.startswith("Error: no Dask scheduler answers at tcp://127.0.0.1:9 (")
    run("dvc", "remote", "modify", "store", "url", "../store", cwd=quick)
    commit(quick)
    assert "is relative, and workers' clones are elsewhere" in build(quick, "local:1", check=False).stderr
    run("dvc", "remote", "remove", "store", cwd=quick)
    commit(quick)
    assert "share results by a DVC remote, and .dvc/config names none" in build(quick, "local:1", check=False).stderr
    assert ran(quick) == []


def test_a_cell_that_no_local_worker_can_hold(project):
    """Local workers share memory and disk, and a cell that does not fit into a share is refused with figures."""
    run("dvc", "remote", "add", "-d", "store", project.parent / "store", cwd=project)
    commit(project)
    refused = run("phi3", "build", "--scheduler", "local:500", "export_openvino", cwd=project, check=False)
    assert refused.returncode == 1
    assert re.search(
        r"Error: export_openvino@tiny-openvino-fp16 needs 0\.7 GB of memory, 0\.\d GB of disk, and each of 500 workers",
        refused.stderr,
    )


def test_real_cells_have_the_same_hashes(project):
    """Two workers build the same bytes as `dvc repro`, from a checkpoint that is only on the coordinator."""
    run("dvc", "remote", "add", "-d", "store", project.parent / "store", cwd=project)
    commit(project)
    clone = project.parent / "clone"
    run("git", "clone", "-q", project, clone, cwd=project)
    run("dvc", "repro", "build_onnx", cwd=clone)
    done = run("phi3", "build", "--scheduler", "local:2", "build_onnx", cwd=project)
    assert len(built(done.stdout)) == 4  # the FP16 IR, the calibration and the two variants
    assert "http://127.0.0.1:" in done.stdout  # the dashboard
    assert lock(project) == lock(clone)
