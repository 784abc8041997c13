"""`phi3 build` with a Dask scheduler and workers that run already."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.cluster.project import CELLS, build, built, publish, ran, settings
from tests.helpers import commit, edit, environment, run

pytestmark = pytest.mark.slow


@contextmanager
def dask(
    project: Path, *workers: str, protocol: str = "tcp", **more: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `dask scheduler`, and a `dask worker` for each item of `workers`, its resources, which its cells find in the
    variable WORKER; yield the scheduler and its address."""
    file = project.parent / "scheduler.json"
    variables = settings(project) | more
    with (project.parent / "dask.log").open("ab") as log:

        def start(*command: object, **own: str) -> subprocess.Popen[bytes]:
            options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": log, "cwd": project.parent}
            return subprocess.Popen(["dask", *command], env=environment(project, **variables | own), **options)

        host = ("--protocol", protocol, "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        processes = [start("scheduler", *host, "--scheduler-file", file)]
        for resources in workers:
            worker = ["--scheduler-file", file, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"]
            worker += ["--resources", resources] if resources else []
            processes.append(start("worker", *worker, WORKER=resources))
        try:
            while not file.exists() or not file.read_text().endswith("}"):
                assert processes[0].poll() is None
                time.sleep(0.05)
            yield processes[0], json.loads(file.read_text())["address"]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
            file.unlink(missing_ok=True)


def test_a_killed_scheduler(quick):
    """The build prints the address of Dask's dashboard; when the scheduler dies the build says so, and the next one, on
    another cluster, does not repeat cells whose results were pushed."""
    publish(quick)
    with dask(quick, "", "") as (scheduler, address):
        building = subprocess.Popen(
            ["phi3", "build", "--scheduler", address],
            cwd=quick,
            env=environment(quick, **settings(quick)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
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
    with dask(quick, "") as (_, address):
        assert built(build(quick, address).stdout) == CELLS
    assert ran(quick).count("download") == 1


def test_what_a_cell_needs(quick):
    """A cell that needs Windows goes to a worker that offers it."""
    validate = "    cmd: python cell.py validate"
    edit(quick / "dvc.yaml", validate, "    meta: {needs: [windows]}\n" + validate)
    commit(quick)
    publish(quick)
    with dask(quick, "", "windows=1") as (_, address):
        assert built(build(quick, address).stdout) == CELLS
    where = dict(line.split(" ") for line in (quick.parent / "ran").read_text().splitlines())
    needing = {cell: worker for cell, worker in where.items() if cell.startswith("validate-")}
    assert needing == {"validate-openvino-int4": "windows=1", "validate-npu-int4-channelwise": "windows=1"}


def test_tls(quick, tmp_path):
    """With certificates in Dask's configuration all traffic is encrypted, and a client without them gets no answer."""
    publish(quick)
    subject = ("-subj", "/CN=localhost", "-days", "1", "-nodes", "-keyout", "key.pem", "-out", "cert.pem")
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, cwd=tmp_path)
    files = {"CERT": "cert.pem", "KEY": "key.pem"}
    tls = {f"{role}__{item}": file for role in ("SCHEDULER", "WORKER", "CLIENT") for item, file in files.items()}
    tls = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(tmp_path / file) for name, file in tls.items()}
    tls["DASK_DISTRIBUTED__COMM__TLS__CA_FILE"] = str(tmp_path / "cert.pem")
    tls["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "true"
    with dask(quick, "", protocol="tls", **tls) as (_, address):
        assert address.startswith("tls://127.0.0.1:")
        stranger = build(quick, address, check=False, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="2s")
        assert stranger.returncode == 1
        assert stranger.stderr.startswith(f"Error: no Dask scheduler answers at {address}")
        assert built(build(quick, address, "download", **tls).stdout) == CELLS[:1]
