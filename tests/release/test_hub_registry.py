"""The real client publishes to an emulated repository of the Hugging Face Hub and pulls from it, on loopback."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import ROOT, phi3, run, use_hub
from tests.release_project import NAME, build, run_and_kill

pytestmark = [pytest.mark.usefixtures("release_folder"), pytest.mark.slow]
REPO = "someone/tiny-openvino-int4"
URL = f"hf:{REPO}"
BIG = bytes(range(256)) * 100


def process(hub, *arguments, program=("phi3",)):
    """Run `phi3`, or a program with its arguments, as a process of its own."""
    return run(*program, *arguments, cwd=Path.cwd(), check=False, PYTHONPATH=str(ROOT), **hub.environment)


@pytest.mark.parametrize("part", ["/commit/", "/tag/", "/lfs/"])
def test_an_interrupted_publication(hub, part):
    """When the Hub fails at any step, readers see no version; a retry sends no content twice and succeeds."""
    build(BIG)
    hub.fail = {part: 400}
    refused = phi3("publish", NAME, "--to", URL, "--version", "1.0.0", check=False)
    assert refused.returncode == 1
    assert f"Error: {URL}: {hub.url} failed (" in refused.stderr
    assert "hf_secret" not in refused.stderr + refused.stdout
    assert phi3("list", URL).stdout == ""
    hub.fail, hub.log[:] = {}, []
    phi3("publish", NAME, "--to", URL, "--version", "1.0.0")
    sent = [path for _, path in hub.log if path.startswith("/lfs/")]
    assert (len(sent) > 0, len(set(sent))) == (part == "/lfs/", len(sent))
    phi3("pull", URL, NAME, "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == BIG


@pytest.mark.parametrize(
    ("function", "calls", "after"),
    [
        ("pipeline.release.registry.hub:HubRegistry.upload", 8, True),
        ("huggingface_hub:HfApi.create_commit", 1, True),
        ("huggingface_hub:HfApi.create_tag", 1, True),
        ("pipeline.release.registry.hub:HubRegistry.point", 1, True),
    ],
)
def test_a_killed_publisher(hub, function, calls, after):
    """If a publisher is killed at any phase, readers see the whole old version until the tag exists; a retry works."""
    phi3("publish", NAME, "--to", URL, "--version", "1.0.0")
    build(BIG)
    program = run_and_kill(function, calls=calls, after=after)
    publish = ("publish", NAME, "--to", URL, "--version", "2.0.0")
    assert process(hub, *publish, program=program).returncode == 9
    tagged = "create_tag" in function or "point" in function
    versions = [line.split()[1] for line in phi3("list", URL).stdout.splitlines()]
    assert versions == (["1.0.0", "2.0.0"] if tagged else ["1.0.0"])
    phi3("pull", URL, NAME, "--to", "latest")
    assert Path("latest/openvino_model.bin").read_bytes() == (BIG if "point" in function else b"weights")
    phi3(*publish)
    phi3("pull", URL, NAME, "--to", "newer")
    assert Path("newer/openvino_model.bin").read_bytes() == BIG


def test_two_publishers_at_once(hub):
    """When several publish the same bytes at once, each succeeds or is told to run again, and the release is whole."""
    build(BIG)
    with ThreadPoolExecutor() as pool:
        command = ("publish", NAME, "--to", URL, "--version", "1.0.0")
        results = list(pool.map(lambda _: process(hub, *command), range(3)))
    said = [result.stderr for result in results if result.returncode]
    assert len(said) < len(results)
    assert all("another publisher is at work" in stderr or "failed (412" in stderr for stderr in said), said
    phi3(*command)
    phi3("pull", URL, NAME, "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == BIG


def test_a_corrupt_file(hub):
    """Bytes that differ from release.json are refused, and nothing is installed."""
    build(BIG)
    phi3("publish", NAME, "--to", URL, "--version", "1.0.0")
    for _, files in hub.repositories[REPO]["commits"]:
        if "openvino_model.bin" in files:
            files["openvino_model.bin"] = bytes(len(BIG))
    refused = phi3("pull", URL, NAME, "--to", "model", check=False)
    assert refused.returncode == 1
    assert "gave other bytes for openvino_model.bin than release.json says" in refused.stderr
    assert not Path("model").exists()


def test_a_repository_that_is_not_there(hub):
    """An empty registry lists nothing, and a pull says what is missing."""
    assert phi3("list", URL).stdout == ""
    refused = phi3("pull", URL, NAME, check=False)
    assert (refused.returncode, refused.stderr) == (1, f"Error: {URL} has no {NAME} latest: see `phi3 list {URL}`.\n")


def test_an_owner_alone(hub):
    """A release published to an owner is in the repository with the usual name, which is said, and is pulled there."""
    url = "hf:someone/Phi-3-mini-4k-instruct-int4-cw-ov"
    for version in ("1.0.0", "1.1.0"):
        output = phi3("publish", NAME, "--to", "hf:someone", "--version", version).stdout
        assert output.splitlines()[-1].endswith(f" MB, to {url} as latest")
    assert hub.repositories.keys() == {url.removeprefix("hf:")}
    phi3("pull", url, "--for", "gpu", "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == b"weights"
    refused = phi3("pull", "hf:someone", NAME, check=False)
    sentence = "Error: 'hf:someone' is no registry: give dir:PATH, hf:OWNER/REPOSITORY or oci:HOST/NAME.\n"
    assert (refused.returncode, refused.stderr) == (1, sentence)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """If the Hub cannot be reached, listing, pulling and publishing end with one sentence."""
    use_hub("http://127.0.0.1:9", monkeypatch)
    for command in (("list", URL), ("pull", URL, NAME), ("publish", NAME, "--to", URL, "--version", "1.0.0")):
        refused = phi3(*command, check=False)
        assert refused.returncode == 1
        assert refused.stderr.endswith("): check the network and HF_TOKEN, then run again.\n")
        assert f"Error: {URL}: http://127.0.0.1:9 failed ([Errno 111] Connection refused" in refused.stderr
