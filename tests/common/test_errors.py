"""What a runtime's error says is told apart from lack of memory, which is no fault of the model, and so is a runtime
that does not load from one that is missing."""

import re

import pytest

from pipeline.common.errors import PipelineError, refusal, require_runtime


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


AGAIN = "pip install it again; on Windows, install the Microsoft Visual C++ Redistributable, too"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import no_such_module", "the model needs runtime==1: pip install it."),
        (
            "raise ImportError('in runtime.py:\\nDLL load failed')",
            f"the model needs runtime==1, which does not load (DLL load failed): {AGAIN}.",
        ),
        (
            "raise FileNotFoundError('no onnxruntime.dll, or one of its dependencies')",
            "the model needs runtime==1, which does not load (no onnxruntime.dll, or one of its dependencies): "
            f"{AGAIN}.",
        ),
    ],
    ids=["missing", "import", "library"],
)
def test_a_runtime_that_does_not_load(code, sentence, tmp_path, monkeypatch):
    """A runtime that is missing has another remedy than one that is installed and does not load."""
    (tmp_path / "broken_runtime.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PipelineError) as refused:
        require_runtime("broken_runtime", "the model needs runtime==1")
    assert str(refused.value) == sentence
