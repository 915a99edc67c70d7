"""How long this machine takes: what is timed, and what follows from it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

import pytest
import torch

from llmcompress.algorithms.hessian import Moments
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.stages.machine import NARROW, ROWS, WIDE, WIDEST, Machine, machine_of
from llmcompress.stages.quantize.stage import Quantize

CPU = torch.device("cpu")
NF4 = FourBitScheme("nf4", 64, False, torch.float32)
W8A8 = Quantize(format="w8a8").coding(torch.float32)
BOOKS = CodebookScheme(CodebookLayout(8, 1, "float16"))


def machine(known: Mapping[Hashable, float] | None = None) -> Machine:
    return Machine(CPU, dict(known or {}))


def test_an_operation_is_timed_once_and_remembered() -> None:
    here = machine()
    first = here.product(64, (32, 32))
    assert first > 0 and len(here.known) == 1
    assert here.product(64, (32, 32)) == first and len(here.known) == 1
    assert machine_of(CPU) is machine_of(CPU)


def test_every_operation_takes_time() -> None:
    here = machine()
    seconds = [
        here.product(64, (64, 64), half=True),
        here.attention(64, 32, 2, 16),
        here.elementwise(64, 64),
        here.moments(64, 64, 1),
        here.moments(64, 64, 2),
        here.factor(64),
        here.solver((64, 64), NF4),
        here.solver((64, 64), W8A8),
        here.solver((64, 64), BOOKS),
        here.nearest((64, 64), NF4),
        here.nearest((64, 64), BOOKS),
        here.rounding(64, 64, W8A8),
        here.smoothing(64, 32, 64),
        here.learning((64, 64), NF4),
        here.removal(64, 64, 16),
        here.reading(Path(__file__), 1e6),
    ]
    assert all(value > 0 for value in seconds), seconds
    assert here.rounding(64, 64, NF4) == 0, "nf4 rounds no inputs"


def test_more_tokens_rows_and_columns_are_scaled_by_their_operations() -> None:
    here = machine({("moments", 2048, WIDEST, 2, Moments): 3.0, ("factor", WIDEST): 5.0})
    assert here.moments(4 * 2048, 2 * WIDEST, 2) == pytest.approx(4 * 4 * 3.0)
    assert here.factor(2 * WIDEST) == pytest.approx(8 * 5.0)


def test_what_grows_with_the_width_and_with_its_square_are_told_apart() -> None:
    def taken(width: int) -> float:
        return 2e-3 * width + 1e-5 * width**2

    here = machine({("solver", ROWS, width, NF4): taken(width) for width in (NARROW, WIDE)})
    assert here.solver((4 * ROWS, 4096), NF4) == pytest.approx(4 * taken(4096))
