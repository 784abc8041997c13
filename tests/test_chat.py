"""A chat remembers all turns that the model has room for, and says what it forgets."""

import sys
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import openvino_genai
import pytest

from pipeline.chat import Conversation, OnnxChat, OpenvinoChat, load_chat
from pipeline.common.errors import PipelineError
from pipeline.common.files import digest
from pipeline.common.manifest import Runtime, seal
from pipeline.device_check import check_device
from pipeline.release.release import Release
from pipeline.run import blobs
from pipeline.run.blobs import Choice
from tests.helpers import ROOT, phi3, run
from tests.manifests import variant_manifest

# This program runs an example with a runtime whose answer is an arrow.
EXAMPLE = """
import runpy, sys
from unittest.mock import MagicMock
runtime = MagicMock()
runtime.LLMPipeline().generate = lambda history, streamer, **options: streamer("→") or MagicMock()
runtime.Generator().is_done.side_effect = [False, True]
runtime.Tokenizer().create_stream().decode.return_value = "→"
sys.modules |= dict.fromkeys(["pipeline", "openvino_genai", "onnxruntime_genai"], runtime)
sys.argv[1:] = ["dir:registry", "What leads from left to right?"]
runpy.run_path("chat.py", run_name="__main__")
"""
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


def test_an_answer_begins_without_a_space(monkeypatch):
    """The space that onnxruntime-genai puts before the first word is not a part of the answer."""
    runtime, said = MagicMock(), []
    runtime.Tokenizer().encode.return_value = [5, 6]
    runtime.Tokenizer().create_stream().decode.side_effect = ["", " The", " end"]
    runtime.Generator().is_done.side_effect = [False, False, False, True]
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", runtime)
    OnnxChat(ROOT, directml=False, context=CONTEXT).ask("What comes last?", on_text=said.append)
    assert said == ["", "The", " end"]


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


@pytest.mark.parametrize(
    ("package", "module"), [("openvino-genai", "openvino_genai"), ("onnxruntime-genai", "onnxruntime_genai")]
)
@pytest.mark.parametrize("load", [load_chat, check_device])
def test_a_runtime_that_does_not_load(tmp_path, monkeypatch, load, package, module):
    """When a library that the runtime needs is missing, a chat and a check say that, and not to install the runtime."""
    directory = tmp_path / "model"
    directory.mkdir()
    runtime = Runtime(requires={package: "1"}, devices=["CPU"])
    seal(directory, variant_manifest("tiny/int4", runtime=runtime))
    files = {"manifest.json": digest(directory / "manifest.json")}
    release = Release(
        model="tiny", variant="int4", version="1.0.0", devices=["CPU"], requires={package: "1"}, files=files
    )
    (directory / "release.json").write_bytes(release.content())
    (tmp_path / f"{module}.py").write_text("raise ImportError('DLL load failed: the module could not be found.')")
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PipelineError) as refused:
        load(directory)
    assert str(refused.value) == (
        f"{directory} needs {package}==1, which does not load (DLL load failed: the module could not be found.): "
        "pip install it again; on Windows, install the Microsoft Visual C++ Redistributable, too."
    )


def test_a_question_that_is_refused(tmp_path, monkeypatch):
    """The command tells why a question has no answer, and takes the next one; remarks go to the standard error."""

    def ask(question, on_text):
        if question == "too long":
            raise PipelineError("this question has 900 tokens")
        on_text("Tokyo.")
        return "The answer ends here."

    monkeypatch.setattr("pipeline.chat.load_chat", lambda directory, device: SimpleNamespace(ask=ask, device="CPU"))
    result = phi3("chat", tmp_path, typed="too long\nWhich?\n\n")
    assert result.stdout == "\nTokyo.\n"
    for said in ("loaded for CPU\n", "this question has 900 tokens\n", "The answer ends here.\n"):
        assert said in result.stderr


@pytest.mark.parametrize("example", ["openvino-chat", "onnxruntime-chat"])
def test_an_example_into_a_pipe_of_windows(example):
    """A character that the code page of Windows lacks does not end an example whose output is redirected."""
    result = run(sys.executable, "-c", EXAMPLE, cwd=ROOT / "examples" / example, PYTHONIOENCODING="cp1252")
    assert (result.stdout, result.stderr) == ("?\n", "")
