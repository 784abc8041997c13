"""A tiny Phi-3 checkpoint on a Hub, and a client that downloads it, in this process or in one of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants, snapshot_download
from safetensors.numpy import save

from pipeline.common.errors import PipelineError
from pipeline.common.manifest import Checkpoint, HubOrigin
from pipeline.common.params import Source
from pipeline.source import fetch_checkpoint
from tests.helpers import ROOT, environment, use_hub
from tests.hub_server import HubServer

REPO = "acme/tiny-phi3"
COMMIT = "c0ffee" * 6 + "1234"
OTHER_COMMIT = "beef" * 10
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CHUNK = 10 * 1024 * 1024  # the client reads this many bytes before it writes them to the disk
CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_phi3.Config"},
    "vocab_size": 3000,
    "hidden_size": 1000,
    "intermediate_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "tie_word_embeddings": True,
}
NORM = {"model.norm.weight": np.arange(1000, dtype=np.float32)}
EMBEDDING = {"model.embed_tokens.weight": np.arange(3_000_000, dtype=np.float32).reshape(3000, 1000)}
WANTED = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "LICENSE": b"MIT License\n",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": dict.fromkeys(NORM, FIRST) | dict.fromkeys(EMBEDDING, SECOND)}
    ).encode(),
    FIRST: save(NORM),
    SECOND: save(EMBEDDING),  # 12 MB, more than one of the client's chunks
}
UNWANTED = {
    "README.md": b"# Tiny\n",
    "consolidated.pth": b"pickle",
    "modeling_phi3.py": b"raise SystemExit('ran code')\n",
    "onnx/model.onnx": b"onnx",
    "onnx/model.safetensors": b"not of the top folder",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
}
ORIGIN = HubOrigin(hub=REPO, revision=COMMIT)


class Client:
    """Downloads from a server with a target and a Hugging Face cache of its own, without pauses between tries."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.target, self.cache = folder, folder / "target", folder / "cache"
        self.target.mkdir()
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # else a process's first request is another
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def fetch(
        self, url: str, *, repo: str = REPO, revision: str = COMMIT, offline: bool = False, **source: bool
    ) -> Checkpoint:
        """Download the checkpoint, and return its origin."""
        use_hub(url, self.monkeypatch)
        self.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        block = {"hub": {"repo": repo, "revision": revision, **source}}
        return fetch_checkpoint(Source.model_validate(block), self.target)

    def refusal(self, url: str, **options: Any) -> str:
        """Return the sentence with which `fetch` ends."""
        with pytest.raises(PipelineError) as refused:
            self.fetch(url, **options)
        return str(refused.value)

    def fill_cache(self, hub: HubServer) -> None:
        """Let huggingface_hub cache the repository."""
        use_hub(hub.url, self.monkeypatch)
        snapshot_download(hub.repo, revision="main")
        hub.log.clear()

    def visible(self) -> dict[str, bytes]:
        """Return the names and contents of what is in the target, without the hidden files."""
        return {name: content for name, content in files(self.target).items() if not name.startswith(".")}


def start(folder: Path, url: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start Python in `folder`, with the server at `url` as the Hub and a cache in that folder."""
    more = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(ROOT, **more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Return the relative paths and the contents of all files in `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def requested(hub: HubServer) -> set[str]:
    """Return the names of the files that were requested so far."""
    return {path.rpartition("/")[2] for _, path, _ in hub.log if not path.startswith("/api/")}


def gets(hub: HubServer, name: str) -> list[str | None]:
    """Return the Range header of every GET of the file `name` so far."""
    return [request.range for request in hub.log if request.method == "GET" and request.path.endswith(f"/{name}")]


def os_error(number: int) -> str:
    """Return how Python shows an error of the system."""
    return f"[Errno {number}] {os.strerror(number)}"
