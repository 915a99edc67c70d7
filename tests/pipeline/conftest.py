"""What the tests of searches share."""

from pathlib import Path

import pytest

from tests.caches import own_cache


@pytest.fixture(scope="session")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all searches that may find what another one of the same base has measured."""
    return own_cache(tmp_path_factory.mktemp("searches"))
