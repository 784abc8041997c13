"""The real Hub client refuses hostile and useless repositories, and explains servers that refuse or fail."""

import errno
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer
from tests.source.hub_client import COMMIT, OTHER_COMMIT, REPO, SECOND, UNWANTED, WANTED, Client, files, os_error

# --- Refusals before the first byte ---


def assert_refused_at_once(hub: HubServer, client: Client) -> None:
    """Assert that nothing but the listing was requested, and that nothing was written."""
    assert [request.path for request in hub.log] == [f"/api/models/{REPO}/revision/{COMMIT}"]
    assert files(client.folder) == {}


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "..\\x", "C:\\x", "C:/x", "model\0.safetensors", "./model.safetensors"]
)
def test_a_path_that_leads_out_is_refused(hub: HubServer, client: Client, name: str) -> None:
    """A listing with a path that leads out of the folder, on any system, is refused before anything is written."""
    hub.listed_names = [name]
    assert client.refusal(hub.url) == (
        f"{REPO} lists the file {name!r}, a path that leads out of its folder: nothing was downloaded."
    )
    assert_refused_at_once(hub, client)
    assert not Path("/etc/x").exists()


def test_a_repository_with_pickles_alone_is_refused(serve: Callable[..., HubServer], client: Client) -> None:
    """A repository whose weights are only pickles is refused, and the user reads what to do."""
    hub = serve({name: WANTED[name] for name in ("config.json", "tokenizer.json")} | UNWANTED)
    assert client.refusal(hub.url) == (
        f"{REPO} at {COMMIT} has no safetensors weights; pickle weights (.bin, .pt) are never loaded, since they can "
        "run code: choose a revision or a conversion with safetensors."
    )
    assert_refused_at_once(hub, client)


def test_another_commit_than_pinned_is_refused(hub: HubServer, client: Client) -> None:
    """A server that answers for another commit than the pinned one is refused."""
    hub.listed_commit = OTHER_COMMIT
    assert client.refusal(hub.url) == f"{REPO}: asked for {COMMIT}, the Hub answered with commit {OTHER_COMMIT}."
    assert_refused_at_once(hub, client)


def test_a_checkpoint_that_does_not_fit_is_refused(hub: HubServer, client: Client) -> None:
    """A checkpoint larger than the free space is refused before the first byte, with both sizes."""
    hub.listed_sizes[SECOND] = 10**15
    text = client.refusal(hub.url)
    assert text.startswith("the checkpoint needs 1000000.0 GB more and the disk has ")
    assert text.endswith(" GB free: make room.")
    assert_refused_at_once(hub, client)


# --- Servers that refuse or fail ---


@pytest.mark.parametrize("what", ["listing", "files"])
def test_a_gated_repository_is_told_in_a_sentence(hub: HubServer, client: Client, what: str) -> None:
    """For a gated repository, even if the Hub lists its files, the user reads where to accept its terms."""
    hub.errors[what] = (403, "GatedRepo")
    assert client.refusal(hub.url) == (
        f"{REPO} is gated: accept its terms on {hub.url}/{REPO}, then set HF_TOKEN or run `hf auth login`."
    )
    assert client.visible() == {}


def test_a_missing_repository_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """For a repository that does not exist the user reads which parameter to correct."""
    assert client.refusal(hub.url, repo="acme/missing") == (
        f"acme/missing does not exist on {hub.url}, or is private: correct `repo` in params.yaml, or set HF_TOKEN."
    )


def test_a_name_that_the_client_refuses_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """A repository name that huggingface_hub itself refuses ends with its reason, without a request."""
    text = client.refusal(hub.url, repo="acme/tiny--phi3")
    assert text.startswith(f"acme/tiny--phi3 at {COMMIT}: ")
    assert "Cannot have -- or .. in repo_id: 'acme/tiny--phi3'" in text
    assert hub.log == []


def test_an_unknown_revision_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """For a commit that the repository does not have the user reads which parameter to correct."""
    assert client.refusal(hub.url, revision=OTHER_COMMIT) == (
        f"{REPO} at {OTHER_COMMIT} does not exist: correct `revision` in params.yaml."
    )


@pytest.mark.parametrize(
    ("what", "status", "failure"),
    [
        (
            "listing",
            500,
            "cannot be reached or failed (Server error '500 Internal Server Error' for url "
            f"'{{url}}/api/models/{REPO}/revision/{COMMIT}?blobs=true'); run again to continue where it stopped.",
        ),
        (
            "listing",
            403,
            "cannot be reached or failed (403 Forbidden: None.); run again to continue where it stopped.",
        ),
        ("files", 500, "cannot be reached; check the network, then run again."),
    ],
)
def test_a_failing_server_is_told_in_a_sentence(
    hub: HubServer, client: Client, what: str, status: int, failure: str
) -> None:
    """When the server fails, the user reads its name, its message and that the next run continues."""
    hub.errors[what] = (status, "")
    assert client.refusal(hub.url) == f"{REPO} at {COMMIT}: {hub.url} {failure.format(url=hub.url)}"


def test_a_server_that_is_down_is_told_in_a_sentence(client: Client) -> None:
    """When nobody listens, the user reads which server cannot be reached."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert client.refusal(f"http://127.0.0.1:{port}") == (
        f"{REPO} at {COMMIT}: http://127.0.0.1:{port} cannot be reached or failed ({os_error(errno.ECONNREFUSED)}); "
        "run again to continue where it stopped."
    )


def test_a_server_that_never_answers_is_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and stays silent is given up after HF_HUB_ETAG_TIMEOUT seconds."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert client.refusal(url) == (
            f"{REPO} at {COMMIT}: {url} cannot be reached or failed (timed out); run again to continue where it "
            "stopped."
        )
