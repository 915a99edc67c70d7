"""One thread: on shared cores the many small operations of these tests lose more to waiting than they gain
from a second."""

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from llmcompress.report import metrics, plots
from llmcompress.report.schema import Report

torch.set_num_threads(1)
EVALUATE = importlib.import_module(
    "llmcompress.pipeline.evaluate"
)  # under whose name the package has the function
WHOLE = ("test_run", "test_cli", "test_evaluate")  # what these test is whole runs


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What torch compiled for one test is not there in the next."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module", autouse=True)
def short_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of a tiny run is drawing its pictures and timing its tokens: here the one is left out, the other
    cut short."""
    if request.module.__name__.rpartition(".")[2] in WHOLE:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("before_after", "error_per_layer"):
            patch.setattr(plots, draw, _no_picture)
        patch.setattr(EVALUATE, "speed", partial(metrics.speed, decode_tokens=2, repeats=1))
        yield


def _no_picture(report: Report, file: Path) -> None:
    file.write_bytes(b"\x89PNG")
