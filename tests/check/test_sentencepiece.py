"""Both runtimes read and write texts with a SentencePiece tokenizer, as Phi-3-mini's, as the source model does."""

import pytest

from pipeline.check.checks import check_chat_template, check_eos, check_tokenizer
from pipeline.check.measurement import load_runtime
from pipeline.check.reference import CHATS, TEXTS, Chat, Expected, Text
from pipeline.common.checkpoint import eos_token_ids
from pipeline.convert import onnx_genai, openvino
from pipeline.run.source_model import Torch
from tests.checkpoints import make_checkpoint, make_sentencepiece
from tests.convert.test_conversion import RECIPES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random checkpoint with a SentencePiece tokenizer, whose eos token generation_config.json does not name."""
    directory = make_checkpoint(tmp_path_factory.mktemp("sentencepiece") / "checkpoint", vocab_size=384)
    make_sentencepiece().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("variant", ["fp16", "cpu"])
def test_the_runtime_checks(checkpoint, tmp_path, variant):
    """Token ids, decoded texts, rendered chats and eos ids are the source's."""
    source = Torch(checkpoint)
    chats = [Chat(messages=messages, rendered=source.render_chat(messages)) for messages in CHATS]
    texts = [Text(text=t, ids=source.encode(t), decoded="") for t in (*TEXTS, *(chat.rendered for chat in chats))]
    expected = Expected(
        texts=[text.model_copy(update={"decoded": source.decode(text.ids)}) for text in texts],
        chats=chats,
        eos_token_ids=eos_token_ids(checkpoint),
        answers=[],
    )
    if variant == "fp16":
        openvino.export_fp16(checkpoint, tmp_path)
    else:
        onnx_genai.build_int4(checkpoint, tmp_path, recipe=RECIPES[variant], trust_remote_code=False, calibration=None)
    runtime = load_runtime(tmp_path, variant=RECIPES[variant])
    failures = [*check_tokenizer(runtime, expected), *check_chat_template(runtime, expected)]
    assert [*failures, *check_eos(runtime, expected)] == []
