"""What applications need: `open_registry` and `pull` get an artifact, and `load_chat` loads it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.chat import load_chat
    from pipeline.release.pull import pull
    from pipeline.release.registry import open_registry

__all__ = ["load_chat", "open_registry", "pull"]


def __getattr__(name: str) -> Any:
    # Import on first use, so that no stage loads what only applications need.
    modules = {"load_chat": "chat", "open_registry": "release.registry", "pull": "release.pull"}
    if name not in modules:
        raise AttributeError(name)
    return getattr(import_module(f"pipeline.{modules[name]}"), name)
