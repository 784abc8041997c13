"""An OCI registry that wants passwords or tokens, on loopback."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from requests import Session

from pipeline.release import pull
from pipeline.release.pull import verify_release
from pipeline.release.registry import open_registry
from tests.oci_registry_server import OciRegistryServer
from tests.release_project import NAME, build, publish_version

pytestmark = [pytest.mark.usefixtures("release_folder"), pytest.mark.slow]
BIG = bytes(range(256)) * 100


def command_lines():
    """Return the command line of every process."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield " ".join(process.cmdline())


@pytest.fixture
def locked(tmp_path):
    """An empty registry that wants a password."""
    with OciRegistryServer(tmp_path / "oci", password=True) as server:
        yield server


def test_no_password(locked):
    """Without `docker login` a sentence says what to do."""
    refused = locked.phi3("list", locked.url, check=False)
    sentence = f"Error: {locked.url} wants a password: run `docker login {locked.host}` first.\n"
    assert (refused.returncode, refused.stderr) == (1, sentence)


def test_a_wrong_password(locked):
    """A wrong password ends with a sentence that does not show it."""
    locked.login("wr0ng")
    refused = locked.phi3("list", locked.url, check=False)
    assert refused.returncode == 1
    assert "docker login" in refused.stderr
    assert "wr0ng" not in refused.stderr


def test_the_password(locked):
    """The password of `docker login` publishes and pulls, and no command line of the machine shows it."""
    locked.login("s3cret")
    with ThreadPoolExecutor() as pool:
        published = pool.submit(locked.phi3_process, "publish", NAME, "--to", locked.url, "--version", "1.0.0")
        commands = set()
        while not published.done():
            commands |= set(command_lines())
    assert published.result().returncode == 0
    assert any(locked.url in command for command in commands)
    assert not any("s3cret" in command for command in commands)
    locked.phi3("pull", locked.url, NAME, "--to", "model")
    assert verify_release(Path("model")).name == NAME


@pytest.fixture
def tokens(tmp_path):
    """An empty registry that wants tokens of an issuer, as Docker Hub, GitLab, Harbor and GHCR do."""
    with OciRegistryServer(tmp_path / "oci", tokens=True) as server:
        server.login("s3cret")
        yield server


def test_tokens(tokens):
    """A token is asked for each scope."""
    tokens.phi3("publish", NAME, "--to", tokens.url, "--version", "1.0.0")
    actions = {frozenset(scope.partition("tiny:")[2].split(",")) for scope in tokens.issuer.asked}
    assert actions == {frozenset(["pull"]), frozenset(["pull", "push"])}  # the registry names them in any order


def test_all_may_read(tokens):
    """Without a password a token to read is enough to list and to pull."""
    tokens.phi3("publish", NAME, "--to", tokens.url, "--version", "1.0.0")
    (tokens.home / ".docker/config.json").unlink()
    assert tokens.phi3("list", tokens.url).stdout == f"{NAME} 1.0.0 latest\n"
    tokens.phi3("pull", tokens.url, NAME, "--to", "model")
    assert verify_release(Path("model")).version == "1.0.0"


@pytest.mark.parametrize("password", [None, "wr0ng"])
def test_a_token_to_write_needs_the_password(tokens, password):
    """Who publishes without a password, or with a wrong one, gets one sentence."""
    (tokens.home / ".docker/config.json").unlink()
    if password:
        tokens.login(password)
    refused = tokens.phi3("publish", NAME, "--to", tokens.url, "--version", "1.1.0", check=False)
    assert (refused.returncode, "docker login" in refused.stderr, refused.stderr.count("\n")) == (1, True, 1)


@pytest.mark.parametrize("chunk", [1000, 16 << 20])
def test_a_token_that_expires(tokens, monkeypatch, chunk):
    """A token that expires within an upload or before a download is replaced, whatever the size of the chunks."""
    monkeypatch.setenv("HOME", str(tokens.home))
    monkeypatch.setattr("pipeline.release.registry.oci.UPLOAD_CHUNK", chunk)
    registry = open_registry(tokens.url)
    request, expired = Session.request, []

    def expire(session, method, url, **options):
        if method in ("PATCH", "PUT") or (method == "GET" and "/blobs/" in url):
            token = tokens.issuer.token("repository:models/tiny:pull,push", seconds=-3000)
            if options["headers"].get("Authorization") and url not in expired:
                options["headers"]["Authorization"] = f"Bearer {token}"
                expired.append(url)
        return request(session, method, url, **options)

    monkeypatch.setattr(Session, "request", expire)
    build(bytes(range(256)) * (chunk // 100))
    publish_version(registry=registry)
    pull.pull(registry, NAME, to=Path("model"))
    assert verify_release(Path("model")).version == "1.0.0"
    assert len(expired) > 10


def test_a_token_is_replaced_before_it_expires(tokens, monkeypatch):
    """When a token has lived for half of its time, the next request of an upload asks for another one first."""
    monkeypatch.setenv("HOME", str(tokens.home))
    monkeypatch.setattr("pipeline.release.registry.oci.UPLOAD_CHUNK", 1000)
    monkeypatch.setattr("pipeline.release.registry.oci.TOKEN_LIFETIME", 0)
    build(BIG)
    publish_version(registry=open_registry(tokens.url))
    assert len(tokens.issuer.asked) > len(BIG) / 1000
