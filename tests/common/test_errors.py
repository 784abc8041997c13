"""What a runtime's error says is told apart from lack of memory, which is no fault of the model."""

import re

import pytest

from pipeline.common.errors import refusal


def test_a_refusal():
    """A runtime's message of several lines becomes one."""
    assert refusal(RuntimeError("Exception from core.cpp:84:\n  the model is damaged\n\n")) == (
        "Exception from core.cpp:84: the model is damaged"
    )


@pytest.mark.parametrize(
    "message",
    [
        "Converting input model\nstd::bad_alloc\n\n",
        "Can not create file mapping for 8, err=Cannot allocate memory",
        "libopenvino_intel_cpu_plugin.so: failed to map segment from shared object",
        "[CPU] FullyConnected node with name '__module.model.layers.0.self_attn.qkv_proj' can't alloc",
        "Check 'ptr' failed at src/plugins/intel_cpu/src/cpu_memory.cpp:257:\nFailed to allocate 4608000 bytes",
        "Failed to allocate memory for requested buffer of size 4608000",
        "pthread_create failed, error code: 12 error msg: Cannot allocate memory",
        "bad allocation",
        "Not enough memory resources are available to complete this operation.",
        "CUDA out of memory",
    ],
)
def test_lack_of_memory(message):
    """However OpenVINO, ONNX Runtime and the systems report lack of memory, it is a MemoryError."""
    with pytest.raises(MemoryError, match=re.escape(message)):
        refusal(RuntimeError(message))
