"""Torch computes on a GPU if there is one, or on the device that the environment names."""

import pytest
import torch

from pipeline.common.errors import PipelineError
from pipeline.run.torch_device import torch_device


def test_the_device(monkeypatch):
    """A CUDA GPU is used if there is one, else the CPU; the environment variable overrides this."""
    monkeypatch.delenv("PHI3_TORCH_DEVICE", raising=False)
    monkeypatch.setattr(
        torch, "empty", lambda size, *, device: torch.zeros(size).to("meta") if device == "cuda" else torch.zeros(size)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device() == torch.device("meta")
    monkeypatch.setenv("PHI3_TORCH_DEVICE", "cpu")
    assert torch_device() == torch.device("cpu")
    monkeypatch.delenv("PHI3_TORCH_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:7", "tpu"])
def test_a_device_that_is_not_there(monkeypatch, name):
    """A device that torch does not have is refused with a sentence that names the variable."""
    monkeypatch.setenv("PHI3_TORCH_DEVICE", name)
    with pytest.raises(PipelineError, match=rf"PHI3_TORCH_DEVICE={name}: torch cannot use this device \("):
        torch_device()
