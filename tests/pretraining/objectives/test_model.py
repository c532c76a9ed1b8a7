from __future__ import annotations

from typing import Any

import pytest
import torch

from nnunetv2_kaf.keypoints import Keypoints
from pretraining.config import COMPONENTS, PRESETS, PretrainConfig
from pretraining.loop import TrainingState
from pretraining.objectives.heads import masked_mean
from pretraining.run import build_state
from pretraining.task import resolve_task

CPU = torch.device("cpu")


def build(configuration: str, preset: str = "kaf", **changes: Any) -> tuple[TrainingState, tuple[int, ...]]:
    config = PretrainConfig.from_preset(preset, {"projection_dim": 5, "descriptor_dim": 8, **changes})
    task = resolve_task("123", configuration, "nnUNetPlans", config.network)
    return build_state(task, config, CPU), task.patch_size


def inputs(patch: tuple[int, ...], count: int = 4, points: int = 20) -> tuple[torch.Tensor, Keypoints]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(count, 1, *patch, generator=generator)
    coords = torch.rand(count, points, len(patch), generator=generator) * (torch.tensor(patch) - 1)
    return views, Keypoints(coords, torch.rand(count, points, generator=generator) > 0.3)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_shapes_and_independence_of_batch_mates(tiny: Any, configuration: str) -> None:
    state, patch = build(configuration)
    views, points = inputs(patch)
    out = state.model(views, points)
    assert out.bottleneck.shape == out.keypoints.shape == (4, 5)
    assert out.descriptors.shape == out.matching.shape == (4, 20, 8)
    assert out.dustbin.shape == ()
    # rows 1 and 3 are one pair
    pair = torch.tensor([1, 3])
    alone = state.model(views[pair], Keypoints(points.coords[pair], points.valid[pair]))
    for name in ("bottleneck", "keypoints", "descriptors", "matching"):
        assert torch.allclose(getattr(out, name)[pair], getattr(alone, name), atol=1e-5), name


@pytest.mark.parametrize("component", COMPONENTS)
def test_heads_exist_for_active_losses_only(tiny: Any, component: str) -> None:
    weights = {f"weight_{name}": float(name == component) for name in COMPONENTS}
    state, patch = build("2d", **weights)
    out = state.model(*inputs(patch))
    wanted = {
        "bottleneck": {"bottleneck"},
        "keypoints": {"keypoints", "descriptors"},
        "local": {"descriptors"},
        "transport": {"descriptors", "matching", "dustbin"},
    }[component]
    assert {name for name, value in out._asdict().items() if value is not None} == wanted | {"valid"}


@pytest.mark.parametrize("preset", ["simclr", "gcl", "pcl"])
def test_global_presets_on_a_plain_encoder(tiny: Any, preset: str) -> None:
    state, patch = build("2d", preset, network="plain")
    assert type(state.network).__name__ == "PlainConvUNet"
    views, points = inputs(patch)
    out = state.model(views, points)
    assert out.bottleneck.shape == (4, 5)
    assert out.descriptors is None
    descriptors, vectors = state.model.describe(views, points)
    assert descriptors.shape == (4, 20, 4 + 8 + 8)
    assert torch.equal(vectors, out.bottleneck)


def test_points_are_described_by_the_features_at_their_voxels(tiny: Any) -> None:
    state, patch = build("2d", "simclr", network="plain")
    views, points = inputs(patch)
    descriptors, _ = state.model.describe(views, points)
    features = state.network.encoder(views)[0]
    y, x = (torch.floor(points.coords[2, 7] + 0.5).long()).tolist()
    expected = features[2, :, y, x]
    assert torch.allclose(descriptors[2, 7, :4], expected / expected.norm(), atol=1e-5)


def test_describe_is_what_the_losses_see(tiny: Any) -> None:
    state, patch = build("3d_fullres")
    views, points = inputs(patch)
    out = state.model(views, points)
    descriptors, vectors = state.model.describe(views, points)
    assert torch.equal(descriptors, out.descriptors)
    assert torch.equal(vectors, out.bottleneck)
    assert not descriptors.requires_grad


def test_the_seed_decides_and_the_global_generator_is_untouched(tiny: Any) -> None:
    before = torch.get_rng_state()
    one, two, three = (build("2d", seed=seed)[0].model for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_no_keypoints(tiny: Any) -> None:
    state, patch = build("3d_fullres")
    views, points = inputs(patch)
    out = state.model(views, Keypoints(*map(torch.zeros_like, points)))
    assert all(torch.isfinite(value).all() for value in out if value is not None)


def test_every_preset_builds(tiny: Any) -> None:
    assert set(PRESETS) == {"kaf", "paper", "simclr", "gcl", "pcl"}
    for preset in PRESETS:
        state, patch = build("2d", preset)
        assert torch.isfinite(state.model(*inputs(patch)).bottleneck).all()


def test_masked_mean() -> None:
    values = torch.tensor([[[1.0], [3.0], [torch.nan]], [[5.0], [5.0], [5.0]]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(values, valid).tolist() == [[2.0], [0.0]]
