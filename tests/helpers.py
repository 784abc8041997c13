"""Functions of many tests: run programs, edit files, and build once what several processes of a test run need."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from filelock import FileLock
from huggingface_hub import constants

from pipeline.cli import main
from pipeline.common.params import Limits

ROOT = Path(__file__).parents[1]
LIMITS = Limits(kl_mean=1, kl_p99=9, top1_agreement=0.1, perplexity_ratio=2)  # of variants that are not judged
REPRODUCED = ("quantize_openvino@tiny-openvino-int4", "quantize_openvino@tiny-npu-int4-group128")  # in built_project
QUESTION, ANSWER = "What is the capital of Japan?", "The capital of Japan is Tokyo."  # of smol-phi3


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return this process's environment for a program of the project in `folder`, with `more` variables."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":  # mutmut counts the calls of its own process only
        more |= {"MUTANT_UNDER_TEST": ""}
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder)} | more


def run(*arguments: object, cwd: Path, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the tests' environment, and return the result with its output."""
    return subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        check=check,
        capture_output=True,
        text=True,
        env=environment(cwd, **more),
    )


def commit(folder: Path, message: str = "start") -> None:
    """Commit all files of `folder`, a repository of git."""
    run("git", "add", "-A", cwd=folder)
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", message, cwd=folder)


def phi3(
    *arguments: object, check: bool = True, typed: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command `phi3` in this process with `typed` as its standard input; the result is that of `run`."""
    result = CliRunner(env=environment).invoke(main, list(map(str, arguments)), input=typed)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    completed = subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)
    if check:
        completed.check_returncode()
    return completed


def edit(file: Path, old: str, new: str) -> None:
    """Replace every `old` in `file` by `new`; fail when there is none."""
    content = file.read_text("utf-8")
    assert old in content
    file.write_text(content.replace(old, new), "utf-8")


def edit_json(file: Path, **changes: Any) -> None:
    """Give keys of the JSON object in `file` new values."""
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `name`, which `build` fills once for all processes of a test run."""
    base = factory.getbasetemp()
    target = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{target}.lock"):
        if not target.exists():
            folder = factory.mktemp(name)
            build(folder)
            folder.rename(target)
    return target


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take the server at `url` for the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
