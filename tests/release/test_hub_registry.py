"""The real client publishes to an emulated repository of the Hugging Face Hub and pulls from it, on loopback."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from ruamel.yaml import YAML

from pipeline.common import paths
from pipeline.common.errors import PipelineError
from pipeline.common.files import digest
from pipeline.release import pull
from pipeline.release.registry import open_registry
from pipeline.release.registry.hub import HubRegistry
from tests.helpers import edit, phi3, use_hub
from tests.hub_registry_server import metadata_errors
from tests.release_project import KILLED, MODEL, NAME, VARIANT, build, exit_codes, publish_version, validate

pytestmark = [pytest.mark.usefixtures("release_folder"), pytest.mark.slow, pytest.mark.mutants]
REPO = "someone/tiny-openvino-int4"
URL = f"hf:{REPO}"
BIG = bytes(range(256)) * 100


@pytest.fixture
def registry(hub, release_folder):
    """A repository that is not there yet."""
    return open_registry(URL)


def published(registry, version="1.0.0", aliases=()):
    """Publish the artifact; return its release."""
    return publish_version(version, registry=registry, aliases=aliases)


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


def test_what_a_failed_publication_uploaded_stays_out(registry, tmp_path):
    """Files that were uploaded for a publication which failed are not in the next one."""
    (tmp_path / "secret.txt").write_text("of another artifact")
    registry.prepare(NAME)
    registry.upload(NAME, "secret.txt", tmp_path / "secret.txt", digest(tmp_path / "secret.txt"))
    files = published(registry).files.keys()
    there = {file.rfilename for file in HfApi().repo_info(REPO, revision="1.0.0").siblings}
    assert there == {*files, "release.json", ".gitattributes"}


def test_a_publisher_that_was_killed_between_commit_and_tag(registry, monkeypatch):
    """A commit without its tag is no version; the next publication makes both."""
    published(registry, aliases=("latest",))
    build(BIG)
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_tag", lambda *_, **__: os._exit(KILLED))
        assert exit_codes(publish_version, "2.0.0", open_registry(URL), processes=1) == [KILLED]
    assert [entry.version for entry in registry.entries()] == ["1.0.0"]
    published(registry, "2.0.0", aliases=("latest",))
    assert (pull.pull(registry, NAME) / "openvino_model.bin").read_bytes() == BIG


@pytest.mark.parametrize(
    "command",
    [("list", URL), ("pull", URL, "--for", "cpu"), ("pull", URL, NAME), ("pull", URL, f"{NAME}@1.0.0")],
)
def test_a_repository_that_is_not_there(hub, command):
    """The Hub does not say whether a repository is missing or private: the command says both, with the remedy."""
    refused = phi3(*command, check=False)
    sentence = f"Error: {URL} does not exist, or is private: check its name, and that HF_TOKEN may read it.\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", sentence)


def test_an_owner_alone(hub):
    """A release published to an owner is in the repository with the usual name, which is said, and is pulled there."""
    url = "hf:someone/Phi-3-mini-4k-instruct-int4-cw-ov"
    for version in ("1.0.0", "1.1.0"):
        output = phi3("publish", NAME, "--to", "hf:someone", "--version", version).stdout
        assert output.splitlines()[-1].endswith(f" MB, to {url} as latest")
    assert hub.repositories.keys() == {url.removeprefix("hf:")}
    phi3("pull", url, "--for", "gpu", "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == b"weights"


def test_nothing_is_pulled_from_an_owner(hub):
    """An owner alone names no repository to pull from."""
    refused = phi3("pull", "hf:someone", NAME, check=False)
    sentence = "Error: 'hf:someone' is no registry: give dir:PATH, hf:OWNER/REPOSITORY or oci:HOST/NAME.\n"
    assert (refused.returncode, refused.stderr) == (1, sentence)


@pytest.mark.parametrize(
    "command", [("list", URL), ("pull", URL, NAME), ("publish", NAME, "--to", URL, "--version", "1.0.0")]
)
def test_a_hub_that_cannot_be_reached(monkeypatch, command):
    """If the Hub cannot be reached, listing, pulling and publishing end with one sentence."""
    use_hub("http://127.0.0.1:9", monkeypatch)
    refused = phi3(*command, check=False)
    assert refused.returncode == 1
    assert refused.stderr.endswith("): check the network and HF_TOKEN, then run again.\n")
    assert f"Error: {URL}: http://127.0.0.1:9 failed ([Errno 111] Connection refused" in refused.stderr


@pytest.mark.parametrize(
    ("part", "call"),
    [
        ("/resolve/", lambda registry: registry.read(NAME, "1.0.0")),
        ("/refs", HubRegistry.entries),
        ("/commit/", lambda registry: registry.point(NAME, "stage", "1.0.0")),
    ],
)
def test_a_server_that_fails(hub, registry, part, call):
    """When the Hub fails, the sentence names it and says what to do; no token is shown."""
    published(registry)
    hub.fail = {part: 403}
    with pytest.raises(PipelineError, match=f"^{URL}: {hub.url} failed .*: check the network and HF_TO") as said:
        call(registry)
    assert "hf_secret" not in str(said.value)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub(hub, registry, monkeypatch, status):
    """When the Hub limits the rate, or is not available for a moment, a pull waits and then goes on."""
    published(registry)
    hub.fail = {"/resolve/1.0.0/openvino_model.bin": status}
    waited = []
    monkeypatch.setattr(time, "sleep", lambda seconds: (waited.append(seconds), hub.fail.clear()))
    assert (pull.pull(registry, NAME, version="1.0.0") / "openvino_model.bin").read_bytes() == b"weights"
    assert waited == [1]


@pytest.mark.parametrize("content", [b"[", b"[]", b'{"latest": 1}'])
def test_aliases_that_are_no_json(hub, registry, content):
    """An aliases.json that somebody damaged is refused with a sentence."""
    published(registry)
    hub.commit(REPO, hub.revision(REPO, "main")[1] | {"aliases.json": content})
    with pytest.raises(PipelineError, match=r"aliases\.json is not valid: pull a version by its number"):
        registry.resolve(NAME, "latest")


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        ("MIT", {"license": "mit"}),
        ("LicenseRef-Acme", {"license": "other", "license_name": "licenseref-acme", "license_link": "LICENSE"}),
    ],
)
def test_the_card_follows_the_rules_of_the_hub(hub, registry, licence, metadata):
    """The Hub takes the card's metadata."""
    edit(paths.variant(MODEL, VARIANT) / "manifest.json", '"license": "MIT"', f'"license": "{licence}"')
    validate()
    published(registry)
    content = hub.revision(REPO, "1.0.0")[1]["README.md"].decode()
    assert list(metadata_errors(content)) == []
    assert YAML(typ="safe").load(content.split("---\n")[1]) == metadata | {
        "base_model": "microsoft/Phi-3-mini-4k-instruct",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["openvino", "openvino-int4", "phi3", "cpu", "gpu"],
    }
    assert ("POST", "/api/validate-yaml") in hub.log


def test_a_new_repository_is_private(hub, registry):
    """A fine-tune must not become public by mistake."""
    published(registry)
    assert hub.private == {REPO}


def test_downloads_are_counted(hub, registry):
    """A release has the source's config.json, by which the Hub counts downloads."""
    published(registry)
    assert json.loads(hub.revision(REPO, "1.0.0")[1]["config.json"])["model_type"] == "phi3"


def test_files_of_an_older_version_go(hub, registry):
    """The main branch of a repository of the Hub has the files of the newest version, and the Hub's own."""
    Path("artifacts/tiny/source/NOTICE").write_text("x")
    published(registry, aliases=("latest",))
    Path("artifacts/tiny/source/NOTICE").unlink()
    release = published(registry, "1.1.0")
    main = hub.revision(REPO, "main")[1]
    assert main.keys() == {*release.files, "release.json", "aliases.json", ".gitattributes"}
    assert "NOTICE" in hub.revision(REPO, "1.0.0")[1]


@pytest.fixture
def meanwhile(hub, registry, monkeypatch):
    """A repository with version 1.0.0, to which somebody else commits when a publisher has taken its first look."""
    release = published(registry)
    look, others = HfApi.repo_info, iter([b"another's"])

    def look_slowly(*arguments, **options):
        found = look(*arguments, **options)
        if (content := next(others, None)) is not None:
            hub.commit(REPO, hub.revision(REPO, "main")[1] | {"other": content})
        return found

    monkeypatch.setattr(HfApi, "repo_info", look_slowly)
    return release.model_copy(update={"version": "1.1.0"})


def test_somebody_else_commits_during_a_publication(hub, registry, meanwhile):
    """The publication is refused, and what the other committed stays."""
    registry.prepare(NAME)
    with pytest.raises(FileExistsError):
        registry.publish(meanwhile, None)
    assert hub.revision(REPO, "main")[1]["other"] == b"another's"
    assert hub.revision(REPO, "1.1.0") is None


def test_somebody_else_commits_while_an_alias_moves(hub, registry, meanwhile):
    """The alias is moved by a second commit, and what the other committed stays."""
    registry.point(NAME, "stage", "1.0.0")
    assert hub.revision(REPO, "main")[1]["other"] == b"another's"
    assert registry.resolve(NAME, "stage") == "1.0.0"


def test_an_alias_that_others_move_all_the_time(registry, monkeypatch):
    """When others commit again and again, the alias is given up with a sentence."""
    published(registry)
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha="0" * 40, siblings=[]))
    with pytest.raises(PipelineError, match=f"^others publish to {URL} all the time: run again to move stage"):
        registry.point(NAME, "stage", "1.0.0")


def test_a_hub_that_cannot_continue(hub, registry):
    """A server that sends a file from its beginning again is not taken for one that continues it."""
    release = published(registry)
    hub.ranges = False
    with pytest.raises(PipelineError, match=r"failed \(it cannot continue a download\): check the network"):
        list(registry.download(release, "openvino_model.bin", offset=3))
