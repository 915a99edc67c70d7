"""Masks against sorting by hand, SparseGPT against its plain form and the scores it should beat, bits against
numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.hessian import damped
from llmcompress.algorithms.saliency import wanda_weights
from llmcompress.algorithms.sparsegpt import Keep, fill, keep_mask, pack_mask, sparsegpt, unpack_mask
from tests.algorithms.test_gptq import problem
from tests.algorithms.test_hessian import HARD, inputs

DAMP = 0.01
KEEPS: tuple[Keep, ...] = (0.5, 0.3, (2, 4), (4, 8), (1, 3))


def plain_sparsegpt(W_RC: Tensor, H_CC: Tensor, keep: Keep, block: int) -> Tensor:
    """Algorithm 1 of arXiv:2301.00774 as it reads: a column at a time, every later column updated at once."""
    W, (R, C) = W_RC.clone(), W_RC.shape
    U = torch.linalg.cholesky(torch.linalg.inv(damped(H_CC, DAMP)), upper=True)
    group = keep[1] if isinstance(keep, tuple) else block
    mask = torch.zeros(R, C, dtype=torch.bool)
    for c in range(C):
        if c % group == 0:
            end = min(c + group, C)
            score = W[:, c:end].square() / U.diagonal()[c:end].square()
            if isinstance(keep, tuple):
                for r in range(R):
                    mask[r, c + score[r].topk(min(keep[0], end - c)).indices] = True
            else:
                count = round(keep * R * end) - round(keep * R * c)
                place = score.flatten().topk(count).indices
                mask[place // (end - c), c + place % (end - c)] = True
        error = W[:, c].masked_fill(mask[:, c], 0) / U[c, c]
        W[:, c:] -= torch.outer(error, U[c, c:])
        W[:, c] = W[:, c].masked_fill(~mask[:, c], 0)
    return W


def lost(W_RC: Tensor, Q_RC: Tensor, H_CC: Tensor) -> float:
    E_RC = W_RC - Q_RC
    return float(((E_RC @ H_CC) * E_RC).sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), columns=st.integers(1, 19), keep=st.floats(0, 1))
def test_a_share_keeps_the_highest_of_each_row(seed: int, columns: int, keep: float) -> None:
    score_RC = inputs(5, columns, seed)
    count = round(keep * columns)
    expected = [[value in sorted(row)[columns - count :] for value in row] for row in score_RC.tolist()]
    assert keep_mask(score_RC, keep).tolist() == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), columns=st.integers(1, 19), n=st.integers(0, 8), m=st.integers(1, 8))
def test_n_of_m_keeps_the_highest_of_each_m_neighbours(seed: int, columns: int, n: int, m: int) -> None:
    score_RC = inputs(5, columns, seed)
    mask = keep_mask(score_RC, (n, m))
    for start in range(0, columns, m):
        group = score_RC[:, start : start + m]
        count = min(n, group.shape[1])
        expected = [
            [value in sorted(row)[group.shape[1] - count :] for value in row] for row in group.tolist()
        ]
        assert mask[:, start : start + m].tolist() == expected


def test_of_equal_scores_the_first_stays() -> None:
    assert keep_mask(torch.ones(2, 600), 0.5).tolist() == [[True] * 300 + [False] * 300] * 2
    assert keep_mask(torch.zeros(2, 6), (1, 3)).tolist() == [[True, False, False] * 2] * 2


def test_rows_compete_when_they_are_passed_as_one() -> None:
    score_RC = torch.tensor([[9.0, 8, 7, 1], [2, 3, 4, 5]])
    assert keep_mask(score_RC, 0.5).sum(1).tolist() == [2, 2]
    assert keep_mask(score_RC.reshape(1, -1), 0.5).view(2, 4).sum(1).tolist() == [3, 1]


@pytest.mark.parametrize("shape", [(32, 64), (7, 37), (1, 5), (5, 1)])
@pytest.mark.parametrize("block", [8, 12, 128])
@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_sparsegpt_gives_the_weights_of_the_plain_form(
    keep: Keep, block: int, shape: tuple[int, int]
) -> None:
    W_RC, H_CC = problem(block, *shape)
    found, expected = (
        sparsegpt(W_RC, H_CC, keep, block=block, damp=DAMP),
        plain_sparsegpt(W_RC, H_CC, keep, block),
    )
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(keep: Keep, seed: int) -> None:
    W_RC, H_CC = problem(seed)
    by_size = lost(W_RC, W_RC * keep_mask(W_RC.abs(), keep), H_CC)
    by_wanda = lost(W_RC, W_RC * keep_mask(wanda_weights(W_RC, H_CC.diagonal().sqrt()), keep), H_CC)
    assert lost(W_RC, sparsegpt(W_RC, H_CC, keep), H_CC) < 0.9 * by_wanda < 0.5 * by_size


@settings(max_examples=40, deadline=None, derandomize=True)
@given(keep=st.floats(0, 1), rows=st.integers(1, 9), columns=st.integers(1, 40), block=st.integers(1, 16))
def test_a_share_of_the_whole_is_met_to_the_weight(keep: float, rows: int, columns: int, block: int) -> None:
    W_RC, H_CC = problem(0, rows, columns)
    assert int((sparsegpt(W_RC, H_CC, keep, block=block) != 0).sum()) == round(keep * rows * columns)


@pytest.mark.parametrize("columns", [64, 37])
def test_no_m_neighbours_keep_more_than_n(columns: int) -> None:
    W_RC, H_CC = problem(0, C=columns)
    stays = sparsegpt(W_RC, H_CC, (2, 4), block=10) != 0
    assert all(bool((group.sum(1) == min(2, group.shape[1])).all()) for group in stays.split(4, dim=1))


@pytest.mark.parametrize("keep", [1.0, 1, (4, 4)])
def test_keeping_all_changes_nothing(keep: Keep) -> None:
    W_RC, H_CC = problem(0)
    assert torch.equal(sparsegpt(W_RC, H_CC, keep), W_RC)


def test_weights_in_columns_without_input_go_first_and_stay_as_they_are_where_they_stay() -> None:
    W_RC = inputs(6, 24, 3)
    few, most = (sparsegpt(W_RC, HARD["dead channels"], keep) for keep in (0.9, 0.95))
    assert few[:, [3, 20]].count_nonzero() == 0
    left = most[:, [3, 20]]
    assert 0 < int(left.count_nonzero()) < left.numel()
    assert torch.equal(left[left != 0], W_RC[:, [3, 20]][left != 0])


def test_without_any_input_size_decides_and_what_stays_is_as_it_was() -> None:
    W_RC = inputs(6, 8, 3)
    found = sparsegpt(W_RC, torch.zeros(8, 8), (2, 4))
    torch.testing.assert_close(found, W_RC * keep_mask(W_RC.abs(), (2, 4)))


@pytest.mark.parametrize("keep", [0.5, (2, 4)], ids=str)
@pytest.mark.parametrize("case", HARD)
def test_hard_moments_give_finite_weights(case: str, keep: Keep) -> None:
    assert bool(torch.isfinite(sparsegpt(inputs(6, len(HARD[case]), 3), HARD[case], keep)).all())


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_that_is_given_is_left_as_it_is(transposed: bool) -> None:
    W_RC, H_CC = problem(0, 64, 64)
    W_RC = W_RC.T if transposed else W_RC
    before = W_RC.clone()
    sparsegpt(W_RC, H_CC, 0.5)
    assert torch.equal(W_RC, before)


SHAPES = {"rows": st.integers(0, 9), "columns": st.integers(1, 40), "seed": st.integers(0, 99)}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(**SHAPES)
def test_a_mask_of_any_shape_comes_back_from_its_bits(rows: int, columns: int, seed: int) -> None:
    mask_RC = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_mask(mask_RC)
    assert bits.dtype == torch.uint8 and bits.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_mask(bits, columns), mask_RC)
    assert np.array_equal(bits.numpy(), np.packbits(mask_RC.numpy(), axis=1, bitorder="little"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**SHAPES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_weight_of_any_shape_comes_back_from_its_mask_and_values(
    rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    W_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    W_RC = (W_RC * (W_RC > 0.3)).to(dtype)
    mask_RC = W_RC != 0
    again = fill(unpack_mask(pack_mask(mask_RC), columns), W_RC[mask_RC])
    assert again.dtype == dtype and torch.equal(again, W_RC)


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_values_that_do_not_fill_the_mask_are_refused(count: int) -> None:
    mask_RC = torch.tensor([[True, True, False], [False, True, True], [True, True, False]])
    with pytest.raises(ValueError, match=f"{count} values do not fill a mask of 6"):
        fill(mask_RC, torch.zeros(count))
