"""Several processes that do one run, as `accelerate launch` starts them: which one writes, and where they
wait for each other.

Only training is divided among them. All other work is done by the first, while the others wait: what it
leaves on the disk, which all of them must see, is where they go on from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState

PATIENCE = timedelta(days=7)  # that the others wait for what only the first does


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str | None) -> None:
    """Meet the others, once, before anything else of the kind is set up; over gloo where there is no GPU or
    none is wanted."""
    if count() > 1:
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)


def first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Go on when all are here."""
    if count() > 1:
        PartialState().wait_for_everyone()


@contextmanager
def first_alone() -> Iterator[bool]:
    """True for the first, which does the work of the context; the others go past it when it is done."""
    yield first()
    wait()
