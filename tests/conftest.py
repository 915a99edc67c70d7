"""What all tests share: one thread, which tests are slow, and runs without what a test does not look at.

One thread: on shared cores the many small operations of these tests lose more to waiting than they gain
from a second.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from llmcompress.pipeline import evaluate
from llmcompress.report import metrics, plots, samples
from llmcompress.report.schema import Report

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first `keep` parameters of a slow test are not slow; files with slow tests come first, so that no
    process is left with them at the end."""
    kept: Counter[str] = Counter()
    for item in items:
        mark, name = item.get_closest_marker("slow"), item.nodeid.partition("[")[0]
        if mark and kept[name] < mark.kwargs.get("keep", 0):
            kept[name] += 1
            item.own_markers = [other for other in item.own_markers if other.name != "slow"]
    slow = Counter(str(item.path) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[str(item.path)])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What torch compiled for one test is not there in the next."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def short_runs() -> Iterator[None]:
    """Runs draw no pictures and time few tokens, which is most of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("before_after", "error_per_layer"):
            patch.setattr(plots, draw, _no_picture)
        patch.setattr(samples, "WRITTEN", 2)
        patch.setattr(evaluate, "speed", partial(metrics.speed, decode_tokens=2, repeats=1))
        yield


def _no_picture(report: Report, file: Path) -> None:
    file.write_bytes(b"\x89PNG")
