"""Fixtures of the tests of the Hub: a client, and servers."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session

from tests.hub_server import HubServer
from tests.source.hub_client import COMMIT, REPO, UNWANTED, WANTED, Client


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client with an empty target and an empty cache."""
    yield Client(tmp_path, monkeypatch)
    close_session()  # another test's server may get the same port


@pytest.fixture
def serve() -> Iterator[Callable[..., HubServer]]:
    """A function that starts a Hub with some files and a commit."""
    with contextlib.ExitStack() as stack:
        yield lambda files=WANTED | UNWANTED, commit=COMMIT: stack.enter_context(
            HubServer(files, repo=REPO, commit=commit)
        )


@pytest.fixture
def hub(serve: Callable[..., HubServer]) -> HubServer:
    """A Hub with a tiny Phi-3 checkpoint, and files that belong to none."""
    return serve()
