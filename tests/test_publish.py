"""Publishing to a directory and pulling from it: complete, immutable, atomic; nothing wrong is installed."""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline import paths, publish, pull
from pipeline.errors import PipelineError
from pipeline.manifest import Manifest, building, digest, seal, verify
from pipeline.pull import check
from pipeline.registry import Entry, open_registry, require_own
from pipeline.registry.directory import DirectoryRegistry
from pipeline.release import RELEASE, read_release, unsafe
from tests.conftest import run

MODEL, VARIANT = "tiny", "openvino-int4"
NAME = f"{MODEL}/{VARIANT}"
METRICS = {"passed": True, "size_bytes": 3, "kl_mean": 0.1, "runtime": "openvino-genai", "device": "CPU"}


def quiet(*arguments):
    """Take progress."""


def build(weights=b"weights"):
    """Build and validate an artifact with the given weights in the current directory."""
    directory = paths.variant(MODEL, VARIANT)
    with building(directory) as target:
        (target / "openvino_model.bin").write_bytes(weights)
        (target / "tokenizer.json").write_text("{}")
        seal(
            target,
            Manifest(
                name=NAME,
                model=MODEL,
                variant=VARIANT,
                source={"repo": "microsoft/Phi-3-mini-4k-instruct", "revision": "f" * 40},
                license="MIT",
                recipe={"asked": {"ratio": 0.6}, "achieved": {"formats": {"int4-sym-g128": 1.0}}},
                eos_token_ids=[1],
                context={"max_position_embeddings": 512},
                runtime={"requires": {"openvino-genai": "2026.4.1.0"}, "devices": ["CPU", "GPU"]},
                tools={"openvino": "2026.4.1"},
            ),
        )
    validate()


def validate(failures=()):
    """Write what the stage validate would."""
    manifest = (paths.variant(MODEL, VARIANT) / "manifest.json").read_bytes()
    evidence = {"manifest_sha256": hashlib.sha256(manifest).hexdigest(), "failures": list(failures)}
    for path, content in ((paths.validation(MODEL, VARIANT), evidence), (paths.metrics(MODEL, VARIANT), METRICS)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def publish_version(version="1.0.0", registry=None, aliases=("latest",)):
    """Publish the artifact of the current directory."""
    return publish.publish(
        MODEL,
        VARIANT,
        registry=registry or open_registry("dir:registry"),
        version=version,
        aliases=aliases,
        progress=quiet,
    )


def pull_latest(to=None, reference="latest"):
    """Pull into the cache, or `to`."""
    return pull.pull(open_registry("dir:registry"), NAME, reference=reference, to=to, progress=quiet)


def exit_codes(function, *arguments, processes):
    """Return how so many processes end that call `function` at the same time."""
    started = [multiprocessing.get_context("fork").Process(target=function, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder with git, a validated artifact, a source with a licence, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path / "cache"))
    run("git", "init", "-q", cwd=tmp_path)
    (tmp_path / "dvc.lock").write_text("")
    run("git", "add", "dvc.lock", cwd=tmp_path)
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start", cwd=tmp_path)
    paths.source(MODEL).mkdir(parents=True)
    (paths.source(MODEL) / "LICENSE").write_text("MIT")
    build()
    return tmp_path


def blobs():
    """Return the contents in the registry, and what was left behind there."""
    return sorted(
        path.name for path in Path("registry").rglob("*") if path.is_file() and path.parent.parent.name == "sha256"
    )


def test_publish_then_pull(project):
    """What is pulled is the artifact with licence, model card, metrics, provenance and bill of materials."""
    release = publish_version()
    directory = pull_latest()
    assert directory == project / "cache/releases" / NAME / "1.0.0"
    assert sorted(path.name for path in directory.iterdir()) == [
        "LICENSE",
        "README.md",
        "manifest.json",
        "metrics.json",
        "openvino_model.bin",
        "provenance.json",
        "release.json",
        "sbom.cdx.json",
        "tokenizer.json",
    ]
    assert check(directory) == release
    assert (directory / "openvino_model.bin").read_bytes() == b"weights"
    card = (directory / "README.md").read_text()
    assert card.startswith("---\nbase_model: microsoft/Phi-3-mini-4k-instruct\nlibrary_name: openvino\nlicense: mit\n")
    assert "\nbase_model_relation: quantized\n---\n" in card
    assert "| mean KL divergence to the source model | 0.1000 nats |" in card
    statement = json.loads((directory / "provenance.json").read_text())
    weights = hashlib.sha256(b"weights").hexdigest()
    assert {"name": "openvino_model.bin", "digest": {"sha256": weights}} in statement["subject"]
    head = run("git", "rev-parse", "HEAD", cwd=project).stdout.strip()
    assert statement["predicate"]["buildDefinition"]["resolvedDependencies"][1]["digest"] == {"gitCommit": head}
    assert (
        json.loads((directory / "sbom.cdx.json").read_text())["components"][0]["purl"] == "pkg:pypi/openvino@2026.4.1"
    )


def test_versions_and_aliases():
    """Versions sort by number; aliases move; a version or an alias can be pulled."""
    for number, version in enumerate(("1.9.0", "1.10.0")):
        build(b"weights %d" % number)
        publish_version(version, aliases=("latest", "stage") if version == "1.9.0" else ("latest",))
    assert open_registry("dir:registry").entries() == [
        Entry(NAME, "1.9.0", ["stage"]),
        Entry(NAME, "1.10.0", ["latest"]),
    ]
    assert (pull_latest() / "openvino_model.bin").read_bytes() == b"weights 1"
    assert (pull_latest(reference="stage") / "openvino_model.bin").read_bytes() == b"weights 0"
    with pytest.raises(PipelineError, match=r"dir:registry has no tiny/openvino-int4 2\.0\.0: see `phi3 list"):
        pull_latest(reference="2.0.0")


def test_the_same_again_is_nothing_and_other_bytes_are_a_conflict():
    """Publishing the same bytes changes nothing; other bytes under the same version are refused and change nothing."""
    publish_version()
    before = {path: path.stat().st_mtime_ns for path in Path("registry").rglob("*") if "aliases" not in path.parts}
    publish_version()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    build(b"others")
    with pytest.raises(PipelineError, match=r"1\.0\.0 with other bytes \(manifest\.json, openvino_model\.bin, prov"):
        publish_version()
    assert (pull_latest() / "openvino_model.bin").read_bytes() == b"weights"


def test_only_what_was_validated(project):
    """An artifact that failed, was never validated, was built anew since, or has changed is not published."""
    validate(["check 'fidelity' failed"])
    with pytest.raises(PipelineError, match=r"did not pass validation \(check 'fidelity' failed\): it stays here"):
        publish_version()
    paths.validation(MODEL, VARIANT).unlink()
    with pytest.raises(
        PipelineError, match="has not been validated: run `dvc repro validate@tiny-openvino-int4` first"
    ):
        publish_version()
    validate()
    evidence = paths.validation(MODEL, VARIANT).read_text()
    build(b"anew")
    paths.validation(MODEL, VARIANT).write_text(evidence)
    with pytest.raises(PipelineError, match="was built anew since it was validated"):
        publish_version()
    (paths.variant(MODEL, VARIANT) / "tokenizer.json").write_text("[]")
    with pytest.raises(PipelineError, match=r"tokenizer\.json has changed"):
        publish_version()
    assert not Path("registry").exists()


@pytest.mark.parametrize("version", ["1.0", "v1.0.0", "1.0.0\n", "../1.0.0", "01.0.0"])
def test_a_wrong_version(version):
    """A version is three numbers, nothing else."""
    with pytest.raises(PipelineError, match="is no version: give three numbers"):
        publish_version(version)


class Dies(DirectoryRegistry):
    """A registry whose publisher is killed when it calls `method` for the n-th time."""

    def __init__(self, method, calls, *, after):
        super().__init__(Path("registry"))
        original, left = getattr(self, method), [calls]

        def call(*arguments):
            left[0] -= 1
            if left[0] == 0 and not after:
                os._exit(9)
            result = original(*arguments)
            if left[0] == 0:
                os._exit(9)
            return result

        setattr(self, method, call)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("method", "calls"), [("upload", 1), ("upload", 5), ("publish", 1), ("point", 1)])
def test_a_killed_publisher(method, calls, after):
    """Killed at any phase, readers see the old version whole; a retry uploads only what is missing and ends well."""
    publish_version("1.0.0")
    build(b"newer")
    assert exit_codes(publish_version, "2.0.0", Dies(method, calls, after=after), processes=1) == [9]
    visible = [entry.version for entry in open_registry("dir:registry").entries()]
    assert visible == (["1.0.0", "2.0.0"] if method == "point" or (method == "publish" and after) else ["1.0.0"])
    moved = method == "point" and after
    assert (pull_latest() / "openvino_model.bin").read_bytes() == (b"newer" if moved else b"weights")
    uploaded = set(blobs())
    registry = open_registry("dir:registry")
    sent = []
    original = registry.upload
    registry.upload = lambda name, path, local, file: sent.append(file.sha256) or original(name, path, local, file)
    publish_version("2.0.0", registry)
    assert not set(sent) & uploaded
    assert (pull_latest() / "openvino_model.bin").read_bytes() == b"newer"


def test_two_publishers_at_once():
    """Of two publishers of the same version both succeed with the same bytes, and one is refused with others."""
    assert exit_codes(publish_version, processes=4) == [0] * 4
    assert check(pull_latest()).version == "1.0.0"

    class Late(DirectoryRegistry):
        def read(self, name, version):
            found = super().read(name, version)
            self.read = super().read  # the other one publishes after this one has looked
            return None if found else found

    build(b"others")
    with pytest.raises(PipelineError, match="with other bytes"):
        publish_version(registry=Late(Path("registry")))


def test_a_registry_of_another_artifact():
    """A registry that is for one artifact takes no other, and an empty one takes any."""
    release = publish_version().content()
    require_own(None, "tiny/other", url="hf:a/b")
    require_own(release, NAME, url="hf:a/b")
    with pytest.raises(PipelineError, match=f"hf:a/b is the registry of {NAME}: give tiny/other a repository of its"):
        require_own(release, "tiny/other", url="hf:a/b")


def test_two_pulls_at_once():
    """Pulls of the same release at the same time all succeed, and fetch each content once."""
    publish_version()
    assert exit_codes(pull_latest, processes=4) == [0] * 4
    check(pull_latest())


def test_contents_are_shared(project):
    """Two releases with the same tokenizer store it once, in the registry and on the consumer's disk."""
    publish_version("1.0.0")
    first = pull_latest()
    build(b"newer")
    publish_version("2.0.0")
    second = pull_latest()
    assert first != second
    assert (first / "tokenizer.json").stat().st_ino == (second / "tokenizer.json").stat().st_ino
    shutil.rmtree("registry")
    assert pull.pull(DirectoryRegistry(project / "nothing"), NAME, reference="1.0.0", to=None, progress=quiet) == first


def test_a_pull_continues():
    """An interrupted download goes on at the byte where it stopped."""
    publish_version()
    offsets = []

    class Cut(DirectoryRegistry):
        def download(self, release, path, *, offset):
            offsets.append((path, offset))
            for chunk in super().download(release, path, offset=offset):
                if path == "openvino_model.bin" and not offset:
                    yield chunk[:3]
                    raise OSError("the network is down")
                yield chunk

    registry = Cut(Path("registry"))
    with pytest.raises(OSError, match="the network is down"):
        pull.pull(registry, NAME, reference="latest", to=Path("model"), progress=quiet)
    assert not Path("model").exists()
    pull.pull(registry, NAME, reference="latest", to=Path("model"), progress=quiet)
    assert [offset for path, offset in offsets if path == "openvino_model.bin"] == [0, 3]
    check(Path("model"))


def blob_of(path):
    """Return the registry's file with the content of `path`, a file of the artifact."""
    sha256 = digest(paths.variant(MODEL, VARIANT) / path).sha256
    return Path("registry/blobs/sha256") / sha256[:2] / sha256


@pytest.mark.parametrize("content", [b"Weights", b"weights and more", b""])
def test_a_corrupt_content_in_the_registry(content):
    """Other bytes than release.json says are refused, and nothing is installed; publishing again mends the registry."""
    publish_version()
    blob_of("openvino_model.bin").write_bytes(content)
    with pytest.raises(PipelineError, match=r"gave other bytes for openvino_model\.bin than release\.json says"):
        pull_latest(to=Path("model"))
    assert not Path("model").exists()
    publish_version("1.0.1")
    check(pull_latest(to=Path("model")))


def test_a_corrupt_file_in_the_cache():
    """A changed file in the cache is found before it is used, and fetched anew."""
    publish_version()
    directory = pull_latest()
    (directory / "openvino_model.bin").chmod(0o644)
    (directory / "openvino_model.bin").write_bytes(b"wEights")
    with pytest.raises(PipelineError, match=r"openvino_model\.bin has changed\. Remove it and pull it again"):
        pull_latest()
    check(pull_latest(to=Path("model")))


def test_what_is_no_longer_the_release():
    """Anything additional, missing, changed or replaced by a link in a pulled directory is found."""
    publish_version()
    directory = pull_latest(to=Path("model"))
    (directory / "extra").write_text("x")
    (directory / "README.md").unlink()
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("LICENSE")
    with pytest.raises(PipelineError) as refused:
        check(directory)
    assert str(refused.value) == (
        "model: README.md is missing; extra is not of the release; tokenizer.json has changed. Remove it and pull it "
        "again."
    )


def hostile(**changes):
    """Publish a release.json with `changes`, as a hostile registry would; return the refusal of a pull."""
    release = publish_version()
    content = json.loads(release.content()) | changes
    Path("registry/releases", NAME, "1.0.0", RELEASE).write_text(json.dumps(content))
    with pytest.raises(PipelineError) as refused:
        pull_latest(to=Path("model"))
    assert not Path("model").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/x", "a/../../x", "a//x", "C:/x", "a\\x", "nul", "com1.txt", "x.", "x ", "x\n", "release.json", ""],
)
def test_hostile_paths(path):
    """A path that leaves the directory, or that a system treats specially, is refused before anything is written."""
    assert unsafe(path)
    file = {"size": 1, "sha256": "0" * 64}
    assert "release.json is refused (files: the path " in hostile(files={path: file})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0.9.0"}, "has tiny/openvino-int4 0.9.0, not tiny/openvino-int4 1.0.0"),
        ({"variant": "openvino-fp16"}, "has tiny/openvino-fp16 1.0.0, not tiny/openvino-int4 1.0.0"),
        ({"schema_version": 2}, "is of another schema; install the phi3-pipeline that published it"),
        ({"files": {}}, "release.json is refused (files: "),
        ({"files": {"x": {"size": 10**13, "sha256": "0" * 64}}}, "the files have 10000 GB"),
        (
            {"files": {"a": {"size": 1, "sha256": "0" * 64}, "A": {"size": 1, "sha256": "0" * 64}}},
            "differ in upper and",
        ),
        ({"surprise": 1}, "release.json is refused (surprise: Extra inputs are not permitted)"),
    ],
)
def test_hostile_releases(changes, reason):
    """An older version under a newer name, another variant or schema, absurd sizes and unknown keys are refused."""
    assert reason in hostile(**changes)


def test_content_that_is_not_json():
    """Rubbish, deep nesting and sheer size end with one sentence."""
    for content in (b"\xff", b"[" * 100_000, b" " * 2_000_000):
        with pytest.raises(PipelineError, match=r"^here: release\.json is "):
            read_release(content, origin="here")


@pytest.fixture
def keys(project):
    """Two pairs of EC keys: ours, and somebody else's."""
    for name in ("ours", "others"):
        run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem", cwd=project)
        run("openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub", cwd=project)


def signed(version="1.0.0"):
    """Publish with our key."""
    return publish.publish(
        MODEL,
        VARIANT,
        registry=open_registry("dir:registry"),
        version=version,
        aliases=("latest",),
        key=Path("ours.pem"),
        progress=quiet,
    )


def pull_signed(key="ours.pub", to=Path("model")):
    """Pull what the owner of `key` signed."""
    registry = open_registry("dir:registry")
    return pull.pull(registry, NAME, reference="latest", to=to, key=Path(key), progress=quiet)


@pytest.mark.usefixtures("keys")
def test_signed():
    """With the public key alone a signed release is taken, and verified again later, offline."""
    signed()
    directory = pull_signed()
    shutil.rmtree("registry")
    assert check(directory, key=Path("ours.pub")).version == "1.0.0"
    with pytest.raises(PipelineError, match=r"model is not signed by the owner of others\.pub: it is refused"):
        check(directory, key=Path("others.pub"))


@pytest.mark.usefixtures("keys")
def test_not_signed_by_the_key_that_was_given():
    """Unsigned, signed by another key, or with a damaged signature: refused, and nothing is installed."""
    publish_version("0.9.0")
    with pytest.raises(PipelineError, match=r"tiny/openvino-int4 0\.9\.0 is not signed, and a key was given"):
        pull_signed()
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 0\.9\.0 unsigned: sign a new version"):
        signed("0.9.0")
    signed()
    with pytest.raises(PipelineError, match=r"is not signed by the owner of others\.pub"):
        pull_signed("others.pub")
    signature = Path("registry/releases", NAME, "1.0.0/release.sig")
    for content in (b"", b"{}", b"[" * 100_000, signature.read_bytes()[:-20]):
        signature.write_bytes(content)
        with pytest.raises(PipelineError, match=r"is not signed by the owner of ours\.pub"):
            pull_signed()
    assert not Path("model").exists()


@pytest.mark.usefixtures("keys")
def test_a_signed_older_version_under_a_newer_name():
    """The signature binds model, variant and version: an old release cannot be passed off as a new one."""
    signed("1.0.0")
    build(b"newer")
    signed("2.0.0")
    releases = Path("registry/releases", NAME)
    for name in ("release.json", "release.sig"):
        shutil.copy(releases / "1.0.0" / name, releases / "2.0.0" / name)
    with pytest.raises(PipelineError, match=r"has tiny/openvino-int4 1\.0\.0, not tiny/openvino-int4 2\.0\.0"):
        pull_signed()
    content = json.loads((releases / "2.0.0/release.json").read_text()) | {"version": "2.0.0"}
    (releases / "2.0.0/release.json").write_text(json.dumps(content))
    with pytest.raises(PipelineError, match=r"is not signed by the owner of ours\.pub"):
        pull_signed()


@pytest.mark.usefixtures("keys")
def test_files_that_are_no_keys():
    """A wrong file as key is one sentence, in both directions."""
    Path("rubbish.pem").write_text("rubbish")
    with pytest.raises(PipelineError, match=r"dvc\.lock holds no public EC key"):
        signed() and pull_signed("dvc.lock")
    for key in ("rubbish.pem", "ours.pub"):
        with pytest.raises(PipelineError, match=f"{key} holds no private EC key"):
            publish.publish(
                MODEL,
                VARIANT,
                registry=open_registry("dir:registry"),
                version="3.0.0",
                aliases=(),
                key=Path(key),
                progress=quiet,
            )


def test_a_target_that_is_taken(project):
    """A directory with other files in it is left as it is."""
    publish_version()
    (project / "mine").mkdir()
    (project / "mine/file").write_text("x")
    with pytest.raises(PipelineError, match="mine is not empty: give another directory"):
        pull_latest(to=project / "mine")
    assert [path.name for path in (project / "mine").iterdir()] == ["file"]


def test_a_full_disk(monkeypatch):
    """Too little space is told with figures, and nothing is installed."""
    publish_version()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=1))
    with pytest.raises(
        PipelineError, match=r"has 0\.0 GB free, 0\.0 GB are needed: free some space, or set PHI3_CACHE"
    ):
        pull_latest(to=Path("model"))
    assert not Path("model").exists()


def test_the_commands(project):
    """publish, list, pull and verify work from the command line; a wrong registry is one sentence."""
    output = run("phi3", "publish", NAME, "--to", "dir:registry", "--version", "1.0.0", cwd=project).stdout
    assert output.endswith("MB, as latest\n")
    assert run("phi3", "list", "dir:registry", cwd=project).stdout == f"{NAME} 1.0.0 latest\n"
    directory = run("phi3", "pull", "dir:registry", NAME, "--to", "model", cwd=project).stdout.strip()
    assert directory == "model"
    verify(paths.variant(MODEL, VARIANT))
    assert run("phi3", "verify", "model", cwd=project).stdout.startswith(f"{NAME}: 8 files, 0.0 MB, all as in")
    chosen = run("phi3", "pull", "dir:registry", "--for", "gpu", "--to", "chosen", cwd=project)
    assert (chosen.stdout, chosen.stderr.splitlines()[0]) == ("chosen\n", f"{NAME}: asked for")
    refused = run("phi3", "pull", "dir:registry", "--for", "npu", cwd=project, check=False)
    sentence = f"Error: nothing for npu is published there, only {NAME}: name one of them.\n"
    assert (refused.returncode, refused.stderr) == (1, sentence)
    refused = run("phi3", "list", "ftp://x", cwd=project, check=False)
    assert (refused.returncode, refused.stderr) == (
        1,
        "Error: 'ftp://x' is no registry: give dir:PATH, hf:OWNER/REPOSITORY or oci:HOST/NAME.\n",
    )
