"""Environments with the programs of others, made from the exact versions in the files of this folder."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path


def python_of(name: str) -> Path:
    """Return the Python of an environment that has exactly the packages of NAME.txt; it is made once per user."""
    versions = Path(__file__).with_name(f"{name}.txt")
    cache = user_cache_path("phi3-pipeline") / "test-environments"
    directory = cache / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    python, installed = directory / "bin/python", directory / "installed.txt"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not installed.exists() or installed.read_bytes() != versions.read_bytes():
            venv.create(directory, clear=True)
            pip_install(python, "--no-deps", "--requirement", versions)
            shutil.copy(versions, installed)
    return python


def pip_install(python: Path, *what: object) -> None:
    """Install `what` in the environment of `python`; most of its modules are never imported, so pip compiles none."""
    pip(python, "install", "--quiet", "--no-compile", *what)


def pip(python: Path, *arguments: object) -> str:
    """Run this environment's pip on the environment of `python`, which needs none, and return what it prints."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
