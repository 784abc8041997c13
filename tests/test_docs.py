"""The tests and mutations that the documents name exist."""

import re

import pytest

from tests.helpers import ROOT
from tests.mutants import MUTATIONS

PROMISES = re.findall(r"^\| \d+ .*", (ROOT / "docs/promises.md").read_text("utf-8"), re.MULTILINE)
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/promises.md").read_text("utf-8"))


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_promises_name_tests(file, test):
    """Each test that docs/promises.md names exists."""
    assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_can_be_made(name):
    """The code that a mutation replaces is there once, and so is the test that finds it. `make mutants` runs them."""
    mutation = MUTATIONS[name]
    assert (ROOT / mutation["file"]).read_text("utf-8").count(mutation["old"]) == 1
    file, _, test = mutation["test"].partition("::")
    assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.split("|")[1].strip())
def test_each_promise_has_a_mutation(promise):
    """Each promise names a mutation that its test finds."""
    cells = promise.split("|")
    assert cells[4].strip() in MUTATIONS
