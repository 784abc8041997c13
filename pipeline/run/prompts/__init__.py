"""The prompts that ship with the project: `reference` to compare variants on, `calibration` to quantize with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ruamel.yaml import YAML

from pipeline.run.interface import Message


@dataclass(frozen=True)
class Prompt:
    """A chat that waits for the assistant's answer."""

    category: str
    messages: list[Message]


def load_prompts(name: Literal["reference", "calibration"]) -> list[Prompt]:
    """Return the prompts of the set `name`, in the order of its file."""
    content = YAML(typ="safe", pure=True).load((Path(__file__).parent / f"{name}.yaml").read_text("utf-8"))
    return [
        Prompt(category, _messages([chat] if isinstance(chat, str) else chat))
        for category, chats in content["chats"].items()
        for chat in chats
    ]


def _messages(turns: list[str]) -> list[Message]:
    return [{"role": "assistant" if index % 2 else "user", "content": turn.strip()} for index, turn in enumerate(turns)]
