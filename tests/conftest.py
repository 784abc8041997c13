"""Fixtures of many tests: tiny checkpoints, smol-phi3's artifacts, a project, and registries on loopback."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.convert import onnx_genai
from pipeline.convert.openvino import export_fp16
from tests import forks
from tests.checkpoints import make_checkpoint
from tests.helpers import REPRODUCED, ROOT, built_once, commit, edit, run, use_hub
from tests.hub_registry_server import HubRegistryServer
from tests.oci_registry_server import OciRegistryServer

# A shell makes background programs ignore Ctrl-C, and the programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A test may be skipped for these reasons on a machine where everything is set up, such as CI's.
MAY_SKIP = re.compile("the kernel gives huge pages to all, or to nobody")
LONGEST = ("test_faults.py", "test_examples.py", "test_local.py", "test_device_check.py", "test_directml.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that take longest first, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With PHI3_TESTS_COMPLETE, as on CI, a test that is skipped makes the run fail, but for the reasons MAY_SKIP."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "PHI3_TESTS_COMPLETE" in os.environ and reporter:
        skipped = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
        if not all(map(MAY_SKIP.search, skipped)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what was skipped, and why."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        parts = [f"{count} ({reason})" for reason, count in reasons.items()]
        terminalreporter.write_line(f"Skipped, since this machine cannot run them: {'; '.join(parts)}")


@pytest.fixture(scope="session", autouse=True)
def builder_in_forks() -> Iterator[None]:
    """Let tests that call the ONNX backend start its builder in less time; stages start it as they do for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_genai, "stream_lines", forks.stream_lines)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint in the style of Phi-3-mini-4k."""
    return built_once(tmp_path_factory, "tiny", lambda folder: make_checkpoint(folder / "checkpoint")) / "checkpoint"


@pytest.fixture(scope="session")
def tiny_ir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP16 IR of the tiny random checkpoint."""
    return built_once(tmp_path_factory, "tiny-ir", lambda folder: export_fp16(tiny_checkpoint, folder))


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of EC keys: ours.pem and ours.pub, and somebody else's, others.pem and others.pub."""

    def make(folder: Path) -> None:
        for name in ("ours", "others"):
            run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem", cwd=folder)
            run("openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub", cwd=folder)

    return built_once(tmp_path_factory, "keys", make)


@pytest.fixture(scope="session")
def smol_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of smol-phi3, built by `dvc repro` if they are not there.

    With PHI3_TESTS_BUILT they are taken as they are, although the code has changed.
    """
    if "PHI3_TESTS_BUILT" not in os.environ:
        with FileLock(tmp_path_factory.getbasetemp().parent / "smol-phi3.lock"):  # `make test` runs two processes
            run("dvc", "repro", cwd=ROOT)
    return ROOT / "artifacts/smol-phi3"


@pytest.fixture(scope="session")
def released(smol_phi3: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that publishes a variant of smol-phi3 and returns where it was pulled to, once for all."""

    def release(variant: str) -> Path:
        def pull(folder: Path) -> None:
            registry, name = f"dir:{folder}/registry", f"smol-phi3/{variant}"
            run("phi3", "publish", name, "--to", registry, "--version", "1.0.0", cwd=ROOT)
            run("phi3", "pull", registry, name, "--to", folder / "model", cwd=ROOT, PHI3_CACHE=str(folder / "cache"))

        return built_once(tmp_path_factory, f"released-{variant}", pull) / "model"

    return release


@pytest.fixture
def project(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A git and DVC project like this one, in a folder of its own, that builds a tiny random model."""
    project = tmp_path / "project"
    for folder in ("pipeline", "stages"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".dvc").mkdir()
    for file in ("config", ".gitignore"):
        (project / ".dvc" / file).write_bytes((ROOT / ".dvc" / file).read_bytes())
    for file in ("dvc.yaml", "libraries.lock", "params.yaml", ".gitignore", ".dvcignore"):
        (project / file).write_bytes((ROOT / file).read_bytes())
    source = f"source: {{path: {json.dumps(str(tiny_checkpoint))}}}"
    tiny = f"  tiny:\n    {source}\n    license: MIT\n    group_size_fallback: error\n"
    edit(project / "params.yaml", "build: [smol-phi3]", "build: [tiny]")
    edit(project / "params.yaml", "models:\n", f"models:\n{tiny}")
    edit(project / "params.yaml", "calibrate: {max_new_tokens: 48}", "calibrate: {max_new_tokens: 8}")
    run("git", "init", "-q", cwd=project)
    commit(project)
    return project


@pytest.fixture
def built_project(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after `dvc repro` of REPRODUCED, made once, which tests must not change; its `output` has what DVC
    printed."""

    def build(folder: Path) -> None:
        shutil.copytree(project, folder / "project")
        done = run("dvc", "repro", *REPRODUCED, cwd=folder / "project")
        (folder / "project/output").write_text(done.stdout, "utf-8")

    return built_once(tmp_path_factory, "built-project", build) / "project"


@pytest.fixture
def mount():
    """Return a function that mounts a file system of some megabytes on a folder."""
    mounted = []

    def mount(folder: Path, megabytes: float) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        size = f"size={int(megabytes * 1e6)}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False).returncode:
            pytest.skip("only root can mount a small file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=False)


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[OciRegistryServer]:
    """An empty OCI registry without passwords."""
    with OciRegistryServer(tmp_path / "oci") as server:
        yield server


@pytest.fixture
def hub_registry() -> Iterator[HubRegistryServer]:
    """An empty Hub for publishing and pulling."""
    with HubRegistryServer() as server:
        yield server


@pytest.fixture
def hub(hub_registry: HubRegistryServer, monkeypatch: pytest.MonkeyPatch) -> HubRegistryServer:
    """The empty Hub, as the Hub of this process."""
    use_hub(hub_registry.url, monkeypatch)
    return hub_registry
