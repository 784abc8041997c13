"""The real Hub client, in processes of its own, downloads a checkpoint from a server on this machine."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save

from tests.hub_server import HubServer, Request

REPO = "acme/tiny-phi3"
COMMIT = "c0ffee" * 6 + "1234"
OTHER_COMMIT = "beef" * 10
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CHUNK = 10 * 1024 * 1024  # the client reads this many bytes before it writes them to the disk
WANTED = {
    "config.json": b'{"architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "modeling_phi3.Config"}}',
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "LICENSE": b"MIT License\n",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}).encode(),
    FIRST: save({"a": np.arange(1000, dtype=np.float32)}),
    SECOND: save({"b": np.arange(3_000_000, dtype=np.float32)}),  # 12 MB, more than one of the client's chunks
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
ORIGIN = json.dumps({"hub": REPO, "revision": COMMIT}) + "\n"
DAMAGED = WANTED[SECOND][:-1] + bytes([WANTED[SECOND][-1] ^ 1])
ARRIVED_DAMAGED = (
    f"{REPO}: {{}} arrived with another hash than the Hub lists; it was deleted. Run again; if it happens twice, the "
    "server, a proxy or the Hugging Face cache damages it.\n"
)

FETCH = """
import contextlib, io, json, sys, time
from pathlib import Path
from pipeline.common.errors import PipelineError
from pipeline.common.params import Source
from pipeline.source import fetch_checkpoint

time.sleep = lambda seconds: None  # the client's pauses before it tries again
try:
    with contextlib.redirect_stdout(io.StringIO()):
        origin = fetch_checkpoint(Source.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
except PipelineError as error:
    print(error)
    sys.exit(1)
print(json.dumps(origin.model_dump()))
"""


class Result(NamedTuple):
    status: int
    text: str  # the origin as JSON, or the error


class Client:
    """Runs the download in a process, since huggingface_hub reads its environment when it is imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, folder / "target"
        self.target.mkdir()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        self.environment |= {
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, url: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", *arguments],
            env=self.environment | {"HF_ENDPOINT": url} | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def command(self, repo: str = REPO, revision: str = COMMIT, **source: bool) -> tuple[str, str, str]:
        return FETCH, json.dumps({"hub": {"repo": repo, "revision": revision, **source}}), str(self.target)

    def fetch(self, url: str, *command: str, **environment: str) -> Result:
        process = self.start(url, *(command or self.command()), **environment)
        try:
            text, log = process.communicate(timeout=60)
        finally:
            process.kill()
        assert "Traceback" not in log, log
        assert "hf_secret" not in text + log
        return Result(process.returncode, text)

    def fill_cache(self, hub: HubServer) -> None:
        code = f"from huggingface_hub import snapshot_download; snapshot_download({hub.repo!r}, revision='main')"
        _, log = (process := self.start(hub.url, code)).communicate(timeout=60)
        assert process.returncode == 0, log
        hub.log.clear()

    def visible(self) -> dict[str, bytes]:
        return {name: content for name, content in files(self.target).items() if not name.startswith(".")}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def os_error(number: int) -> str:
    return f"[Errno {number}] {os.strerror(number)}"


def gets(hub: HubServer, name: str) -> list[str | None]:
    """Return the Range header of every GET of the file `name` so far."""
    return [request.range for request in hub.log if request.method == "GET" and request.path.endswith(f"/{name}")]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


@pytest.fixture
def serve() -> Iterator[Callable[..., HubServer]]:
    with contextlib.ExitStack() as stack:
        yield lambda files=WANTED | UNWANTED, commit=COMMIT: stack.enter_context(
            HubServer(files, repo=REPO, commit=commit)
        )


@pytest.fixture
def hub(serve: Callable[..., HubServer]) -> HubServer:
    return serve()


def assert_refused_at_once(hub: HubServer, client: Client) -> None:
    assert [request.path for request in hub.log] == [f"/api/models/{REPO}/revision/{COMMIT}"]
    assert list(files(client.folder)) == ["target/.source.json"]


# --- What is downloaded ---


def test_only_the_files_of_the_allow_list_arrive(hub: HubServer, client: Client) -> None:
    """Weights, configs, tokenizer and licence arrive whole; pickles, code and subfolders are never requested."""
    assert client.fetch(hub.url) == (0, ORIGIN)
    assert files(client.target) == WANTED
    assert {request.path.rpartition(f"/{COMMIT}/")[2] for request in hub.log[1:]} == set(WANTED)
    assert hub.log[0] == Request("GET", f"/api/models/{REPO}/revision/{COMMIT}")


def test_trusted_remote_code_is_downloaded_too(hub: HubServer, client: Client) -> None:
    """With trust_remote_code and a pinned commit the repository's Python module arrives too, and nothing else."""
    assert client.fetch(hub.url, *client.command(trust_remote_code=True)) == (0, ORIGIN)
    assert files(client.target) == WANTED | {"modeling_phi3.py": UNWANTED["modeling_phi3.py"]}


@pytest.mark.parametrize("offline", ["0", "1"])
def test_code_of_another_repository_is_refused(serve: Callable[..., HubServer], client: Client, offline: str) -> None:
    """Trusted code must be the pinned repository's own: the commit of another one would be whatever is newest."""
    foreign = {"auto_map": {"AutoTokenizer": [None, "other/tokenizers--own.Tokenizer"]}}
    hub = serve(WANTED | UNWANTED | {"tokenizer_config.json": json.dumps(foreign).encode()})
    client.fill_cache(hub)
    assert client.fetch(hub.url, *client.command(trust_remote_code=True), HF_HUB_OFFLINE=offline) == (
        1,
        f"{REPO}: tokenizer_config.json takes Python code from other/tokenizers, whose commit nothing pins: copy that "
        "code into the repository, or remove trust_remote_code from params.yaml.\n",
    )
    assert client.fetch(hub.url, HF_HUB_OFFLINE=offline) == (0, ORIGIN)  # without trust no code is used


def test_a_branch_is_recorded_as_its_commit(hub: HubServer, client: Client) -> None:
    """With allow_branch the origin names the commit that the branch pointed to, and the files are that commit's."""
    assert client.fetch(hub.url, *client.command(revision="main", allow_branch=True)) == (0, ORIGIN)
    assert files(client.target) == WANTED
    assert {request.path.split("/")[4] for request in hub.log[1:]} == {COMMIT}


def test_the_token_goes_to_the_hub_alone(hub: HubServer, client: Client) -> None:
    """HF_TOKEN is sent to the Hub, not to the host of the large files, and is written nowhere."""
    assert client.fetch(hub.url, HF_TOKEN="hf_secret") == (0, ORIGIN)
    assert set(hub.authorizations) == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}
    assert not [name for name, content in files(client.folder).items() if b"hf_secret" in content]


# --- Interruptions ---


@pytest.mark.parametrize(
    ("cut", "continued"),
    [
        pytest.param(CHUNK + 1000, f"bytes={CHUNK}-", id="after-a-whole-chunk"),
        pytest.param(CHUNK - 1000, None, id="within-the-first-chunk"),
    ],
)
def test_a_cut_connection_is_continued_by_the_client(
    hub: HubServer, client: Client, cut: int, continued: str | None
) -> None:
    """When a file's transfer is cut the client requests the rest, from its last whole chunk, in the same run."""
    hub.cuts[SECOND] = [cut]
    assert client.fetch(hub.url) == (0, ORIGIN)
    assert files(client.target) == WANTED
    assert gets(hub, SECOND) == [None, continued]


def test_a_run_that_failed_within_a_file_is_continued_by_the_next(hub: HubServer, client: Client) -> None:
    """When every try is cut the run ends with a sentence; the next run keeps whole files and restarts the cut one."""
    hub.cuts[SECOND] = [CHUNK + 1000] * 6
    status, text = client.fetch(hub.url)
    assert (status, text) == (
        1,
        f"{REPO} at {COMMIT}: {hub.url} cannot be reached or failed (peer closed connection without sending complete "
        f"message body (received 1000 bytes, expected {len(WANTED[SECOND]) - CHUNK})); run again to continue where it "
        "stopped.\n",
    )
    assert gets(hub, SECOND) == [None] + [f"bytes={CHUNK}-"] * 5
    assert client.visible() == {name: content for name, content in WANTED.items() if name != SECOND}
    hub.log.clear()
    assert client.fetch(hub.url) == (0, ORIGIN)
    assert files(client.target) == WANTED
    assert [request for request in hub.log[1:] if not request.path.endswith(SECOND)] == []
    assert gets(hub, SECOND) == [None]  # huggingface_hub 1.21 keeps no partial file


def test_a_reset_connection_ends_the_run_with_a_sentence(hub: HubServer, client: Client) -> None:
    """A reset connection, which the client does not retry, ends the run with a sentence, and the next run succeeds."""
    hub.cuts[SECOND], hub.resets = [CHUNK + 1000], True
    status, text = client.fetch(hub.url)
    assert status == 1
    assert text == (
        f"{REPO} at {COMMIT}: {hub.url} cannot be reached or failed ({os_error(errno.ECONNRESET)}); run again to "
        "continue where it stopped.\n"
    )
    assert client.fetch(hub.url) == (0, ORIGIN)
    assert files(client.target) == WANTED


def test_a_killed_run_is_continued_by_the_next(hub: HubServer, client: Client) -> None:
    """After SIGKILL within the second shard the next run requests that shard only, and leaves no partial file."""
    hub.holds[SECOND] = CHUNK + 1000
    process = client.start(hub.url, *client.command())
    assert hub.held.wait(60)
    process.kill()
    process.communicate()
    assert len([name for name in files(client.target) if name.endswith(".incomplete")]) == 1
    assert client.visible() == {name: content for name, content in WANTED.items() if name != SECOND}
    hub.holds.clear()
    hub.log.clear()
    hub.errors["files"] = (403, "GatedRepo")  # this run ends right after its start
    assert client.fetch(hub.url)[0] == 1
    assert not [name for name in files(client.target) if name.endswith(".incomplete")]
    hub.errors.clear()
    hub.log.clear()
    assert client.fetch(hub.url) == (0, ORIGIN)
    assert files(client.target) == WANTED
    assert {request.path.rpartition("/")[2] for request in hub.log[1:]} == {SECOND}


def test_a_branch_that_moved_leaves_no_file_of_its_old_commit(serve: Callable[..., HubServer], client: Client) -> None:
    """Files that an interrupted run fetched of a branch's old commit are removed if its new one does not list them."""
    old = serve()
    old.errors[SECOND] = (403, "GatedRepo")
    command = client.command(revision="main", allow_branch=True)
    assert client.fetch(old.url, *command)[0] == 1
    assert FIRST in client.visible()
    single = {"config.json", "tokenizer.json"}
    new_files = {name: WANTED[name] for name in single} | {"model.safetensors": WANTED[FIRST]}
    new = serve(new_files, OTHER_COMMIT)
    assert client.fetch(new.url, *command) == (0, json.dumps({"hub": REPO, "revision": OTHER_COMMIT}) + "\n")
    assert files(client.target) == new_files


# --- Damage ---


@pytest.mark.parametrize("name", ["tokenizer.json", SECOND])
def test_a_damaged_file_of_the_right_size_is_refused(hub: HubServer, client: Client, name: str) -> None:
    """A file with another hash than listed is deleted, with a sentence; a healthy server then completes the rest."""
    hub.pages[name] = WANTED[name][:-1] + bytes([WANTED[name][-1] ^ 1])
    assert client.fetch(hub.url) == (1, ARRIVED_DAMAGED.format(name))
    kept = set(client.visible())
    assert name not in kept
    hub.pages.clear()
    hub.log.clear()
    assert client.fetch(hub.url) == (0, ORIGIN)
    assert files(client.target) == WANTED
    assert {request.path.rpartition("/")[2] for request in hub.log[1:]} == set(WANTED) - kept


def test_a_file_damaged_on_the_disk_is_fetched_again(hub: HubServer, client: Client) -> None:
    """A file that lost its content after an interrupted run, with its date kept, is replaced by the next run."""
    hub.errors[SECOND] = (403, "GatedRepo")
    assert client.fetch(hub.url)[0] == 1
    path = client.target / FIRST
    dates = path.stat().st_atime, path.stat().st_mtime
    path.write_bytes(bytes(len(WANTED[FIRST])))
    os.utime(path, dates)
    hub.errors.clear()
    assert client.fetch(hub.url) == (0, ORIGIN)
    assert files(client.target) == WANTED


@pytest.mark.parametrize("page", ["listing", SECOND])
def test_a_login_page_in_place_of_an_answer_is_told_in_a_sentence(hub: HubServer, client: Client, page: str) -> None:
    """A login page that a captive portal sends in place of the listing or a file ends the run with one sentence."""
    hub.pages[page] = b"<html>Log in to the network</html>"
    status, text = client.fetch(hub.url)
    reason = {
        "listing": "Expecting value: line 1 column 1 (char 0)",
        SECOND: f"Consistency check failed: file should be of size {len(WANTED[SECOND])} but has size 34 "
        f"((…){f'/{REPO}/cdn/{COMMIT}/{SECOND}'[-40:]}).",
    }[page]
    assert (status, text) == (
        1,
        f"{REPO} at {COMMIT}: {hub.url} cannot be reached or failed ({reason}); run again to continue where it "
        "stopped.\n",
    )


# --- Refusals before the first byte ---


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "..\\x", "C:\\x", "C:/x", "model\0.safetensors", "./model.safetensors"]
)
def test_a_path_that_leads_out_is_refused(hub: HubServer, client: Client, name: str) -> None:
    """A listing with a path that leads out of the folder, on any system, is refused before anything is written."""
    hub.listed_names = [name]
    assert client.fetch(hub.url) == (
        1,
        f"{REPO} lists the file {name!r}, a path that leads out of its folder: nothing was downloaded.\n",
    )
    assert_refused_at_once(hub, client)
    assert not Path("/etc/x").exists()


def test_a_repository_with_pickles_alone_is_refused(serve: Callable[..., HubServer], client: Client) -> None:
    """A repository whose weights are only pickles is refused, and the user reads what to do."""
    hub = serve({name: WANTED[name] for name in ("config.json", "tokenizer.json")} | UNWANTED)
    assert client.fetch(hub.url) == (
        1,
        f"{REPO} at {COMMIT} has no safetensors weights; pickle weights (.bin, .pt) are never loaded, since they can "
        "run code: choose a revision or a conversion with safetensors.\n",
    )
    assert_refused_at_once(hub, client)


def test_another_commit_than_pinned_is_refused(hub: HubServer, client: Client) -> None:
    """A server that answers for another commit than the pinned one is refused."""
    hub.listed_commit = OTHER_COMMIT
    assert client.fetch(hub.url) == (
        1,
        f"{REPO}: asked for {COMMIT}, the Hub answered with commit {OTHER_COMMIT}.\n",
    )
    assert_refused_at_once(hub, client)


def test_a_checkpoint_that_does_not_fit_is_refused(hub: HubServer, client: Client) -> None:
    """A checkpoint larger than the free space is refused before the first byte, with both sizes."""
    hub.listed_sizes[SECOND] = 10**15
    status, text = client.fetch(hub.url)
    assert status == 1
    assert text.startswith("the checkpoint needs 1000000.0 GB more and the disk has ")
    assert text.endswith(" GB free: make room.\n")
    assert_refused_at_once(hub, client)


# --- Servers that refuse or fail ---


@pytest.mark.parametrize("what", ["listing", "files"])
def test_a_gated_repository_is_told_in_a_sentence(hub: HubServer, client: Client, what: str) -> None:
    """For a gated repository, even if the Hub lists its files, the user reads where to accept its terms."""
    hub.errors[what] = (403, "GatedRepo")
    assert client.fetch(hub.url) == (
        1,
        f"{REPO} is gated: accept its terms on {hub.url}/{REPO}, then set HF_TOKEN or run `hf auth login`.\n",
    )
    assert client.visible() == {}


def test_a_missing_repository_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """For a repository that does not exist the user reads which parameter to correct."""
    assert client.fetch(hub.url, *client.command(repo="acme/missing")) == (
        1,
        f"acme/missing does not exist on {hub.url}, or is private: correct `repo` in params.yaml, or set HF_TOKEN.\n",
    )


def test_a_name_that_the_client_refuses_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """A repository name that huggingface_hub itself refuses ends with its reason, without a request."""
    status, text = client.fetch(hub.url, *client.command(repo="acme/tiny--phi3"))
    assert status == 1
    assert text.startswith(f"acme/tiny--phi3 at {COMMIT}: ")
    assert "Cannot have -- or .. in repo_id: 'acme/tiny--phi3'" in text
    assert hub.log == []


def test_an_unknown_revision_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """For a commit that the repository does not have the user reads which parameter to correct."""
    assert client.fetch(hub.url, *client.command(revision=OTHER_COMMIT)) == (
        1,
        f"{REPO} at {OTHER_COMMIT} does not exist: correct `revision` in params.yaml.\n",
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
    assert client.fetch(hub.url) == (1, f"{REPO} at {COMMIT}: {hub.url} {failure.format(url=hub.url)}\n")


def test_a_server_that_is_down_is_told_in_a_sentence(client: Client) -> None:
    """When nobody listens, the user reads which server cannot be reached."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert client.fetch(f"http://127.0.0.1:{port}") == (
        1,
        f"{REPO} at {COMMIT}: http://127.0.0.1:{port} cannot be reached or failed ({os_error(errno.ECONNREFUSED)}); "
        "run again to continue where it stopped.\n",
    )


def test_a_server_that_never_answers_is_given_up(client: Client) -> None:
    """A server that takes the connection and stays silent is given up after HF_HUB_ETAG_TIMEOUT seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert client.fetch(url, HF_HUB_ETAG_TIMEOUT="1") == (
            1,
            f"{REPO} at {COMMIT}: {url} cannot be reached or failed (timed out); run again to continue where it "
            "stopped.\n",
        )


# --- Offline ---


def test_offline_without_a_cache_is_told_in_a_sentence(hub: HubServer, client: Client) -> None:
    """With HF_HUB_OFFLINE and no snapshot in the cache the user reads how to get one; no request is sent."""
    assert client.fetch(hub.url, HF_HUB_OFFLINE="1") == (
        1,
        f"HF_HUB_OFFLINE is set and {REPO} at {COMMIT} is not in the Hugging Face cache: unset it, or run `hf download "
        f"{REPO} --revision {COMMIT}` while online.\n",
    )
    assert hub.log == []


@pytest.mark.parametrize(("name", "damaged"), [(SECOND, DAMAGED), ("tokenizer.json", b'{"model":{} }')])
def test_offline_takes_the_snapshot_in_the_cache(hub: HubServer, client: Client, name: str, damaged: bytes) -> None:
    """With HF_HUB_OFFLINE the snapshot that huggingface_hub cached is used without a request; damage is refused in
    large files and in small ones."""
    client.fill_cache(hub)
    assert client.fetch(hub.url, HF_HUB_OFFLINE="1") == (0, ORIGIN)
    assert files(client.target) == WANTED
    assert client.fetch(hub.url, *client.command(revision="main", allow_branch=True), HF_HUB_OFFLINE="1") == (0, ORIGIN)
    (cached,) = (client.folder / "home").rglob(name)
    cached.write_bytes(damaged)
    assert client.fetch(hub.url, HF_HUB_OFFLINE="1") == (
        1,
        f"{cached} is damaged in the Hugging Face cache: delete it and download it again.\n",
    )
    assert hub.log == []


def test_a_damaged_cache_is_refused_online_too(hub: HubServer, client: Client) -> None:
    """The client takes cached files of the commit without a download, and our check finds the damage."""
    client.fill_cache(hub)
    (shard,) = (client.folder / "home").rglob(SECOND)
    shard.write_bytes(DAMAGED)
    assert client.fetch(hub.url) == (1, ARRIVED_DAMAGED.format(SECOND))
    assert {request.method for request in hub.log[1:]} == {"HEAD"}
