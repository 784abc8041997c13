"""Publishing to a repository of the Hugging Face Hub with the real client, and pulling from it, on loopback."""

from pathlib import Path

import pytest

from pipeline.pull import check
from tests.conftest import ROOT, run
from tests.hub_registry_server import HubRegistryServer
from tests.release_project import NAME, build
from tests.release_project import project as project

pytestmark = pytest.mark.slow
REPO = "someone/tiny-openvino-int4"
URL = f"hf:{REPO}"
BIG = bytes(range(256)) * 100


@pytest.fixture
def hub():
    """An empty Hub."""
    with HubRegistryServer() as server:
        yield server


def phi3(hub, *arguments, check=True):
    """Run `phi3` against the emulator."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return run("phi3", *arguments, cwd=Path.cwd(), check=check, PYTHONPATH=str(ROOT), **environment)


def test_publish_list_pull(hub, tmp_path):
    """A version is one commit with a tag; another is another; what is pulled is what was published."""
    build(BIG)
    phi3(hub, "publish", NAME, "--to", URL, "--version", "1.0.0")
    build(BIG + b"newer")
    phi3(hub, "publish", NAME, "--to", URL, "--version", "1.1.0", "--alias", "stage")
    repository = hub.repositories[REPO]
    assert list(repository["tags"]) == ["1.0.0", "1.1.0"]
    assert len(repository["commits"]) == 5  # the first of a repository, and for each version the files and the alias
    assert phi3(hub, "list", URL).stdout == f"{NAME} 1.0.0 latest\n{NAME} 1.1.0 stage\n"
    assert phi3(hub, "pull", URL, NAME, "--to", "model").stdout == "model\n"
    assert check(tmp_path / "model").version == "1.0.0"
    assert (tmp_path / "model/openvino_model.bin").read_bytes() == BIG
    phi3(hub, "pull", URL, f"{NAME}@stage", "--to", "newer")
    assert (tmp_path / "newer/openvino_model.bin").read_bytes() == BIG + b"newer"


def test_published_again(hub):
    """The same bytes change nothing, other bytes are a conflict, and another artifact is refused."""
    phi3(hub, "publish", NAME, "--to", URL, "--version", "1.0.0")
    commits = len(hub.repositories[REPO]["commits"])
    assert (
        "is there already, with the same bytes" in phi3(hub, "publish", NAME, "--to", URL, "--version", "1.0.0").stdout
    )
    build(BIG)
    refused = phi3(hub, "publish", NAME, "--to", URL, "--version", "1.0.0", check=False)
    assert (refused.returncode, "with other bytes (manifest.json, openvino_model.bin" in refused.stderr) == (1, True)
    assert len(hub.repositories[REPO]["commits"]) == commits


@pytest.mark.parametrize("part", ["/commit/", "/tag/", "/lfs/"])
def test_an_interrupted_publication(hub, part):
    """When the Hub fails at any step, readers see no version; a retry sends no content twice and ends well."""
    build(BIG)
    hub.fail = {part: 400}
    refused = phi3(hub, "publish", NAME, "--to", URL, "--version", "1.0.0", check=False)
    assert refused.returncode == 1
    assert f"Error: {URL}: {hub.url} failed (" in refused.stderr
    assert "hf_secret" not in refused.stderr + refused.stdout
    assert phi3(hub, "list", URL).stdout == ""
    hub.fail, hub.log[:] = {}, []
    phi3(hub, "publish", NAME, "--to", URL, "--version", "1.0.0")
    sent = [path for _, path in hub.log if path.startswith("/lfs/")]
    assert (len(sent) > 0, len(set(sent))) == (part == "/lfs/", len(sent))
    phi3(hub, "pull", URL, NAME, "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == BIG


def test_a_corrupt_file(hub):
    """Other bytes than release.json says are refused, and nothing is installed."""
    build(BIG)
    phi3(hub, "publish", NAME, "--to", URL, "--version", "1.0.0")
    for _, files in hub.repositories[REPO]["commits"]:
        if "openvino_model.bin" in files:
            files["openvino_model.bin"] = bytes(len(BIG))
    refused = phi3(hub, "pull", URL, NAME, "--to", "model", check=False)
    assert refused.returncode == 1
    assert "gave other bytes for openvino_model.bin than release.json says" in refused.stderr
    assert not Path("model").exists()


def test_a_repository_that_is_not_there(hub):
    """An empty registry lists nothing, and a pull says what is missing."""
    assert phi3(hub, "list", URL).stdout == ""
    refused = phi3(hub, "pull", URL, NAME, check=False)
    assert (refused.returncode, refused.stderr) == (1, f"Error: {URL} has no {NAME} latest: see `phi3 list {URL}`.\n")
