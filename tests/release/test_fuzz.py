"""Any input from outside is read or refused with a sentence: no traceback, no hang, no file outside the folder."""

import json
import tempfile
import warnings
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.chat import load_chat
from pipeline.common.checkpoint import check
from pipeline.common.errors import PipelineError
from pipeline.common.files import building
from pipeline.common.manifest import Manifest, Runtime, read_manifest, seal, verify
from pipeline.common.params import load_params
from pipeline.convert.npu.blob import ELF, MAGIC, read_blob
from pipeline.release.release import read_release, unsafe
from pipeline.source.gguf import convert_gguf
from tests.helpers import ROOT
from tests.manifests import variant_manifest
from tests.release_project import publish_version
from tests.source.test_gguf import llama as llama

pytestmark = pytest.mark.usefixtures("release_folder")

bounded = settings(
    max_examples=150,
    deadline=5000,  # milliseconds per example
    derandomize=True,  # the same examples run on CI and on a developer's machine
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
# Parts of paths, many of which some system treats specially.
PARTS = (
    "a",
    "b.bin",
    "",
    ".",
    "..",
    "c:",
    "nul",
    "Con.txt",
    "LPT¹",
    "aux ",
    "a.",
    " a",
    "a\\b",
    "~",
    "$x",
    "é" * 99,
    "😀" * 99,
)
# Damage to a file: positions (as shares of its length) with the bytes written there, and where the file is cut.
DAMAGE = st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8), st.floats(0.5, 1) | st.just(1.0))


def damaged(content: bytes, damage: tuple[float, bytes, float]) -> bytes:
    """Return `content` with some bytes overwritten and its end cut off."""
    where, written, end = damage
    position = int(where * (len(content) - 1))
    return (content[:position] + written + content[position + len(written) :])[: int(end * len(content))]


def refusal(read, *arguments, **options) -> str | None:
    """Return the sentence with which `read` refuses its arguments, or None when it takes them."""
    try:
        read(*arguments, **options)
    except PipelineError as error:
        return str(error)
    return None


def listing(folder: Path) -> list[str]:
    """Return all files below `folder`."""
    return sorted(str(path) for path in folder.rglob("*"))


def mutated(document: dict, path: float, value: object) -> dict:
    """Return a copy of a JSON object with one of its values, at any depth, replaced."""
    copy = json.loads(json.dumps(document))
    places = []

    def collect(block: object) -> None:
        if isinstance(block, dict | list):
            for key in block if isinstance(block, dict) else range(len(block)):
                places.append((block, key))
                collect(block[key])

    collect(copy)
    block, key = places[int(path * (len(places) - 1))]
    block[key] = value
    return copy


@pytest.fixture
def sealed(release_folder) -> tuple[Path, dict]:
    """The directory of an artifact, and the content of its manifest."""
    directory = Path("artifacts/tiny/openvino-int4")
    return directory, json.loads((directory / "manifest.json").read_bytes())


@bounded
@given(place=st.floats(0, 1), value=JSON)
def test_manifest(sealed, place, value):
    """A manifest.json with an arbitrary value at any place is read or refused with a sentence."""
    directory, manifest = sealed
    (directory / "manifest.json").write_text(json.dumps(mutated(manifest, place, value)))
    for read in (read_manifest, verify):
        assert (refusal(read, directory) or str(directory)).startswith(str(directory))


@pytest.fixture
def published(release_folder) -> dict:
    """The content of a release.json."""
    return json.loads(publish_version().content())


@bounded
@given(place=st.floats(0, 1), value=JSON)
def test_release(published, place, value):
    """A release.json with an arbitrary value at any place is refused, or has safe paths only."""
    content = json.dumps(mutated(published, place, value)).encode()
    if said := refusal(read_release, content, origin="here"):
        assert said.startswith("here: release.json is")
    else:
        assert {unsafe(path) for path in read_release(content, origin="here").files} == {None}


@bounded
@given(path=st.lists(st.sampled_from(PARTS) | st.text(max_size=4), min_size=1, max_size=4).map("/".join))
def test_paths(path):
    """A path that is not refused can be written here, names a file below the folder on Windows, too, and no device."""
    if unsafe(path) is None:
        on_windows = PureWindowsPath(path)
        assert (on_windows.anchor, on_windows.parts) == ("", tuple(path.split("/")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the method below, from Python 3.13 on
            assert not any(PureWindowsPath(part).is_reserved() for part in on_windows.parts)
        folder = Path(tempfile.mkdtemp(dir=".")).resolve()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
        assert (folder / path).resolve().is_relative_to(folder)


@bounded
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_release_of_any_bytes(content):
    """Arbitrary bytes in place of release.json are refused with a sentence."""
    with pytest.raises(PipelineError, match=r"^here: release\.json is"):
        read_release(content, origin="here")


@bounded
@given(damage=DAMAGE)
def test_params(tmp_path, damage):
    """A params.yaml with damaged bytes is read, or refused with a sentence that names the file."""
    file = tmp_path / "params.yaml"
    file.write_bytes(damaged((ROOT / "params.yaml").read_bytes(), damage))
    assert (refusal(load_params, file) or str(file)).startswith(str(file))


@pytest.mark.slow
@bounded
@given(damage=DAMAGE)
def test_gguf(llama, tmp_path, damage):
    """A GGUF file with damaged bytes, mostly in its header, is read or refused with a sentence."""
    file, target = tmp_path / "x.gguf", tmp_path / "target"
    target.mkdir(exist_ok=True)
    where, written, end = damage
    file.write_bytes(damaged(llama[1].read_bytes(), (where**3, written, end)))
    before = listing(tmp_path)
    assert "x.gguf" in (refusal(convert_gguf, file, target) or "x.gguf")
    assert [path for path in listing(tmp_path) if not path.startswith(str(target)) and path not in before] == []


@bounded
@given(damage=DAMAGE)
def test_checkpoint(tiny_checkpoint, tmp_path, damage):
    """A damaged config, index or shard, of which only the header is read, is read or refused with a sentence."""
    for name in ("model.safetensors", "config.json"):
        for path in tiny_checkpoint.iterdir():
            if not (tmp_path / path.name).exists():
                (tmp_path / path.name).symlink_to(path)
        (tmp_path / name).unlink()
        where, written, end = damage
        content = (tiny_checkpoint / name).read_bytes()
        where = where * 4000 / len(content) if name.endswith(".safetensors") else where
        (tmp_path / name).write_bytes(damaged(content, (where, written, end)))
        assert name in (refusal(check, tmp_path) or name)
        (tmp_path / name).unlink()


@bounded
@given(content=st.binary(max_size=300), inside=st.sampled_from([b"", MAGIC, MAGIC + bytes(12) + ELF]))
def test_blob(tmp_path, inside, content):
    """Arbitrary bytes in place of an NPU blob, of its header or of its binaries are refused with a sentence."""
    file = tmp_path / "x.blob"
    file.write_bytes(inside + content)
    with pytest.raises(PipelineError, match=r"x\.blob"):
        read_blob(file)


MODELS = {
    "openvino-genai": ("openvino_model.xml", [b"", b"<net", b"<net>" * 20_000, b"\0" * 100]),
    "onnxruntime-genai": ("model.onnx", [b"", b"\x08\x07\x12", b"\xff" * 100, b"\n" * 10_000]),
}


@pytest.mark.parametrize("runtime", MODELS)
def test_a_model_that_no_runtime_takes(tmp_path, runtime):
    """A file that is not an IR or ONNX model, though its manifest fits, is refused with a sentence."""
    name, contents = MODELS[runtime]
    for number, content in enumerate(contents):
        target = tmp_path / str(number)
        with building(target) as folder:
            (folder / name).write_bytes(content)
            (folder / "openvino_model.bin").write_bytes(b"weights")
            (folder / "config.json").write_text("{}")
            (folder / "genai_config.json").write_text(
                '{"model": {"type": "phi3", "decoder": {"filename": "model.onnx"}}}'
            )
            seal(folder, manifest(runtime))
        assert refusal(load_chat, target).startswith(f"{target} cannot be loaded (")


def manifest(runtime: str) -> Manifest:
    """Return a manifest of an artifact for `runtime`."""
    return variant_manifest("tiny/any", runtime=Runtime(requires={runtime: "1"}, devices=["CPU"]))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deeply_nested(opening):
    """Documents nested twenty thousand levels deep are refused with a sentence."""
    nested = opening * 20_000
    directory = Path("artifacts/tiny/openvino-int4")
    for name, read in (("manifest.json", lambda: read_manifest(directory)), ("config.json", lambda: check(directory))):
        (directory / name).write_text(nested)
        assert name in refusal(read)
    assert refusal(read_release, nested.encode(), origin="here").startswith("here: release.json is refused")
    Path("params.yaml").write_text(nested)
    assert refusal(load_params).startswith("params.yaml is not valid YAML")
