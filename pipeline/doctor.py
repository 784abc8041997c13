"""Find what in this machine and its settings will make a build, a pull or an application fail, and name remedies."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import REINSTALL, lines
from pipeline.common.paths import ARTIFACTS
from pipeline.dvc_yaml import DVC_FILE, LIBRARIES
from pipeline.release.device import installed_version

LOCK = Path("requirements.lock")  # it includes LIBRARIES
LEAST_FREE = 9e9  # bytes that building smol-phi3 takes
TIMEOUT = 5  # seconds


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and the remedy if that is a problem."""

    subject: str
    found: str
    remedy: str | None = None


def examine() -> Iterator[Finding]:
    """Yield the findings of all checks; outside a project's folder, only of those that matter to applications."""
    yield from _packages()
    yield from _openvino()
    yield from _onnxruntime()
    if DVC_FILE.exists():
        yield from _npu_compiler()
        yield from _cache()
        yield from _remotes()
    yield from _hub()


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding("python", python, None if supported else "use Python 3.11 to 3.13")
    if not LOCK.exists():
        return
    locked = LOCK.read_text("utf-8").splitlines() + Path(LIBRARIES).read_text("utf-8").splitlines()
    lines = [line for line in locked if line and not line.startswith(("#", "-"))]
    here = [wanted for wanted in map(Requirement, lines) if wanted.marker is None or wanted.marker.evaluate()]
    differing = []
    for wanted in here:
        installed = installed_version(wanted.name)
        if installed is None or not wanted.specifier.contains(installed, prereleases=True):
            differing.append(f"{wanted.name} {installed or 'missing'} instead of {str(wanted.specifier)[2:]}")
    remedy = f"pip install --no-deps -r {LOCK}" if differing else None
    yield Finding("packages", "; ".join(differing) or f"{len(here)} as in {LOCK}", remedy)


def _openvino() -> Iterator[Finding]:
    if not (installed := installed_version("openvino")):
        yield Finding("openvino", "not installed", "pip install openvino-genai, to run OpenVINO artifacts")
        return
    try:
        import openvino
    except ImportError as error:
        yield _unloadable("openvino", installed, error, package="openvino")
        return
    core = openvino.Core()
    devices = [f"{device} ({core.get_property(device, 'FULL_DEVICE_NAME')})" for device in core.available_devices]
    yield Finding("openvino", f"{installed}, devices: {', '.join(devices)}")


def _onnxruntime() -> Iterator[Finding]:
    packages = ("onnxruntime-genai", "onnxruntime-genai-winml")
    found = [f"{name} {number}" for name in packages if (number := installed_version(name))]
    if not found:
        yield Finding("onnxruntime", "not installed", "pip install onnxruntime-genai, to run ONNX artifacts")
        return
    try:
        import onnxruntime
    except ImportError as error:
        package = "onnxruntime-windowsml" if installed_version("onnxruntime-genai-winml") else "onnxruntime"
        yield _unloadable("onnxruntime", ", ".join(found), error, package=package)
        return
    yield Finding("onnxruntime", f"{', '.join(found)}, providers: {', '.join(onnxruntime.get_available_providers())}")


def _unloadable(subject: str, installed: str, error: ImportError, *, package: str) -> Finding:
    remedy = f"pip install {package}" if isinstance(error, ModuleNotFoundError) else REINSTALL
    return Finding(subject, f"{installed}, which does not load ({lines(error)[-1]})", remedy)


def _npu_compiler() -> Iterator[Finding]:
    from pipeline.convert.npu import compiler, wine

    if compiler.has_native_compiler():
        yield Finding("NPU compiler", "native")
    else:
        reason = wine.unavailable()
        yield Finding("NPU compiler", "none" if reason else "under Wine", reason)


def _cache() -> Iterator[Finding]:
    from dvc.repo import Repo

    free = shutil.disk_usage(".").free
    yield Finding(
        "disk",
        f"{free / 1e9:.0f} GB free",
        None if free > LEAST_FREE else f"{LEAST_FREE / 1e9:.0f} GB are needed for the smallest model: free some space",
    )
    with Repo() as repo:
        cache = Path(repo.cache.local_cache_dir)
    try:
        with (
            tempfile.NamedTemporaryFile(dir=_existing(cache)) as file,
            tempfile.TemporaryDirectory(dir=_existing(ARTIFACTS)) as folder,
        ):
            Path(folder, "link").hardlink_to(file.name)
    except OSError as error:
        yield Finding(
            "cache",
            f"no hard links from {cache} to {ARTIFACTS}/ ({error.strerror}): each artifact takes its space twice",
            "give `dvc cache dir` a folder on this disk, or move the project to a file system that has hard links",
        )
    else:
        yield Finding("cache", f"shares the disk with {ARTIFACTS}/ by hard links")


def _existing(path: Path) -> Path:
    # Return `path`, or the folder in which it would be made.
    return next(place for place in (path, *path.parents) if place.exists())


def _remotes() -> Iterator[Finding]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo() as repo:
        names = list(repo.config["remote"])
        for name in names:
            try:
                remote = repo.cloud.get_remote(name)
                remote.fs.exists(remote.path)
                there = remote.fs.protocol != "local" or Path(remote.path).is_dir()
                yield Finding(
                    f"remote {name}",
                    remote.path if there else f"{remote.path} is not there",
                    None if there else "mount or create it, or remove it with `dvc remote remove`",
                )
            except (DvcException, OSError) as error:
                yield Finding(f"remote {name}", str(error).splitlines()[0], "check the network and its credentials")
    if not names:
        yield Finding("remotes", "none: artifacts stay on this machine until `dvc remote add`")


def _hub() -> Iterator[Finding]:
    import httpx
    from huggingface_hub import constants

    settings = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    shown = [f"{name}={'(set)' if 'TOKEN' in name else _without_password(value)}" for name, value in settings.items()]
    yield Finding("settings", ", ".join(sorted(shown)) or "no HF_* variable is set")
    endpoint = _without_password(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "offline by HF_HUB_OFFLINE: only what is in the cache can be used")
        return
    try:
        httpx.get(constants.ENDPOINT, timeout=TIMEOUT)
        yield Finding("Hub", f"{endpoint} answers")
    except httpx.HTTPError as error:
        reason = str(error).strip() or type(error).__name__
        found = f"{endpoint} does not answer ({reason})"
        yield Finding("Hub", found, "check the network, set HF_ENDPOINT, or HF_HUB_OFFLINE=1 to work without")


def _without_password(value: str) -> str:
    return re.sub(r"//[^/@]*@", "//(password)@", value)
