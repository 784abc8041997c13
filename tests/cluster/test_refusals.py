"""What `phi3 build` refuses before any work, each with one sentence."""

import re

import pytest

from tests.cluster.project import build, publish, ran, use_store
from tests.helpers import ROOT, commit, edit, run

pytestmark = pytest.mark.slow
NOBODY = "tcp://127.0.0.1:9"


def nothing(project):
    """Leave the project as it is."""


def relative(project):
    """Give the DVC remote a relative url."""
    use_store(project, "../store")


def none(project):
    """Name no DVC remote."""
    (project / ".dvc/config").write_bytes((ROOT / ".dvc/config").read_bytes())
    commit(project)


def edited(project):
    """Edit a file, and do not commit it."""
    edit(project / "dvc.yaml", "cell.py report ", "cell.py another ")


@pytest.mark.parametrize(
    ("change", "scheduler", "sentence"),
    [
        (nothing, NOBODY, r"commit [0-9a-f]{8} is not on the git remote `origin`, where workers clone: push it\."),
        (publish, NOBODY, rf"no Dask scheduler answers at {NOBODY} \(.+\): start one, or use local:N\."),
        (
            relative,
            "local:1",
            r"the DVC remote's url is relative, and workers' clones are elsewhere: make it absolute\.",
        ),
        (
            none,
            "local:1",
            r"workers share results by a DVC remote, and \.dvc/config names none: `dvc remote add -d store URL`, "
            r"commit\.",
        ),
        (edited, "local:1", r"dvc\.yaml differs from the last commit, which workers build: commit or undo it first\."),
    ],
    ids=["not pushed", "no scheduler", "relative url", "no remote", "not committed"],
)
def test_refused_before_any_work(quick, change, scheduler, sentence):
    """What workers could not clone, read or share is refused with one sentence before a cell runs."""
    change(quick)
    refused = build(quick, scheduler, check=False, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="1s")
    assert refused.returncode == 1
    assert re.fullmatch(f"Error: {sentence}\n", refused.stderr), refused.stderr
    assert ran(quick) == []


def test_a_remote_out_of_reach(again):
    """When the DVC remote that has the earlier results cannot be read, the build is refused before a cell runs."""
    use_store(again, "/dev/null/store")
    refused = build(again, "local:1", check=False)
    assert refused.returncode == 1
    assert re.fullmatch(
        r"Error: the DVC remote cannot be read \(\[Errno 20\] Not a directory: '/dev/null/store/.*'\): "
        r"correct its url, or try later\.\n",
        refused.stderr,
    )
    assert ran(again) == []


def test_a_cell_that_no_local_worker_can_hold(project):
    """Local workers share memory and disk, and a cell that does not fit into a share is refused with figures."""
    use_store(project, project.parent / "store")
    refused = run("phi3", "build", "--scheduler", "local:1000000", "export_openvino", cwd=project, check=False)
    assert refused.returncode == 1
    assert re.search(
        r"Error: export_openvino@tiny-openvino-fp16 needs 0\.4 GB of memory, 0\.\d GB of disk, and each of 1000000 "
        r"workers here would have ",
        refused.stderr,
    )
