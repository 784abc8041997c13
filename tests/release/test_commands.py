"""The commands of `phi3` for registries."""

from pathlib import Path

import pytest

from pipeline.common import paths
from pipeline.release.foundry import registration
from tests.helpers import phi3
from tests.release_project import MODEL, NAME

PUBLISH = ("publish", NAME, "--to", "dir:registry", "--version", "1.0.0")


@pytest.fixture
def registry(release_folder):
    """A registry with one release."""
    return phi3(*PUBLISH)


def test_publish(registry, release_folder):
    """`phi3 publish` says at its end what it published, and where."""
    assert registry.stdout.startswith("hashing artifacts/tiny/openvino-int4\nuploading LICENSE, 0.0 MB\n")
    assert registry.stdout.endswith(f"MB, to dir:{release_folder}/registry as latest\n")


@pytest.mark.usefixtures("registry")
def test_list():
    """`phi3 list` prints name, version and aliases."""
    assert phi3("list", "dir:registry").stdout == f"{NAME} 1.0.0 latest\n"


@pytest.mark.usefixtures("registry")
def test_pull_and_verify():
    """`phi3 pull` prints the directory, which `phi3 verify` finds unchanged."""
    assert phi3("pull", "dir:registry", NAME, "--to", "model").stdout == "model\n"
    assert phi3("verify", "model").stdout.startswith(f"{NAME}: 14 files, 0.0 MB, all as in")


@pytest.mark.usefixtures("registry")
def test_a_cache_that_is_elsewhere(monkeypatch):
    """The directory in the cache is named, also to Foundry Local, by the path that every program sees, as the Python of
    the Microsoft Store sees the user's cache under another."""
    Path("real").mkdir()
    Path("link").symlink_to("real")
    monkeypatch.setattr("pipeline.cli.INFERENCE_MODEL", "README.md")  # this release has none
    result = phi3("pull", "dir:registry", NAME, "--for", "foundry", PHI3_CACHE="link")
    (directory,) = Path("real").resolve().glob(f"releases/*/{NAME}/1.0.0")
    assert (result.stdout, result.stderr) == (f"{directory}\n", f"in Foundry Local: {registration(directory)}\n")


@pytest.mark.usefixtures("registry")
def test_pull_for_a_device():
    """Without a name `phi3 pull` says which artifact it takes, and why."""
    chosen = phi3("pull", "dir:registry", "--for", "gpu", "--to", "chosen")
    assert (chosen.stdout, chosen.stderr.splitlines()[0]) == ("chosen\n", f"{NAME}: asked for")


@pytest.mark.usefixtures("registry")
def test_foundry_registers_onnx_models_only():
    """The registration with Foundry Local is not printed for a model that it cannot run."""
    result = phi3("pull", "dir:registry", NAME, "--for", "foundry", "--to", "model")
    assert (result.stdout, result.stderr) == ("model\n", "")


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            ("pull", "dir:registry", "--for", "npu"),
            f"nothing for npu is published there, only {NAME}: name one of them.",
        ),
        (("list", "ftp://x"), "'ftp://x' is no registry: give dir:PATH, hf:OWNER/REPOSITORY or oci:HOST/NAME."),
        (("publish", MODEL, *PUBLISH[2:]), f"'{MODEL}' is no name: give MODEL/VARIANT."),
        (
            ("pull", "dir:registry", NAME, "--to", "."),
            "'.' cannot be replaced: give the path of a directory to make.",
        ),
    ],
)
def test_refusals(command, sentence):
    """What cannot be done ends with one sentence and status 1."""
    refused = phi3(*command, check=False)
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", f"Error: {sentence}\n")


def test_a_registry_where_nothing_can_be_made(release_folder):
    """A directory that the system refuses is named with the system's reason."""
    (release_folder / "file").touch()
    refused = phi3(*PUBLISH[:3], "dir:file/models", *PUBLISH[4:], check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"Error: {release_folder}/file/models: Not a directory\n"


def test_a_file_of_the_build_that_is_missing(release_folder):
    """A file that the publication needs is named."""
    paths.reference(MODEL).unlink()
    refused = phi3(*PUBLISH, check=False)
    assert (refused.returncode, refused.stderr) == (
        1,
        "Error: artifacts/tiny/reference.json: No such file or directory\n",
    )
