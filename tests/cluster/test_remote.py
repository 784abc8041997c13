"""`phi3 build` with a Dask scheduler and workers that run already."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.cluster.project import CELLS, build, built, publish, ran, settings
from tests.helpers import commit, edit, environment, run

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Cluster:
    """A running `dask scheduler`, its address, and a function that adds a `dask worker` with the resources given, which
    its cells find in the variable WORKER."""

    scheduler: subprocess.Popen[bytes]
    address: str
    add_worker: Callable[[str], None]


@contextmanager
def dask(project: Path, *, protocol: str = "tcp", **more: str) -> Iterator[Cluster]:
    """Run `dask scheduler` and one `dask worker` without resources."""
    file = project.parent / "scheduler.json"
    variables = settings(project) | more
    processes = []
    with (project.parent / "dask.log").open("ab") as log:

        def start(*command: object, **own: str) -> None:
            options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": log, "cwd": project.parent}
            processes.append(
                subprocess.Popen(["dask", *command], env=environment(project, **variables | own), **options)
            )

        def add_worker(resources: str) -> None:
            worker = ["--scheduler-file", file, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"]
            start("worker", *worker, *(["--resources", resources] if resources else []), WORKER=resources)

        host = ("--protocol", protocol, "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        start("scheduler", *host, "--scheduler-file", file)
        add_worker("")
        try:
            while not file.exists() or not file.read_text().endswith("}"):
                assert processes[0].poll() is None
                time.sleep(0.05)
            yield Cluster(processes[0], json.loads(file.read_text())["address"], add_worker)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
            file.unlink(missing_ok=True)


@contextmanager
def building(project: Path, address: str, target: str) -> Iterator[subprocess.Popen[str]]:
    """Run `phi3 build` of `target` while the test reads what it prints."""
    command = ["phi3", "build", "--scheduler", address, target]
    variables = environment(project, **settings(project))
    with subprocess.Popen(
        command, cwd=project, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_scheduler(quick):
    """The build prints the address of Dask's dashboard; when the scheduler dies the build says so, and the next one, on
    another cluster, does not repeat cells whose results were pushed."""
    publish(quick)
    with dask(quick) as cluster, building(quick, cluster.address, "quantize_openvino") as process:
        for line in process.stdout:
            if link := re.search(r"dashboard: (\S+)", line):
                with urlopen(link[1], timeout=30) as page:
                    assert b"<title>Dask Diagnostic UI</title>" in page.read()
            if line.startswith("[1/3] "):
                break
        cluster.scheduler.kill()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert errors.splitlines()[-1].startswith("Error: the scheduler is gone: start it and this command again")
    with dask(quick) as cluster:
        assert built(build(quick, cluster.address, "quantize_openvino").stdout) == CELLS[:3]
    assert ran(quick).count("download") == 1


def test_what_a_cell_needs(quick):
    """A cell that needs Windows waits, and the build says so, until there is a worker that offers it."""
    validate = "    cmd: python cell.py validate"
    edit(quick / "dvc.yaml", validate, "    meta: {needs: [windows]}\n" + validate)
    commit(quick)
    publish(quick)
    with dask(quick) as cluster, building(quick, cluster.address, CELLS[5]) as process:
        for line in process.stdout:
            if line == f"{CELLS[5]} waits for a worker with windows\n":
                break
        cluster.add_worker("windows=1")
        printed, errors = process.communicate(timeout=120)
        assert (process.returncode, built(printed)) == (0, [CELLS[0], CELLS[2], CELLS[5]]), errors
    where = dict(line.split(" ") for line in (quick.parent / "ran").read_text().splitlines())
    assert where["validate-openvino-int4"] == "windows=1"


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
    with dask(quick, protocol="tls", **tls) as cluster:
        assert cluster.address.startswith("tls://127.0.0.1:")
        stranger = build(quick, cluster.address, check=False, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="2s")
        assert stranger.returncode == 1
        assert stranger.stderr.startswith(f"Error: no Dask scheduler answers at {cluster.address}")
        assert built(build(quick, cluster.address, "download", **tls).stdout) == CELLS[:1]
