"""Choose the published artifact that suits this machine.

The module imports no ML library when it is loaded, since an application may have only one of the two runtimes.
"""

import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

from pipeline.common.errors import PipelineError
from pipeline.release.release import Release

Target = Literal["auto", "cpu", "gpu", "npu", "directml", "foundry"]
TARGETS: tuple[Target, ...] = get_args(Target)
LARGER = {"onnxruntime-genai": "onnxruntime-genai-winml"}  # the package that has the same module, with DirectML


def choose_release(releases: Iterable[Release], target: Target) -> tuple[Release, str]:
    """Return the release for `target` among `releases` of one model, and the reason; `auto` looks at the machine.

    When several suit, it is the smallest of those whose runtime is installed, because every published artifact has met
    its limits. Where no runtime is installed, it is the smallest of all, and the reason says what it needs.

    Raises PipelineError when none suits.
    """
    offered = list(releases)
    wanted, reason = best_device() if target == "auto" else (target, "asked for")
    for device in (wanted, "cpu") if target == "auto" else (wanted,):
        fitting = [release for release in offered if suits(release, device)]
        if fitting:
            loadable = [release for release in fitting if not missing(release)]
            best = min(loadable or fitting, key=lambda release: release.size)
            if len(fitting) > 1:
                reason += f"; the smallest of {len(loadable or fitting)} for {device}"
            if device != "foundry" and (lacking := missing(best)):  # Foundry Local has a runtime of its own
                reason += f"; it needs {', '.join(lacking)}, which is not installed"
            return best, reason
    names = ", ".join(sorted(release.name for release in offered)) or "nothing"
    raise PipelineError(f"nothing for {wanted} is published there, only {names}: name one of them.")


def suits(release: Release, device: str) -> bool:
    """Return whether `release` is made for `device`: cpu, gpu, npu, directml or foundry."""
    if device == "foundry":  # built without DirectML, on Windows, too
        return "onnxruntime-genai" in release.requires
    directml = "onnxruntime-genai-winml" in release.requires
    if device == "directml" or directml:
        return directml and device == "directml"
    return device.upper() in release.devices


def missing(release: Release) -> list[str]:
    """Return the packages that `release` requires, without those that are installed or whose larger form is."""
    return [
        package
        for package in release.requires
        if not any(map(installed_version, (package, LARGER.get(package, package))))
    ]


def installed_version(package: str) -> str | None:
    """Return the version of `package`, or None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def best_device() -> tuple[str, str]:
    """Return the best device of this machine, and how it was recognised."""
    if openvino := openvino_devices():
        for device in ("NPU", "GPU"):
            if device in openvino:
                return device.lower(), f"OpenVINO sees {', '.join(openvino)}"
        return "cpu", f"OpenVINO sees {', '.join(openvino)}"
    if Path("/dev/accel/accel0").exists():
        return "npu", "/dev/accel/accel0 is an NPU"
    if sys.platform == "win32":
        return "directml", "Windows has DirectML, and openvino is not installed to look for an NPU"
    return "cpu", "no NPU was found, and openvino is not installed to look for a GPU"


def openvino_devices() -> list[str]:
    """Return the kinds of the devices that OpenVINO sees, such as CPU, GPU and NPU; none where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return []
    import openvino

    return [str(device).split(".")[0] for device in openvino.Core().available_devices]
