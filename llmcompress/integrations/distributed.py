"""Several processes in one run, as `accelerate launch` starts them: which one writes, where they wait for
each other, and how they divide the work of a stage.

Every process walks the whole model, each with its share of the calibration text (`Shard`). Sums over tokens
are added up over all processes, so all of them go on from the same numbers, and differ from one process by
the order of these sums alone. Linears that read one input are divided too; who solved one sends it to the
others. Rank 0 alone writes, and the others read what it leaves on the disk, which all of them must see.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed import ReduceOp

from llmcompress.algorithms.hessian import Moments
from llmcompress.errors import ProcessError

PATIENCE = timedelta(days=7)  # how long other ranks wait for work that only rank 0 does
Value = TypeVar("Value")
By = Literal["batch", "sequence"]  # what is divided: the batches of a text, or the sequences of each batch
# what gloo and NCCL say of a connection whose other end is gone
GONE = re.compile("connect|peer|pair closure|timed out|broken pipe", re.IGNORECASE)


def count() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str | None) -> None:
    """Join the process group once, before any other one is set up; uses gloo if there is no GPU or none is
    wanted."""
    if count() > 1:
        with _others_there():
            PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)


def first() -> bool:
    """Whether this process is rank 0, which writes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Wait until all ranks are here. Errors: ProcessError if one has ended."""
    if count() > 1:
        with _others_there():
            PartialState().wait_for_everyone()


@contextmanager
def first_alone() -> Iterator[bool]:
    """Yields True on rank 0; other ranks wait until it exits."""
    yield first()
    wait()


@contextmanager
def _others_there() -> Iterator[None]:
    """Turn the error of a connection whose other end is gone into one line. Errors: ProcessError."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        if not GONE.search(str(error)):
            raise
        raise ProcessError(
            "another process of this run has ended; see what it said, and give the same command again: it "
            "goes on where it was"
        ) from error


@dataclass(frozen=True)
class Processes:
    """The processes that run a stage together. One alone has everything, and sends nothing."""

    rank: int = 0
    count: int = 1
    by: By = "batch"

    @classmethod
    def all(cls, by: By) -> Processes:
        """All processes of this run."""
        return cls(int(os.environ.get("RANK", "0")), count(), by)

    def shard(self, batches: Sequence[Tensor]) -> Shard:
        """Return this process's share of the batches [B, L] of a text.

        By sequence, a batch is cut into as many pieces as there are processes, as far as it has sequences.
        The process with the first piece is another one for each batch.
        """
        own: dict[int, Tensor] = {}
        for number, batch in enumerate(batches):
            pieces = batch.tensor_split(self.count) if self.by == "sequence" else [batch]
            place = (self.rank - number) % self.count
            if place < len(pieces) and len(pieces[place]):
                own[number] = pieces[place]
        return Shard(self, tuple(own), list(own.values()), tuple(map(len, batches)))

    def owners(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Return the rank that does each piece of work: the costliest first, each to whoever has least."""
        load, found = [0] * self.count, dict[str, int]()
        for name in sorted(costs, key=lambda name: -costs[name]):
            found[name] = load.index(min(load))
            load[found[name]] += costs[name]
        return found

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, which is the same in all of them."""
        self._reduce(tensors, ReduceOp.SUM)

    def max_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its elementwise maximum over all processes."""
        self._reduce(tensors, ReduceOp.MAX)

    def _reduce(self, tensors: Iterable[Tensor], operation: ReduceOp.RedOpType) -> None:
        if self.count == 1:
            return
        with _others_there():
            for tensor in tensors:
                sent = tensor.to(_wire()).contiguous()
                torch.distributed.all_reduce(sent, operation)
                if sent is not tensor:
                    tensor.copy_(sent)

    def mean(self, value: float, weight: float) -> float:
        """Return the mean of the processes' values by their weights; 0 if no process has any weight."""
        if self.count == 1:
            return value
        sums = torch.tensor([value * weight, weight], dtype=torch.float64)
        self.sum_(sums)
        return float(sums[0] / sums[1]) if sums[1] else 0.0

    def pool(self, moments: Iterable[Moments]) -> None:
        """Make moments those of the tokens of all processes."""
        if self.count > 1:
            for each in moments:
                each.pool(self.sum_, self.max_)

    def agreed(self, value: Value) -> Value:
        """Return the value that rank 0 has; it is pickled."""
        return self._objects(value, 0)

    def gathered(self, values: Mapping[int, Value]) -> dict[int, Value]:
        """Return the values of all processes by their numbers, in order; they are pickled."""
        every = [dict(values)] * self.count
        if self.count > 1:
            with _others_there():
                torch.distributed.all_gather_object(every, dict(values))
        return dict(sorted(item for each in every for item in each.items()))

    def sent(self, tensors: Mapping[str, Tensor], owner: int) -> dict[str, Tensor]:
        """Return the tensors that rank `owner` has, by name, whatever the others give."""
        if self.count == 1:
            return dict(tensors)
        shapes = self._objects(
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, owner
        )
        found = dict[str, Tensor]()
        with _others_there():
            for name, (shape, dtype) in shapes.items():
                own = tensors[name] if self.rank == owner else torch.empty(shape, dtype=dtype)
                flat = own.to(_wire()).reshape(-1)
                torch.distributed.broadcast(flat.view(torch.uint8), owner)  # of any dtype
                found[name] = flat.view(shape)
        return found

    def _objects(self, value: Value, owner: int) -> Value:
        if self.count == 1:
            return value
        said = [value]
        with _others_there():
            torch.distributed.broadcast_object_list(said, owner)
        return said[0]


ALONE = Processes()


@dataclass(frozen=True, eq=False)
class Shard:
    """The batches of a text that this process runs: their numbers among all, and the sequences [B, L] of
    each.

    `sizes` are the sequences of every batch of the text. By default there is no text, and no other process.
    """

    processes: Processes = ALONE
    numbers: tuple[int, ...] = ()
    batches: Sequence[Tensor] = ()
    sizes: tuple[int, ...] = ()

    def first(self, batches: int) -> int:
        """Return how many of this process's batches are among the first `batches` of the text."""
        if self.processes.count == 1:
            return batches
        return sum(number < batches for number in self.numbers)

    def place(self, number: int) -> int | None:
        """Return where batch `number` is among those of this process; None if it is another's."""
        return self.numbers.index(number) if number in self.numbers else None


def _wire() -> torch.device:
    """The device of tensors that are sent: NCCL sends from a GPU only."""
    backend = torch.distributed.get_backend()
    return torch.device("cuda" if backend == "nccl" else "cpu")
