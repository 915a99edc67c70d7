"""One thread: on shared cores the many small operations of these tests lose more to waiting than they gain from a second."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What torch compiled for one test is not there in the next."""
    yield
    torch.compiler.reset()
