"""What the real Hub client downloads from a server on this machine, and how it continues after an interruption."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save

from pipeline.common.manifest import HubOrigin, verify
from pipeline.common.params import Model
from pipeline.plan import read_config
from tests.helpers import ROOT, edit, use_hub
from tests.hub_server import HubServer, Request
from tests.source.hub_client import (
    CHUNK,
    COMMIT,
    CONFIG,
    EMBEDDING,
    FIRST,
    NORM,
    ORIGIN,
    OTHER_COMMIT,
    REPO,
    SECOND,
    UNWANTED,
    WANTED,
    Client,
    files,
    gets,
    os_error,
    requested,
    start,
)

FETCH = """
import sys
from pathlib import Path
from pipeline.common.params import Source
from pipeline.source import fetch_checkpoint
fetch_checkpoint(Source.model_validate_json(sys.argv[1]), Path("target"))
"""
KILLED_IN_SEAL = """
import os, signal
from stages import download
download.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
download.main.callback.__wrapped__("tiny")
"""
SOURCE = {"hub": {"repo": REPO, "revision": COMMIT}}

# --- What is downloaded ---


def test_a_plan_needs_the_config_alone(hub: HubServer, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """`phi3 plan` asks the Hub for the config of a model that is not here, and for no weights."""
    monkeypatch.chdir(client.folder)
    use_hub(hub.url, monkeypatch)
    said: list[str] = []
    model = Model.model_validate({"source": SOURCE, "license": "MIT", "group_size_fallback": "error"})
    assert read_config("tiny", model, progress=said.append) == CONFIG
    assert (requested(hub), said) == ({"config.json"}, [f"asking the Hub for the config of {REPO}"])


def test_only_the_files_of_the_allow_list_arrive(hub: HubServer, client: Client) -> None:
    """Weights, configs, tokenizer and licence arrive whole; pickles, code and subfolders are never requested."""
    assert client.fetch(hub.url) == ORIGIN
    assert files(client.target) == WANTED
    assert requested(hub) == set(WANTED)
    assert hub.log[0] == Request("GET", f"/api/models/{REPO}/revision/{COMMIT}")


def test_trusted_remote_code_is_downloaded_too(hub: HubServer, client: Client) -> None:
    """With trust_remote_code and a pinned commit the repository's Python module arrives too, and nothing else."""
    assert client.fetch(hub.url, trust_remote_code=True) == ORIGIN
    assert files(client.target) == WANTED | {"modeling_phi3.py": UNWANTED["modeling_phi3.py"]}


@pytest.mark.parametrize("offline", [False, True])
def test_code_of_another_repository_is_refused(serve: Callable[..., HubServer], client: Client, offline: bool) -> None:
    """Trusted code must be the pinned repository's own: the commit of another one would be whatever is newest."""
    foreign = {"auto_map": {"AutoTokenizer": [None, "other/tokenizers--own.Tokenizer"]}}
    hub = serve(WANTED | UNWANTED | {"tokenizer_config.json": json.dumps(foreign).encode()})
    client.fill_cache(hub)
    assert client.refusal(hub.url, offline=offline, trust_remote_code=True) == (
        f"{REPO}: tokenizer_config.json takes Python code from other/tokenizers, whose commit nothing pins: copy that "
        "code into the repository, or remove trust_remote_code from params.yaml."
    )
    assert client.fetch(hub.url, offline=offline) == ORIGIN  # without trust no code is used


def test_another_architecture_is_refused_before_its_weights_arrive(
    serve: Callable[..., HubServer], client: Client
) -> None:
    """No weights of another architecture are requested, wherever the Hub lists its config, also by the next run."""
    config = json.dumps(CONFIG | {"architectures": ["LlamaForCausalLM"]}).encode()
    hub = serve(dict(reversed((WANTED | {"config.json": config}).items())))
    for _ in range(2):
        assert client.refusal(hub.url) == (
            f"{client.target / 'config.json'} says architectures ['LlamaForCausalLM']: this pipeline builds "
            "Phi3ForCausalLM only."
        )
    assert requested(hub) == set(WANTED) - {FIRST, SECOND}


def test_a_branch_is_recorded_as_its_commit(hub: HubServer, client: Client) -> None:
    """With allow_branch the origin names the commit that the branch pointed to, and the files are that commit's."""
    assert client.fetch(hub.url, revision="main", allow_branch=True) == ORIGIN
    assert files(client.target) == WANTED
    assert {request.path.split("/")[4] for request in hub.log[1:]} == {COMMIT}


def test_the_token_goes_to_the_hub_alone(hub: HubServer, client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    """HF_TOKEN is sent to the Hub, not to the host of the large files, and is written nowhere."""
    assert client.fetch(hub.url) == ORIGIN
    assert set(hub.authorizations) == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}
    assert not [name for name, content in files(client.folder).items() if b"hf_secret" in content]
    assert "hf_secret" not in "".join(capfd.readouterr())


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
    assert client.fetch(hub.url) == ORIGIN
    assert files(client.target) == WANTED
    assert gets(hub, SECOND) == [None, continued]


def test_a_run_that_failed_within_a_file_is_continued_by_the_next(hub: HubServer, client: Client) -> None:
    """When every try is cut the run ends with a sentence; the next run keeps whole files and restarts the cut one."""
    hub.cuts[SECOND] = [CHUNK + 1000] * 6
    assert client.refusal(hub.url) == (
        f"{REPO} at {COMMIT}: {hub.url} cannot be reached or failed (peer closed connection without sending complete "
        f"message body (received 1000 bytes, expected {len(WANTED[SECOND]) - CHUNK})); run again to continue where it "
        "stopped."
    )
    assert gets(hub, SECOND) == [None] + [f"bytes={CHUNK}-"] * 5
    assert client.visible() == {name: content for name, content in WANTED.items() if name != SECOND}
    hub.log.clear()
    assert client.fetch(hub.url) == ORIGIN
    assert files(client.target) == WANTED
    assert requested(hub) == {SECOND}
    assert gets(hub, SECOND) == [None]  # huggingface_hub 1.21 keeps no partial file


def test_a_reset_connection_ends_the_run_with_a_sentence(hub: HubServer, client: Client) -> None:
    """A reset connection, which the client does not retry, ends the run with a sentence, and the next run succeeds."""
    hub.cuts[SECOND], hub.resets = [CHUNK + 1000], True
    assert client.refusal(hub.url) == (
        f"{REPO} at {COMMIT}: {hub.url} cannot be reached or failed ({os_error(errno.ECONNRESET)}); run again to "
        "continue where it stopped."
    )
    assert client.fetch(hub.url) == ORIGIN
    assert files(client.target) == WANTED


def test_a_killed_run_is_continued_by_the_next(hub: HubServer, client: Client) -> None:
    """After SIGKILL within the second shard the next run requests that shard only, and leaves no partial file."""
    hub.holds[SECOND] = CHUNK + 1000
    process = start(client.folder, hub.url, "-c", FETCH, json.dumps(SOURCE))
    assert hub.held.wait(60)
    process.kill()
    process.communicate()
    assert len([name for name in files(client.target) if name.endswith(".incomplete")]) == 1
    assert client.visible() == {name: content for name, content in WANTED.items() if name != SECOND}
    hub.holds.clear()
    hub.errors["files"] = (403, "GatedRepo")  # this run ends right after its start
    assert "is gated" in client.refusal(hub.url)
    assert not [name for name in files(client.target) if name.endswith(".incomplete")]
    hub.errors.clear()
    hub.log.clear()
    assert client.fetch(hub.url) == ORIGIN
    assert files(client.target) == WANTED
    assert requested(hub) == {SECOND}


def test_a_stage_killed_after_the_last_byte_downloads_nothing_again(hub: HubServer, tmp_path: Path) -> None:
    """When SIGKILL ends the stage while it hashes the checkpoint, the next run of its command requests no file."""
    params, model = tmp_path / "params.yaml", {"source": SOURCE, "license": "MIT", "group_size_fallback": "error"}
    params.write_bytes((ROOT / "params.yaml").read_bytes())
    edit(params, "models:\n", f"models:\n  tiny: {json.dumps(model)}\n")
    killed = start(tmp_path, hub.url, "-c", KILLED_IN_SEAL)
    assert "Traceback" not in killed.communicate()[1]
    assert killed.returncode == -9
    assert requested(hub) == set(WANTED)
    hub.log.clear()
    stage = start(tmp_path, hub.url, "-m", "stages.download", "tiny")
    assert stage.communicate()[1] == ""
    assert stage.returncode == 0
    assert requested(hub) == set()
    artifact = tmp_path / "artifacts/tiny/source"
    assert verify(artifact).source == ORIGIN
    assert files(artifact).keys() == WANTED.keys() | {"manifest.json"}
    assert list(artifact.parent.iterdir()) == [artifact]


def test_a_branch_that_moved_leaves_no_file_of_its_old_commit(serve: Callable[..., HubServer], client: Client) -> None:
    """Files that an interrupted run fetched of a branch's old commit are removed if its new one does not list them."""
    old = serve()
    old.errors[SECOND] = (403, "GatedRepo")
    assert "is gated" in client.refusal(old.url, revision="main", allow_branch=True)
    assert FIRST in client.visible()
    new_files = {name: WANTED[name] for name in ("config.json", "tokenizer.json")}
    new_files["model.safetensors"] = save(NORM | EMBEDDING)
    new = serve(new_files, OTHER_COMMIT)
    origin = HubOrigin(hub=REPO, revision=OTHER_COMMIT)
    assert client.fetch(new.url, revision="main", allow_branch=True) == origin
    assert files(client.target) == new_files
