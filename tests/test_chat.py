"""A chat remembers all turns that the model has room for, and says what it forgets."""

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import openvino_genai
import pytest

from pipeline.chat import Conversation, OpenvinoChat
from pipeline.common.errors import PipelineError
from pipeline.run import blobs
from pipeline.run.blobs import Choice

CONTEXT = {"max_position_embeddings": 20}


def conversation(*, context=CONTEXT, longest_prompt=None):
    """Return a conversation in which each word is a token."""

    def count(messages):
        return sum(len(message["content"].split()) for message in messages)

    return Conversation(context, count=count, longest_prompt=longest_prompt)


def ask(chat, question, answer):
    """Ask and answer; return the contents that the model reads, the limit of the answer and the remark."""
    with chat.turn(question) as turn:
        turn.answer.append(answer)
    return [message["content"] for message in turn.messages], turn.limit, turn.result(at_limit=False)


def test_it_remembers():
    """Each turn reads all turns before it, and the answer has what room is left."""
    chat = conversation()
    assert ask(chat, "a b", "c d") == (["a b"], 18, None)
    assert ask(chat, "e f", "g h") == (["a b", "c d", "e f"], 14, None)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(("context", "longest_prompt"), [(CONTEXT, None), ({"max_position_embeddings": 99}, 19)])
def test_the_oldest_turns_go(context, longest_prompt):
    """When the model, or an NPU's prompt, has no room, the oldest turns are forgotten, which the user is told."""
    chat = conversation(context=context, longest_prompt=longest_prompt)
    ask(chat, "a b c", "d e f")
    ask(chat, "g h i", "j k l")
    read, limit, remark = ask(chat, "m n o p q r s t", "u")
    assert read == ["g h i", "j k l", "m n o p q r s t"]
    assert limit == context["max_position_embeddings"] - 14
    assert remark == "The conversation is longer than this model takes: its first 1 turns are forgotten."


def test_a_question_that_is_too_long():
    """A question longer than the context is refused, and the next one is answered with all turns before it."""
    chat = conversation()
    ask(chat, "a b", "c d")
    with pytest.raises(PipelineError, match="the question has 20 tokens, more than this model takes: shorten it"):
        ask(chat, "x " * 20, "never")
    assert ask(chat, "e f", "g h")[0] == ["a b", "c d", "e f"]


def test_an_answer_that_fails():
    """When the runtime fails or the user interrupts, neither the question nor a part of the answer is kept."""
    chat = conversation()
    with suppress(KeyboardInterrupt), chat.turn("a b") as turn:
        turn.answer.append("c")
        raise KeyboardInterrupt
    with pytest.raises(PipelineError, match=r"the runtime could not answer \(out of luck\)"), chat.turn("a b"):
        raise RuntimeError("out of luck")
    assert ask(chat, "e f", "g h")[0] == ["e f"]


def test_the_limit_of_an_answer():
    """An answer has at most 512 tokens; with LongRoPE it ends at the original limit, and the user is told why."""
    with conversation(context={"max_position_embeddings": 4096}).turn("a b") as turn:
        pass
    assert turn.limit == 512
    assert turn.result(at_limit=True) == "The answer ends here, after 512 tokens: ask the model to go on."
    longrope = {"max_position_embeddings": 131072, "original_max_position_embeddings": 40}
    with conversation(context=longrope).turn("a b") as turn:
        pass
    assert turn.limit == 39
    assert turn.result(at_limit=True).startswith("The answer ends here, at 40 tokens: from here on this model reads ")


@pytest.mark.parametrize("device", [None, "NPU"])
@pytest.mark.parametrize(
    ("options", "lengths"),
    [({"BLOB_PATH": "b", "WEIGHTS_PATH": "w"}, {"MAX_PROMPT_LEN": 3}), ({"MAX_PROMPT_LEN": 3}, {})],
    ids=["blob", "IR"],
)
def test_on_an_npu(tmp_path, monkeypatch, device, options, lengths):
    """An artifact for the NPU is loaded there as its blob and its lengths want it, also if the NPU is asked for."""
    loaded = []

    class Pipeline:
        def __init__(self, *arguments, **options):
            loaded.append((*arguments, options))

        def get_tokenizer(self):
            return self

        def apply_chat_template(self, messages, add_generation_prompt):
            return messages[-1]["content"]

        def encode(self, text, add_special_tokens):
            return SimpleNamespace(input_ids=np.zeros((1, len(text.split()))))

    monkeypatch.setattr(openvino_genai, "LLMPipeline", Pipeline)
    monkeypatch.setattr(blobs, "choose", lambda directory: Choice("NPU", options, "it fits", lengths))
    chat = OpenvinoChat(tmp_path, device=device, npu=True, context=CONTEXT)
    assert (loaded, chat.device) == ([(tmp_path, "NPU", options)], "it fits")
    with pytest.raises(PipelineError, match="the question has 4 tokens, more than this model takes"):
        chat.ask("a b c d", on_text=print)
