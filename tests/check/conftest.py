"""Fixtures of the tests of long texts."""

import pytest

from tests.check.long_models import MODELS, Tiny, load


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Each of MODELS with all its variants; INT4 stores its weights without loss."""
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The model with a window of 31 tokens."""
    return load("window-31", tmp_path_factory)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The model with LongRoPE."""
    return load("longrope", tmp_path_factory)
