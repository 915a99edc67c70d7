"""The random rotations: orthogonal at every width, even, the same for a seed; and the product against one in
float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.algorithms import hadamard as module
from llmcompress.algorithms.hadamard import hadamard, turn


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 15, 64, 96, 128, 576, 896, 1024, 1536])
def test_a_rotation_of_any_width_is_orthogonal_to_a_part_in_1e12(n: int) -> None:
    Q_DD = hadamard(n, seed=3)
    assert Q_DD.dtype == torch.float64 and Q_DD.shape == (n, n)
    eye = torch.eye(n, dtype=torch.float64)
    for product in (Q_DD @ Q_DD.T, Q_DD.T @ Q_DD):
        assert float((product - eye).abs().max()) <= 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 80), seed=st.integers(0, 2**31))
def test_it_is_orthogonal_for_every_seed_too(n: int, seed: int) -> None:
    Q_DD = hadamard(n, seed)
    assert float((Q_DD @ Q_DD.T - torch.eye(n, dtype=torch.float64)).abs().max()) <= 1e-12


@pytest.mark.parametrize("n", [1, 2, 16, 256])
def test_at_a_power_of_two_all_entries_have_one_size_and_the_signs_are_sylvesters_up_to_a_sign_of_each_row(
    n: int,
) -> None:
    Q_DD = hadamard(n, seed=0)
    torch.testing.assert_close(
        Q_DD.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), rtol=1e-14, atol=0
    )
    # Walsh: (-1)^(i . j)
    ones = torch.tensor([[(i & j).bit_count() % 2 for j in range(n)] for i in range(n)])
    assert torch.equal(Q_DD.sign() * Q_DD[:, :1].sign(), (1 - 2 * ones).double())


@pytest.mark.parametrize("n", [64, 256])
def test_about_half_of_the_rows_have_their_sign_turned(n: int) -> None:
    turned = int((hadamard(n, seed=5)[:, 0] < 0).sum())  # Sylvester's first column is positive
    assert 3 / 8 * n <= turned <= 5 / 8 * n


def test_the_same_seed_gives_the_same_rotation_another_seed_another_and_the_global_generator_stays() -> None:
    before = torch.random.get_rng_state()
    for n in (12, 64):
        assert torch.equal(hadamard(n, 7), hadamard(n, 7))
        assert not torch.equal(hadamard(n, 7), hadamard(n, 8))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("n", "bound"), [(64, 1.0), (576, 3.0), (896, 7**0.5)])
def test_what_stands_out_in_one_channel_is_spread_over_all(n: int, bound: float) -> None:
    """One channel alone has a peak of sqrt(n) over its root mean square; afterwards at most sqrt of the odd
    factor."""
    x_D = torch.zeros(n, dtype=torch.float64)
    x_D[n // 3] = 100.0
    y_D = x_D @ hadamard(n, 1)
    assert float(y_D.abs().max() / y_D.square().mean().sqrt()) <= bound + 1e-9


@pytest.mark.parametrize("n", [0, -4])
def test_no_channels_are_an_error(n: int) -> None:
    with pytest.raises(ValueError, match=f"no rotation of {n} channels"):
        hadamard(n, 0)


@pytest.mark.parametrize("at_once", [1, 40, 2**22])
def test_the_product_in_parts_is_the_product_in_float64_rounded_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    X_TD, M_DD = torch.randn(3, 5, 12, generator=generator), torch.randn(12, 12, generator=generator).double()
    kept = X_TD.clone()
    exact = torch.einsum("abi,ij->abj", X_TD.double(), M_DD)
    for X in (X_TD, X_TD.transpose(0, 1).contiguous().transpose(0, 1)):  # stored in another order too
        turned = turn(X, M_DD)
        assert turned.dtype == torch.float32
        torch.testing.assert_close(turned, exact.float(), rtol=2e-7, atol=1e-12)
    torch.testing.assert_close(turn(X_TD.double(), M_DD), exact, rtol=1e-13, atol=1e-13)
    assert torch.equal(X_TD, kept)
