"""What applications need.

`open_registry` and `pull` get an artifact, `suggest` chooses the one for a device, `load_chat` loads it, and
`verify_release` hashes it again. Each of them raises a PipelineError when it refuses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.chat import load_chat
    from pipeline.common.errors import PipelineError
    from pipeline.release.pull import pull, suggest, verify_release
    from pipeline.release.registry import open_registry

__all__ = ["PipelineError", "load_chat", "open_registry", "pull", "suggest", "verify_release"]


def __getattr__(name: str) -> Any:
    # Import on first use, so that no stage loads what only applications need.
    if name not in __all__:
        raise AttributeError(name)
    modules = {"PipelineError": "common.errors", "load_chat": "chat", "open_registry": "release.registry"}
    return getattr(import_module(f"pipeline.{modules.get(name, 'release.pull')}"), name)
