"""How many positions have their logits in memory at once, so that memory does not grow with the vocabulary.

A vocabulary of 262 thousand tokens makes 1 MB of float32 logits of one position, and 2 GB of the 2048 that go
through a layer together. Whatever reads logits reads them in pieces of so many positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# bytes of the float32 logits of a piece; whoever compares or differentiates them holds several such tensors
CPU_BYTES = 1 << 26
GPU_BYTES = 1 << 29  # so that the head's products are large enough for a GPU


def positions_at_once(vocabulary: int, device: torch.device) -> int:
    """Return how many positions make a piece, at least 1."""
    budget = CPU_BYTES if device.type == "cpu" else GPU_BYTES
    return max(1, budget // (4 * vocabulary))


def pieces(sequences: int, length: int, positions: int) -> Iterator[tuple[slice, slice]]:
    """Yield the pieces of a batch [sequences, length], in the order of its positions: several sequences, or a
    part of one, of at most `positions` positions."""
    whole = positions // length
    for start in range(0, sequences, max(1, whole)):
        if whole:
            yield slice(start, start + whole), slice(0, length)
        else:
            for begin in range(0, length, positions):
                yield slice(start, start + 1), slice(begin, begin + positions)
