from __future__ import annotations

import attention_measures as measures
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.spatial.distance import jensenshannon

RNG = np.random.default_rng(0)


def distributions(*shape: int) -> np.ndarray:
    return measures.normalized(RNG.exponential(size=shape) * (RNG.random(shape) > 0.3))


def test_jensen_shannon_is_scipys_and_bounded() -> None:
    first, second = distributions(5, 9), distributions(5, 9)
    expected = jensenshannon(first, second, base=2, axis=1)
    np.testing.assert_allclose(measures.jensen_shannon(first, second), expected, atol=1e-12)
    assert measures.jensen_shannon(first, first).max() < 1e-7
    assert measures.jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1


@pytest.mark.parametrize("radius", [0.0, 0.4, 5.0])
def test_the_share_that_stays_is_the_optimum_of_the_linear_program(radius: float) -> None:
    first, second = distributions(6), distributions(7)
    one, two = RNG.random((6, 2)), RNG.random((7, 2))
    close = np.linalg.norm(one[:, None] - two[None], axis=2) <= radius
    rows = [np.kron(np.eye(6)[i], np.ones(7)) for i in range(6)] + [np.kron(np.ones(6), np.eye(7)[j]) for j in range(7)]
    bounds = [(0, 1 if allowed else 0) for allowed in close.ravel()]
    best = -linprog(-np.ones(42), A_ub=np.array(rows), b_ub=np.concatenate([first, second]), bounds=bounds).fun
    found = measures.share_that_stays(first, second, one, two, radius)
    assert found == pytest.approx(best, abs=1e-4)
    assert found == pytest.approx({0.0: 0.0, 5.0: 1.0}.get(radius, found), abs=1e-4)


def test_own_structure_leaves_out_the_keypoint_itself_and_the_background() -> None:
    labels = np.array([1, 1, 1, 0, 2])
    attention = np.full((5, 5), 0.2)
    found = measures.share_on_own_structure(attention, labels)
    assert found == pytest.approx((0.5, 0.5))  # two of the four others; label 2 has no other keypoint
    attention = np.eye(5) * 0.5
    attention[0, 1] = attention[1, 0] = attention[2, 3] = 0.5
    assert measures.share_on_own_structure(attention, labels) == pytest.approx((2 / 3, 0.5))
    assert measures.share_on_own_structure(attention, np.array([0, 0, 0, 0, 2])) is None


def test_near_counts_others_within_the_radius() -> None:
    attention = np.full((3, 3), 1 / 3)
    positions = np.array([[0.0], [5.0], [20.0]])
    assert measures.share_near(attention, positions, 10) == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_effective_share_of_equal_and_of_single_attention() -> None:
    assert measures.effective_share(np.full((2, 8), 1 / 8)) == pytest.approx(1)
    assert measures.effective_share(np.eye(8)) == pytest.approx(1 / 8)
