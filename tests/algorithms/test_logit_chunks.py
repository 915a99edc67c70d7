"""Pieces of a batch: every position once, in order, and no piece larger than allowed."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.algorithms.logit_chunks import CPU_BYTES, GPU_BYTES, pieces, positions_at_once


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 80))
def test_pieces_hold_every_position_once_and_in_order(sequences: int, length: int, positions: int) -> None:
    batch = torch.arange(sequences * length).view(sequences, length)
    parts = [batch[here] for here in pieces(sequences, length, positions)]
    assert torch.equal(torch.cat([part.flatten() for part in parts]), batch.flatten())
    assert all(0 < part.numel() <= positions for part in parts)
    assert all(part.shape[1] == length or len(part) == 1 for part in parts)


def test_the_logits_of_a_piece_stay_within_the_budget_whatever_the_vocabulary() -> None:
    for device, budget in (("cpu", CPU_BYTES), ("cuda", GPU_BYTES)):
        for vocabulary in (1, 50_257, 262_144):
            positions = positions_at_once(vocabulary, torch.device(device))
            assert 4 * positions * vocabulary <= budget < 4 * (positions + 1) * vocabulary
    assert positions_at_once(1 << 40, torch.device("cpu")) == 1
