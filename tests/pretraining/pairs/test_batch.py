from __future__ import annotations

import numpy as np
import torch

from nnunetv2_kaf.keypoints import Keypoints
from pretraining.config import PretrainConfig
from pretraining.pairs.batch import PairSample, Places, collate
from pretraining.pairs.render import make_recipe, render
from pretraining.pairs.splines import control_points
from pretraining.pairs.views import draw_view

CPU = torch.device("cpu")


def sample(case: str, value: float) -> PairSample:
    return PairSample(
        cases=(case, case + "'"),
        views=torch.stack([torch.full((1, 4, 5), value), torch.full((1, 4, 5), -value)]),
        keypoints=Keypoints(
            torch.stack([torch.full((3, 2), value), torch.full((3, 2), -value)]),
            torch.tensor([[True, True, False], [True, False, False]]),
        ),
        matches=torch.tensor([0, -1, -1]),
        positions=torch.tensor([[value], [value + 1]]),
        places=Places(torch.stack([torch.full((3, 2), 10 * value)] * 2), torch.tensor(2.0), torch.tensor(8.0 + value)),
    )


def test_first_sides_come_before_second_sides() -> None:
    batch = collate([sample("a", 1), sample("b", 2)]).to(CPU)
    assert batch.cases == ("a", "b", "a'", "b'")
    assert batch.rendered((4, 5))[:, 0, 0, 0].tolist() == [1, 2, -1, -2]
    assert batch.keypoints.coords[:, 0, 0].tolist() == [1, 2, -1, -2]
    assert batch.keypoints.valid.sum(1).tolist() == [2, 2, 1, 1]
    assert batch.positions[:, 0].tolist() == [1, 2, 2, 3]
    assert batch.matches.tolist() == [[0, -1, -1]] * 2
    assert batch.places.mm[:, 0, 0].tolist() == [10, 20, 10, 20]
    assert (batch.places.same.tolist(), batch.places.reach.tolist()) == ([2, 2], [9, 10])


def test_rendering_later_gives_the_same_views() -> None:
    samples, views = [], []
    for i, size in enumerate([(20, 16), (14, 22)]):
        generator = np.random.default_rng(i)
        drawn = [draw_view((8.0, 8.0), (12, 9), (1, 1), 1, PretrainConfig(), generator) for _ in range(2)]
        image = torch.rand(1, *size, generator=torch.Generator().manual_seed(i))
        controls = [control_points(p, (12, 9), (1.0, 1.0)) for p in drawn]
        recipe = make_recipe([image, image], [(0, 0)] * 2, controls, drawn)
        views.append(render(recipe, (12, 9)))
        base = sample(str(i), i)
        samples.append(PairSample(base.cases, recipe, base.keypoints, base.matches, base.positions, base.places))
    expected = torch.cat([v[side : side + 1] for side in (0, 1) for v in views])
    assert torch.allclose(collate(samples).to(CPU).rendered((12, 9)), expected, atol=1e-4)
