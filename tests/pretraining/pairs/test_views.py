from __future__ import annotations

import numpy as np

from pretraining.config import PretrainConfig
from pretraining.pairs.views import draw_view


def test_draws_are_in_their_ranges_and_come_from_the_generator() -> None:
    config = PretrainConfig(spatial=1.0, mirror=0.5, scale_min=0.7, scale_max=1.3)
    one, two = (draw_view((9.5, 9.5), (16, 12), (1, 1), 2, config, np.random.default_rng(5)) for _ in range(2))
    assert (one.scale, one.gamma, one.noise_seed) == (two.scale, two.gamma, two.noise_seed)
    many = [draw_view((9.5, 9.5), (16, 12), (1, 1), 2, config, np.random.default_rng(s)) for s in range(200)]
    scales = [view.scale for view in many]
    assert 0.7 <= min(scales) < 0.75
    assert 1.25 < max(scales) <= 1.3
    assert {view.mirror for view in many} == {(a, b) for a in (True, False) for b in (True, False)}
    assert all(len(view.gamma) == 2 and min(view.noise) >= 0 for view in many)


def test_a_plain_crop_has_no_deformation() -> None:
    plain = draw_view((9.5, 9.5), (16, 12), (1, 1), 1, PretrainConfig(spatial=0.0), np.random.default_rng(6))
    assert plain.control is None
    assert plain.scale == 1
    assert np.array_equal(plain.rotation, np.eye(2))


def test_thick_slices_are_not_mixed() -> None:
    drawn = draw_view(
        (5, 30, 30), (6, 32, 32), (10.0, 1.5, 1.5), 1, PretrainConfig(spatial=1.0), np.random.default_rng(1)
    )
    assert drawn.control is not None
    assert not drawn.control[0].any()
    assert np.array_equal(drawn.rotation[0], [1, 0, 0])
    assert not np.allclose(drawn.rotation, np.eye(3))
