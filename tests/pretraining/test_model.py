from __future__ import annotations

from typing import Any

import pytest
import torch

from pretraining.config import PretrainConfig
from pretraining.heads import masked_mean
from pretraining.run import build_state
from pretraining.task import resolve_task


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_shapes_and_independence_of_batch_mates(tiny: Any, configuration: str) -> None:
    task = resolve_task("123", configuration, "nnUNetPlans")
    state = build_state(task, PretrainConfig(projection_dim=5, descriptor_dim=7), torch.device("cpu"))
    views = torch.randn(4, 1, *task.patch_size, generator=torch.Generator().manual_seed(0))
    out = state.model(views)
    assert out.bottleneck.shape == out.keypoints.shape == (4, 5)
    assert out.descriptors.shape == (4, out.points.coords.shape[1], 7)
    alone = state.model(views[2:3])
    for together, single in zip(out[:3], alone[:3], strict=True):
        assert torch.allclose(together[2], single[0], atol=1e-5)


def test_the_seed_decides_and_the_global_generator_is_untouched(tiny: Any) -> None:
    task = resolve_task("123", "2d", "nnUNetPlans")
    before = torch.get_rng_state()
    one, two, three = (build_state(task, PretrainConfig(seed=s), torch.device("cpu")).model for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_no_keypoints(tiny: Any) -> None:
    task = resolve_task("123", "3d_fullres", "nnUNetPlans")
    model = build_state(task, PretrainConfig(), torch.device("cpu")).model
    out = model(torch.full((2, 1, *task.patch_size), 3.0))
    assert not out.points.valid.any()
    assert all(torch.isfinite(t).all() for t in out[:3])


def test_masked_mean() -> None:
    values = torch.tensor([[[1.0], [3.0], [torch.nan]], [[5.0], [5.0], [5.0]]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(values, valid).tolist() == [[2.0], [0.0]]
