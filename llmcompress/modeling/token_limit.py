"""How many tokens go through a model at once: decided from the memory that is free, and halved when it runs
out.

Batches of a walk hold as many tokens as keep a GPU busy. On a CPU, and wherever a batch is a unit of the
method (a step of training, a sample that a search decides on, logits), a batch has TOKENS_AT_ONCE tokens, so
that every device computes the same. `TokenLimit` is the one place that catches memory running out: the work
on a batch is done again in halves, and all later work with that limit takes no more tokens than that.
"""

from __future__ import annotations

import gc
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from llmcompress.errors import ModelError, argument
from llmcompress.io.units import amount

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 2048  # tokens of a batch on a CPU, and of a unit on every device
MOST_AT_ONCE = 16384  # tokens of a batch on a GPU: more of them keep it no busier
SHARE = 0.25  # share of the free memory that the activations of a batch may take
ENOUGH_BYTES = 1 << 30  # activations of a batch on a GPU: a wide layer is busy with less
# what torch raises, beside its own error, if a library or the CPU has no memory left
SIGNS = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")

Found = TypeVar("Found")


def first_sequences(sequences: Tensor, tokens: int) -> Tensor:
    """The first of sequences [S, L] that hold at least so many tokens, or all if they hold fewer."""
    return sequences[: -(-tokens // sequences.shape[1])]


def batches_of(sequences: Tensor) -> list[Tensor]:
    """Split token sequences [S, L], or their states [S, L, D], into batches of at most TOKENS_AT_ONCE
    tokens."""
    return list(sequences.split(_unit(sequences.shape[1])))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Put the parts of a batch together again."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device has run out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: on a GPU those that torch has reserved and does not use, too."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + idle


def fitting(device: torch.device, token_bytes: int) -> int:
    """The tokens of a batch whose activations take `token_bytes` each: a power of two, so that it does not
    follow every change of the free memory."""
    room = SHARE * free_memory(device)
    most = TOKENS_AT_ONCE
    if device.type == "cuda":
        room, most = min(room, ENOUGH_BYTES), MOST_AT_ONCE
    tokens = max(1, int(room / max(1, token_bytes)))
    return min(most, 1 << (tokens.bit_length() - 1))


class TokenLimit:
    """The most tokens that go through a model at once.

    `tokens` are those of a batch. `most` are those of a part of one: None, for as many as it has, until
    memory runs out, or if it was short from the start.
    """

    def __init__(self, device: torch.device | str = "cpu", tokens: int | None = None) -> None:
        self.device, self.tokens = torch.device(device), tokens or TOKENS_AT_ONCE
        self.most = self.tokens if self.tokens < TOKENS_AT_ONCE else None

    def batches(self, sequences: Tensor) -> list[Tensor]:
        """Split token sequences [S, L] into batches of at most `tokens` tokens: whole units, or a part of
        one."""
        length = sequences.shape[1]
        unit, fit = _unit(length), max(1, self.tokens // length)
        return list(sequences.split(fit // unit * unit if fit >= unit else fit))

    def units(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Divide what `batches` made, or states [B, L, D] of it, as `batches_of` divides the same
        sequences."""
        if self.tokens == TOKENS_AT_ONCE:
            return list(batches)
        found, begun = list[Tensor](), list[Tensor]()
        for batch in batches:
            while len(batch):
                room = _unit(batch.shape[1]) - sum(map(len, begun))
                begun.append(batch[:room])
                batch = batch[room:]
                if len(begun[-1]) == room:
                    found.append(joined(begun))
                    begun = []
        return [*found, joined(begun)] if begun else found

    def slices(self, count: int, length: int) -> Iterator[slice]:
        """Yield the parts of a batch of `count` sequences of `length` tokens, each as `most` is then."""
        start = 0
        while start < count:
            yield (here := slice(start, min(start + self._at_once(count, length), count)))
            start = here.stop

    def parts(self, work: Callable[[slice], Found], count: int, length: int) -> Iterator[Found]:
        """Yield what `work` returns for each part of a batch of `count` sequences of `length` tokens.

        A batch is one part unless memory runs out in `work`. Then that part and what follows are taken in
        halves. So `work` must leave nothing behind if it fails: a sum to which it adds, it adds to in its
        last operation. Raises ModelError if memory runs out with a single sequence.
        """
        start = 0
        while start < count:
            here = slice(start, min(start + self._at_once(count, length), count))
            for found in self._tried(partial(work, here), here.stop - start, length):
                yield found
                start = here.stop

    def each(self, work: Callable[[slice], Found], count: int, length: int) -> list[Found]:
        """Return what `parts` yields."""
        return list(self.parts(work, count, length))

    def restarted(
        self, work: Callable[[], Found], anew: Callable[[], Found], count: int, length: int
    ) -> Found:
        """Return what `work` returns, or, if memory runs out there, what `anew` does, which is called until
        it succeeds.

        Both take a batch of `count` sequences of `length` tokens in `slices`. `anew` also undoes what was
        done. Raises ModelError as `parts` does.
        """
        while True:
            for found in self._tried(work, min(count, self._at_once(count, length)), length):
                return found
            work = anew

    def _at_once(self, count: int, length: int) -> int:
        """Sequences of a part."""
        return count if self.most is None else max(1, self.most // length)

    def _tried(self, work: Callable[[], Found], sequences: int, length: int) -> list[Found]:
        """Return what `work` returns, or nothing if memory runs out; then half as many `sequences` are
        allowed.

        Errors: ModelError if that was a single one.
        """
        try:
            return [work()]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # out here, the error has let go of the tensors of the frames that it passed
        self._halve(sequences, length)
        return []

    def _halve(self, sequences: int, length: int) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if sequences == 1:
            gpu = self.device.type == "cuda"
            free = amount(free_memory(self.device), "B")
            other = f"a GPU with more memory, or {argument('device')} cpu" if gpu else "a larger machine"
            raise ModelError(
                f"the memory of {self.device} is too small for a single sequence of {length} tokens ({free} "
                f"are free); use shorter sequences (length in data), or {other}"
            )
        self.most = sequences // 2 * length
        logger.warning(
            "memory of %s ran out with %d tokens at once; going on with %d",
            self.device,
            sequences * length,
            self.most,
        )


def loss_in_parts(
    loss: Callable[[Mapping[str, Tensor], slice], Tensor],
    weights: Mapping[str, Tensor],
    limit: TokenLimit,
    count: int,
    length: int,
) -> Tensor:
    """Return the mean loss of a batch of `count` sequences of `length` tokens, in as many parts as the memory
    asks for.

    loss: (weights by name, part of the batch) -> the mean over that part, a scalar. The gradient with respect
    to `weights` is computed at once, so that no part's activations are kept for a later backward pass.
    """
    names = list(weights)

    def of(tensors: Sequence[Tensor], here: slice) -> Tensor:
        share = (here.stop - here.start) / count
        mean = loss(dict(zip(names, tensors, strict=True)), here)
        return mean if share == 1 else mean * share

    if torch.is_grad_enabled():
        found: Tensor = _InParts.apply(of, limit, count, length, *weights.values())  # type: ignore[no-untyped-call]
        return found
    total: Tensor = _sum(limit.each(partial(of, list(weights.values())), count, length))
    return total


class _InParts(torch.autograd.Function):
    """A loss whose gradient is computed in the forward pass, part by part."""

    @staticmethod
    def forward(
        ctx: Any,
        of: Callable[[Sequence[Tensor], slice], Tensor],
        limit: TokenLimit,
        count: int,
        length: int,
        *weights: Tensor,
    ) -> Tensor:
        leaves = [weight.detach().requires_grad_() for weight in weights]

        def work(here: slice) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with torch.enable_grad():
                mean = of(leaves, here)
            return mean.detach(), torch.autograd.grad(mean, leaves, allow_unused=True)

        means, grads = zip(*limit.each(work, count, length), strict=True)
        of_each = ([part for part in parts if part is not None] for parts in zip(*grads, strict=True))
        ctx.grads = [_sum(parts) for parts in of_each]
        total: Tensor = _sum(means)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return (None, None, None, None, *(own if own is None else own.mul_(grad) for own in ctx.grads))


def _sum(parts: Sequence[Tensor]) -> Any:
    """The sum of tensors of one shape; None of none."""
    return reduce(operator.add, parts) if parts else None


def _unit(length: int) -> int:
    """Sequences of `length` tokens in a unit."""
    return max(1, TOKENS_AT_ONCE // length)
