"""The artifact that suits a device is found, and the choice is explained."""

import openvino
import pytest

from pipeline.common.errors import PipelineError
from pipeline.common.files import File
from pipeline.release import device
from pipeline.release.device import best_device, choose_release, suits
from pipeline.release.release import Release


def release(variant, size, devices, package="openvino-genai"):
    """A release of `size` bytes for `devices`."""
    return Release(
        model="m",
        variant=variant,
        version="1.0.0",
        devices=devices,
        requires={package: "1"},
        files={"x": File(size=size, sha256="0" * 64)},
    )


FP16, INT4 = release("openvino-fp16", 8, ["CPU", "GPU"]), release("openvino-int4", 3, ["CPU", "GPU"])
NPU = release("npu-int4", 2, ["NPU"])
DIRECTML = release("onnx-directml-int4", 2, ["GPU"], "onnxruntime-genai-winml")
ALL = [FP16, INT4, NPU, DIRECTML]


@pytest.mark.parametrize(("target", "chosen"), [("cpu", INT4), ("gpu", INT4), ("npu", NPU), ("directml", DIRECTML)])
def test_asked_for(target, chosen):
    """A device gets the smallest release made for it; DirectML's models suit DirectML alone."""
    assert choose_release(ALL, target)[0] == chosen
    assert not suits(INT4, "directml")
    assert [suits(DIRECTML, name) for name in ("cpu", "gpu", "npu", "directml")] == [False, False, False, True]


def test_the_runtime_that_is_installed():
    """A release whose runtime is not installed is chosen only when there is no other, and the reason says so."""
    lacking = release("onnx-cpu-int4", 1, ["CPU"], "onnxruntime-nowhere")
    assert choose_release([*ALL, lacking], "cpu") == (INT4, "asked for; the smallest of 2 for cpu")
    reason = "asked for; it needs onnxruntime-nowhere, which is not installed"
    assert choose_release([lacking], "cpu") == (lacking, reason)


def test_the_runtime_with_directml_has_the_cpu_too(monkeypatch):
    """Where only the packages for DirectML are installed, the CPU gets the ONNX model, which they load, and no IR."""
    packages = {"onnxruntime-genai-winml": "0.18.0", "onnxruntime-windowsml": "1.30.0"}
    monkeypatch.setattr(device, "installed_version", packages.get)
    onnx = release("onnx-cpu-int4", 4, ["CPU"], "onnxruntime-genai")
    assert choose_release([*ALL, onnx], "cpu") == (onnx, "asked for; the smallest of 1 for cpu")


def test_foundry_has_a_runtime_of_its_own():
    """Foundry Local gets the ONNX model for CPUs, whether or not its packages are installed here, and no other."""
    onnx = release("onnx-cpu-int4", 4, ["CPU"], "onnxruntime-genai")
    assert choose_release([*ALL, onnx], "foundry") == (onnx, "asked for")
    lacking = Release(**vars(onnx) | {"requires": {"onnxruntime-genai": "1", "nowhere": "1"}})
    assert choose_release([lacking], "foundry") == (lacking, "asked for")
    with pytest.raises(PipelineError, match=r"^nothing for foundry is published there, only m/npu-int4, m/onnx-direct"):
        choose_release([NPU, DIRECTML], "foundry")


def test_nothing_suits():
    """When no release suits a device, the message names those that are published."""
    with pytest.raises(PipelineError, match="nothing for npu is published there, only m/openvino-fp16: name one"):
        choose_release([FP16], "npu")


def test_several_packages_are_missing():
    """All packages that are missing, and all releases that are published, are named."""
    lacking = Release(**vars(INT4) | {"requires": {"nowhere-1": "1", "nowhere-2": "1"}})
    assert choose_release([lacking], "cpu")[1] == "asked for; it needs nowhere-1, nowhere-2, which is not installed"
    with pytest.raises(PipelineError, match="only m/openvino-fp16, m/openvino-int4: name"):
        choose_release([INT4, FP16], "npu")
    with pytest.raises(PipelineError, match="nothing for npu is published there, only nothing: name"):
        choose_release([], "npu")


def test_an_npu_that_linux_shows(monkeypatch):
    """Without OpenVINO, Linux' device file shows that there is an NPU."""
    monkeypatch.setattr(device, "openvino_devices", list)
    monkeypatch.setattr(device.Path, "exists", lambda path: str(path) == "/dev/accel/accel0")
    assert best_device() == ("npu", "/dev/accel/accel0 is an NPU")


@pytest.mark.parametrize(
    ("devices", "platform", "chosen"),
    [
        (["CPU", "GPU.0", "NPU"], "linux", ("npu", "OpenVINO sees CPU, GPU, NPU")),
        (["CPU", "GPU.0", "GPU.1"], "linux", ("gpu", "OpenVINO sees CPU, GPU, GPU")),
        (["CPU"], "win32", ("cpu", "OpenVINO sees CPU")),
        (["CPU", "TEMPLATE"], "linux", ("cpu", "OpenVINO sees CPU, TEMPLATE")),
        ([], "win32", ("directml", "Windows has DirectML, and openvino is not installed to look for an NPU")),
        ([], "linux", ("cpu", "no NPU was found, and openvino is not installed to look for a GPU")),
    ],
)
def test_auto_looks_at_the_machine(devices, platform, chosen, monkeypatch):
    """The best device that OpenVINO sees is chosen; without OpenVINO the operating system decides."""
    monkeypatch.setattr(device, "openvino_devices", lambda: [name.split(".")[0] for name in devices])
    monkeypatch.setattr(device.sys, "platform", platform)
    assert best_device() == chosen


def test_the_devices_of_openvino(monkeypatch):
    """OpenVINO is asked for its devices, without their numbers; where it is not installed there are none."""
    assert device.openvino_devices() == [name.split(".")[0] for name in openvino.Core().available_devices]
    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU", "GPU.0"])
    assert device.openvino_devices() == ["CPU", "GPU"]
    monkeypatch.setattr(device.importlib.util, "find_spec", {"openvino": None}.get)
    assert device.openvino_devices() == []


def test_auto_falls_back_to_the_cpu(monkeypatch):
    """When nothing is published for the best device, the CPU's release is chosen."""
    monkeypatch.setattr(device, "best_device", lambda: ("npu", "there is one"))
    assert choose_release([FP16, INT4], "auto") == (INT4, "there is one; the smallest of 2 for cpu")
