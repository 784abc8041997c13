"""Foundry Local, Microsoft's runtime of ONNX models: the file that names a model, and the call that registers it."""

from pathlib import Path
from typing import Any

from pipeline.release.release import RELEASE, read_release

INFERENCE_MODEL = "inference_model.json"
CONTENT = "{Content}"  # where Foundry Local puts the text of a message
CONVERSATION = ("system", "user", "assistant", "user")


def model_id(model: str, variant: str, version: str) -> str:
    """Return the name of a release in Foundry Local.

    Foundry Local's versions are whole numbers, so ours is a part of the name, and theirs is always 1.
    """
    return f"{model}-{variant}-{version}:1"


def inference_model(directory: Path, *, name: str) -> dict[str, Any]:
    """Return the content of inference_model.json for the ONNX model in `directory`: its name and its prompt template.

    The prompt template comes from the chat template of the model's tokenizer. `prompt` is what the model reads before
    it answers a single message. `system`, `user` and `assistant` are the turns of a conversation, as in the entries of
    Foundry Local's catalog. Where the chat template knows no such turns, `assistant` is the bare text.

    Format: https://github.com/microsoft/Foundry-Local/blob/v0.7.0/docs/how-to/compile-models-for-foundry-local.md
    """
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    try:
        turns = _turns(tokenizer)
    except TemplateError:  # the chat template refuses a role
        turns = {}
    prompt = CONTENT.join(_around(tokenizer, "user", answer=True))
    return {"Name": name, "PromptTemplate": (turns or {"assistant": CONTENT}) | {"prompt": prompt}}


def _turns(tokenizer: Any) -> dict[str, str]:
    # Return the turn of each role without the line break after it, or nothing where turns cannot be told apart.
    around = _around(tokenizer, *CONVERSATION, answer=True)
    if len(around) != len(CONVERSATION) + 1:  # the chat template leaves a role out
        return {}
    starts, ends = around[:1], []
    for count, between in enumerate(around[1:-1], start=1):
        end = _around(tokenizer, *CONVERSATION[:count], answer=False)[-1]
        if not between.startswith(end):  # Phi-3's template writes the eos token after the last message
            end = end.removesuffix(tokenizer.eos_token)
        ends.append(end)
        starts.append(between.removeprefix(end))
    if starts[1] != starts[3]:  # the first user's turn is not like the second's
        return {}
    return {CONVERSATION[i]: f"{starts[i]}{CONTENT}{ends[i]}".removesuffix("\n") for i in range(3)}


def _around(tokenizer: Any, *roles: str, answer: bool) -> list[str]:
    # Return the texts before, between and after the contents of messages of these roles.
    messages = [{"role": role, "content": CONTENT} for role in roles]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)).split(CONTENT)


def registration(directory: Path) -> str:
    """Return the call by which an application registers the pulled ONNX model in `directory` with Foundry Local."""
    release = read_release((directory / RELEASE).read_bytes(), origin=str(directory))
    metadata = "ModelInfoBuilder().set_string_property('task', 'chat-completion')"
    model = model_id(release.model, release.variant, release.version)
    return f"get_catalog(CatalogType.LOCAL).register_model({str(directory)!r}, {model!r}, {metadata})"
