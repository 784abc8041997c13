"""A real OCI client publishes to Debian's docker-registry and pulls from it, on loopback."""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from requests import Session
from urllib3.util import Retry

from pipeline.release import pull
from pipeline.release.pull import check
from pipeline.release.registry import open_registry
from pipeline.release.registry.oci import OciRegistry
from tests.helpers import phi3
from tests.oci_registry_server import OciRegistryServer
from tests.release_project import NAME, build, publish_version, run_and_kill

pytestmark = [pytest.mark.usefixtures("release_folder"), pytest.mark.slow]
BIG = bytes(range(256)) * 100


@pytest.mark.parametrize(
    ("method", "calls", "after"),
    [("upload", 1, False), ("upload", 5, True), ("publish", 1, False), ("publish", 1, True), ("point", 1, True)],
)
def test_a_killed_publisher(oci, method, calls, after):
    """If a publisher is killed at any phase, readers see the whole old version until the tag exists; a retry works."""
    oci.phi3("publish", NAME, "--to", oci.url, "--version", "1.0.0")
    build(BIG)
    program = run_and_kill(f"pipeline.release.registry.oci:OciRegistry.{method}", calls=calls, after=after)
    publish = ("publish", NAME, "--to", oci.url, "--version", "2.0.0")
    assert oci.phi3_process(*publish, program=program).returncode == 9
    tagged = method == "point" or (method == "publish" and after)
    versions = [line.split()[1] for line in oci.phi3("list", oci.url).stdout.splitlines()]
    assert versions == (["1.0.0", "2.0.0"] if tagged else ["1.0.0"])
    oci.phi3("pull", oci.url, NAME, "--to", "latest")
    assert Path("latest/openvino_model.bin").read_bytes() == (BIG if method == "point" else b"weights")
    again = oci.phi3(*publish).stdout
    assert ("uploading openvino_model.bin" in again) == (method == "upload" and not after)
    oci.phi3("pull", oci.url, NAME, "--to", "newer")
    assert Path("newer/openvino_model.bin").read_bytes() == BIG


def test_two_publishers_at_once(oci):
    """Publishers of the same bytes at the same time all succeed, and the release is whole."""
    build(BIG)
    command = ("publish", NAME, "--to", oci.url, "--version", "1.0.0")
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda _: oci.phi3_process(*command), range(3)))
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 3
    oci.phi3("pull", oci.url, NAME, "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == BIG


def test_a_blob_that_is_being_written(oci, monkeypatch):
    """A manifest that the registry refuses, since another publisher is writing one of its blobs, is sent again."""
    put, sleep, refused = OciRegistry._put, Retry.sleep, []

    def put_meanwhile(self, manifest, tag):
        sha256 = hashlib.sha256(BIG).hexdigest()
        (link,) = oci.root.rglob(f"_layers/sha256/{sha256}/link")
        content = link.read_bytes()

        def finish(retry, response=None):
            refused.append(response.status)
            link.write_bytes(content)
            sleep(retry, response)

        monkeypatch.setattr(Retry, "sleep", finish)
        link.write_bytes(b"")  # as docker-registry does before it writes the link
        put(self, manifest, tag)

    monkeypatch.setattr(OciRegistry, "_put", put_meanwhile)
    build(BIG)
    publish_version(registry=open_registry(oci.url), aliases=())
    assert refused == [400]
    oci.phi3("pull", oci.url, f"{NAME}@1.0.0", "--to", "model")
    assert Path("model/openvino_model.bin").read_bytes() == BIG


def test_a_corrupt_content(oci):
    """A content replaced by other bytes of the same length is refused, and nothing is installed."""
    build(BIG)
    oci.phi3("publish", NAME, "--to", oci.url, "--version", "1.0.0")
    sha256 = hashlib.sha256(BIG).hexdigest()
    (data,) = oci.root.rglob(f"blobs/sha256/{sha256[:2]}/{sha256}/data")
    data.write_bytes(bytes(len(BIG)))
    refused = oci.phi3("pull", oci.url, NAME, "--to", "model", check=False)
    assert refused.returncode == 1
    assert "gave other bytes for openvino_model.bin than release.json says" in refused.stderr
    assert not Path("model").exists()


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
    assert check(Path("model")).name == NAME


@pytest.fixture
def tokens(tmp_path):
    """An empty registry that wants tokens of an issuer, as Docker Hub, GitLab, Harbor and GHCR do."""
    with OciRegistryServer(tmp_path / "oci", tokens=True) as server:
        yield server


def test_tokens(tokens, tmp_path):
    """A token is asked for each scope: all may read, and who writes without a password gets a sentence."""
    tokens.login("s3cret")
    tokens.phi3("publish", NAME, "--to", tokens.url, "--version", "1.0.0")
    actions = {frozenset(scope.partition("tiny:")[2].split(",")) for scope in tokens.issuer.asked}
    assert actions == {frozenset(["pull"]), frozenset(["pull", "push"])}  # the registry names them in any order
    (tokens.home / ".docker/config.json").unlink()
    assert tokens.phi3("list", tokens.url).stdout == f"{NAME} 1.0.0 latest\n"
    tokens.phi3("pull", tokens.url, NAME, "--to", "model")
    assert check(tmp_path / "model").version == "1.0.0"
    build(BIG)
    for _ in range(2):
        refused = tokens.phi3("publish", NAME, "--to", tokens.url, "--version", "1.1.0", check=False)
        assert (refused.returncode, "docker login" in refused.stderr, refused.stderr.count("\n")) == (1, True, 1)
        tokens.login("wr0ng")


@pytest.mark.parametrize("chunk", [1000, 16 << 20])
def test_a_token_that_expires(tokens, monkeypatch, chunk):
    """A token that expires within an upload or before a download is replaced, whatever the size of the chunks."""
    monkeypatch.setenv("HOME", str(tokens.home))
    monkeypatch.setattr("pipeline.release.registry.oci.UPLOAD_CHUNK", chunk)
    tokens.login("s3cret")
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
    pull.pull(registry, NAME, to=Path("model"), progress=lambda *_: None)
    assert check(Path("model")).version == "1.0.0"
    assert len(expired) > 10


def test_a_token_is_replaced_before_it_expires(tokens, monkeypatch):
    """When a token has lived for half of its time, the next request of an upload asks for another one first."""
    monkeypatch.setenv("HOME", str(tokens.home))
    monkeypatch.setattr("pipeline.release.registry.oci.UPLOAD_CHUNK", 1000)
    monkeypatch.setattr("pipeline.release.registry.oci.TOKEN_LIFETIME", 0)
    tokens.login("s3cret")
    build(BIG)
    publish_version(registry=open_registry(tokens.url))
    assert len(tokens.issuer.asked) > len(BIG) / 1000


def test_a_registry_that_is_not_there():
    """A host that does not answer ends the command with one sentence."""
    refused = phi3("list", "oci:127.0.0.1:9/models/tiny", check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: oci:127.0.0.1:9/models/tiny failed (")
