"""Several processes in one run, as `accelerate launch` starts them: which one writes, and where they wait for
each other.

Only training is divided among the ranks. Rank 0 does all other work while the other ranks wait, and they
continue from what it leaves on the disk, which all of them must see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState

PATIENCE = timedelta(days=7)  # how long other ranks wait for work that only rank 0 does


def count() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str | None) -> None:
    """Join the process group once, before any other one is set up; uses gloo if there is no GPU or none is
    wanted."""
    if count() > 1:
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)


def first() -> bool:
    """Whether this process is rank 0, which writes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Wait until all ranks are here."""
    if count() > 1:
        PartialState().wait_for_everyone()


@contextmanager
def first_alone() -> Iterator[bool]:
    """Yields True on rank 0; other ranks wait until it exits."""
    yield first()
    wait()
