"""The tests that the documents name exist."""

import re

import pytest

from tests.conftest import ROOT

NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/promises.md").read_text("utf-8"))


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_promises_name_tests(file, test):
    """Each test that docs/promises.md names exists."""
    assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8")
