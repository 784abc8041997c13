"""Chats with tiny models that reach the limits of the context."""

import pytest

from pipeline.chat import OnnxChat, OpenvinoChat
from pipeline.common.errors import PipelineError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant", ["fp16", "cpu"])
def test_a_chat_with_longrope(longrope, variant, monkeypatch):
    """A chat ends an answer that would cross the limit, says so, and continues with the next turn. A model for CPUs
    runs on the CPU even if there is DirectML."""
    context = longrope.limits()
    if variant == "fp16":
        chat = OpenvinoChat(longrope.root / variant, device="CPU", npu=False, context=context)
    else:
        monkeypatch.setattr("onnxruntime_genai.is_dml_available", lambda: True)
        chat = OnnxChat(longrope.root / variant, directml=False, context=context)
    assert chat.device == "CPU"
    first, second = [], []
    assert chat.ask("water is wet 0123", on_text=first.append) == (
        "The answer ends here, at 64 tokens: from here on this model reads the whole conversation with other rotary "
        "factors. Ask it to go on."
    )
    chat.ask("the capital of France is Paris and water is wet. " * 6, on_text=second.append)
    assert "".join(first)
    assert "".join(second)


@pytest.mark.parametrize("variant", ["fp16", "cpu"])
def test_a_chat_remembers(window, variant, monkeypatch):
    """A chat's second answer is that to the whole conversation; a long chat forgets its oldest turns and says so."""
    monkeypatch.setattr("pipeline.chat.MAX_NEW_TOKENS", 8)

    def load_chat():
        if variant == "fp16":
            return OpenvinoChat(window.root / variant, device="CPU", npu=False, context=window.limits())
        return OnnxChat(window.root / variant, directml=False, context=window.limits())

    def answer_of(chat, question):
        said = []
        remark = chat.ask(question, on_text=said.append)
        assert remark == "The answer ends here, after 8 tokens: ask the model to go on."
        return "".join(said)

    chat, said = load_chat(), []
    first, second = "water is wet", "the capital of France"
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": answer_of(chat, first)}]
    answer = answer_of(chat, second)
    other = load_chat()
    assert answer_of(other, second) != answer  # without the first turn
    other._conversation.messages = messages
    assert answer_of(other, second) == answer
    question = "the capital of France is Paris and water is wet. " * 3
    remarks = [chat.ask(question, on_text=said.append) for _ in range(12)]
    assert remarks[-1].startswith("The conversation is longer than this model takes: its first 1 turns are forgotten.")
    with pytest.raises(PipelineError, match="tokens, more than this model takes"):
        chat.ask("water " * 600, on_text=said.append)
