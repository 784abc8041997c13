"""Each mutation of tests/mutations.yaml makes the test that it names fail. `make mutants` runs this."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers import ROOT, commit, edit, run

MUTATIONS = YAML(typ="safe").load((ROOT / "tests/mutations.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the project as it is, in a git repository of its own, with the artifacts that were built."""
    copy = tmp_path_factory.mktemp("mutants") / "project"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for path in listed:
        if (ROOT / path).is_file():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy / path)
    run("git", "init", "-q", cwd=copy)
    commit(copy)  # `phi3 publish` names the commit
    shutil.copytree(ROOT / "artifacts", copy / "artifacts", dirs_exist_ok=True, copy_function=link)
    return copy


def link(source: str, target: str) -> None:
    """Let `target` be the file `source`, unless it is there already."""
    if not Path(target).exists():
        Path(target).hardlink_to(source)


def outcome(copy: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Run tests in the copy; smol-phi3's artifacts are taken as they are."""
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    return run(*pytest_, *names, cwd=copy, check=False, PHI3_TESTS_BUILT="1", PYTHONDONTWRITEBYTECODE="1")


def test_without_mutation(copy):
    """All of the tests pass in the copy."""
    result = outcome(copy, *sorted({mutation["test"] for mutation in MUTATIONS.values()}))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", MUTATIONS)
def test_found(copy, name):
    """A mutation makes its test fail."""
    mutation = MUTATIONS[name]
    file = copy / mutation["file"]
    before = file.read_text("utf-8")
    edit(file, mutation["old"], mutation["new"])
    try:
        result = outcome(copy, mutation["test"])
    finally:
        file.write_text(before, "utf-8")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
