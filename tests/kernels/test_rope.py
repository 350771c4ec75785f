"""Rotary positions: a rotation, whose products depend on the difference of positions alone."""

import math

import pytest
import torch

from phoenix.kernels.rope import rope

HEAD = 8


def table(positions, dtype=torch.float64):
    """cos and sin of position * 10000^(-2i / e), [t, 1, e / 2]."""
    angles = [[p * 10000 ** (-2 * i / HEAD) for i in range(HEAD // 2)] for p in positions]
    angles = torch.tensor(angles, dtype=torch.float64)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_pairs_of_the_two_halves_turn_by_their_angle():
    x, (cos, sin) = torch.randn(3, 2, HEAD, dtype=torch.float64), table([0, 1, 7])
    found = rope(x, cos, sin)
    for row, position in enumerate([0, 1, 7]):
        for head in range(2):
            for i in range(HEAD // 2):
                angle = position * 10000 ** (-2 * i / HEAD)
                pair = complex(x[row, head, i], x[row, head, i + HEAD // 2])
                turned = pair * complex(math.cos(angle), math.sin(angle))
                assert found[row, head, i].item() == pytest.approx(turned.real, abs=1e-12)
                assert found[row, head, i + HEAD // 2].item() == pytest.approx(turned.imag, abs=1e-12)


@pytest.mark.parametrize("shift", [1, 100, 30000])
def test_products_depend_on_the_difference_of_positions_alone(shift):
    q, k = torch.randn(2, 6, 1, HEAD, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 5, 11, 12])

    def scores(positions):
        q_turned, k_turned = (rope(x, *table(positions.tolist()))[:, 0] for x in (q, k))
        return q_turned @ k_turned.T

    torch.testing.assert_close(scores(positions + shift), scores(positions), rtol=1e-9, atol=1e-9)
    assert (scores(2 * positions) - scores(positions)).abs().max() > 0.1


def test_lengths_stay_and_position_0_changes_nothing():
    x = torch.randn(4, 3, HEAD, dtype=torch.float64)
    assert torch.equal(rope(x, *table([0, 0, 0, 0])), x)
    torch.testing.assert_close(rope(x, *table([1, 5, 9, 4096])).norm(dim=-1), x.norm(dim=-1))


def test_gradcheck():
    x = torch.randn(2, 1, HEAD, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, *table([1, 3])), x)


def test_the_dtype_stays():
    x = torch.randn(2, 1, HEAD).bfloat16()
    assert rope(x, *table([1, 3], torch.bfloat16)).dtype == torch.bfloat16
