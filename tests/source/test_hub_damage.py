"""The real Hub client meets damaged files on the way, on the disk and in its cache, and works without a network."""

import os

import pytest

from tests.hub_server import HubServer
from tests.source.hub_client import COMMIT, FIRST, ORIGIN, REPO, SECOND, WANTED, Client, files, requested

DAMAGED = WANTED[SECOND][:-1] + bytes([WANTED[SECOND][-1] ^ 1])
ARRIVED_DAMAGED = (
    f"{REPO}: {{}} arrived with another hash than the Hub lists; it was deleted. Run again; if it happens twice, the "
    "server, a proxy or the Hugging Face cache damages it."
)

# --- Damage ---


@pytest.mark.parametrize(("name", "damaged"), [("tokenizer.json", b'{"model": []}'), (SECOND, DAMAGED)])
def test_a_damaged_file_of_the_right_size_is_refused(hub: HubServer, client: Client, name: str, damaged: bytes) -> None:
    """A file with another hash than listed is deleted, with a sentence; a healthy server then completes the rest."""
    hub.pages[name] = damaged
    assert client.refusal(hub.url) == ARRIVED_DAMAGED.format(name)
    kept = set(client.visible())
    assert name not in kept
    hub.pages.clear()
    hub.log.clear()
    assert client.fetch(hub.url) == ORIGIN
    assert files(client.target) == WANTED
    assert requested(hub) == set(WANTED) - kept


def test_a_file_damaged_on_the_disk_is_fetched_again(hub: HubServer, client: Client) -> None:
    """A file that lost its content after an interrupted run, with its date kept, is replaced by the next run."""
    hub.errors[SECOND] = (403, "GatedRepo")
    assert "is gated" in client.refusal(hub.url)
    path = client.target / FIRST
    dates = path.stat().st_atime, path.stat().st_mtime
    path.write_bytes(bytes(len(WANTED[FIRST])))
    os.utime(path, dates)
    hub.errors.clear()
    assert client.fetch(hub.url) == ORIGIN
    assert files(client.target) == WANTED


@pytest.mark.parametrize("page", ["listing", SECOND])
def test_a_login_page_in_place_of_an_answer_is_told_in_a_sentence(hub: HubServer, client: Client, page: str) -> None:
    """A login page that a captive portal sends in place of the listing or a file ends the run with one sentence."""
    hub.pages[page] = b"<html>Log in to the network</html>"
    reason = {
        "listing": "Expecting value: line 1 column 1 (char 0)",
        SECOND: f"Consistency check failed: file should be of size {len(WANTED[SECOND])} but has size 34 "
        f"((…){f'/{REPO}/cdn/{COMMIT}/{SECOND}'[-40:]}).",
    }[page]
    assert client.refusal(hub.url) == (
        f"{REPO} at {COMMIT}: {hub.url} cannot be reached or failed ({reason}); run again to continue where it stopped."
    )


def test_a_damaged_cache_is_refused_online_too(hub: HubServer, client: Client) -> None:
    """The client takes cached files of the commit without a download, and our check finds the damage."""
    client.fill_cache(hub)
    (shard,) = client.cache.rglob(SECOND)
    shard.write_bytes(DAMAGED)
    assert client.refusal(hub.url) == ARRIVED_DAMAGED.format(SECOND)
    assert {request.method for request in hub.log[1:]} == {"HEAD"}


# --- Offline ---


def test_offline_without_a_cache_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """With HF_HUB_OFFLINE and no snapshot in the cache the user reads how to get one; no request is sent."""
    assert client.refusal(hub.url, offline=True) == (
        f"HF_HUB_OFFLINE is set and {REPO} at {COMMIT} is not in the Hugging Face cache: unset it, or run `hf download "
        f"{REPO} --revision {COMMIT}` while online."
    )
    assert hub.log == []


@pytest.mark.parametrize(("name", "damaged"), [(SECOND, DAMAGED), ("tokenizer.json", b'{"model":{} }')])
def test_offline_takes_the_snapshot_in_the_cache(hub: HubServer, client: Client, name: str, damaged: bytes) -> None:
    """With HF_HUB_OFFLINE the snapshot that huggingface_hub cached is used without a request; damage is refused in
    large files and in small ones."""
    client.fill_cache(hub)
    assert client.fetch(hub.url, offline=True) == ORIGIN
    assert files(client.target) == WANTED
    assert client.fetch(hub.url, offline=True, revision="main", allow_branch=True) == ORIGIN
    (cached,) = client.cache.rglob(name)
    cached.write_bytes(damaged)
    assert client.refusal(hub.url, offline=True) == (
        f"{cached} is damaged in the Hugging Face cache: delete it and download it again."
    )
    assert hub.log == []
