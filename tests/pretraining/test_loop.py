from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.keypoints import Keypoints
from pretraining.config import PretrainConfig
from pretraining.dataset import PreprocessedImages
from pretraining.loader import PairLoader
from pretraining.loop import METRICS, Trainer, correspond, learning_rate
from pretraining.run import build_state
from pretraining.task import resolve_task

CPU = torch.device("cpu")


def setup(tiny: Any, configuration: str, tmp_path: Path, **changes: Any) -> tuple[Trainer, PairLoader]:
    task = resolve_task("123", configuration, "nnUNetPlans")
    config = PretrainConfig(**{"epochs": 1, "iterations": 3, **changes})
    images = PreprocessedImages(task.image_folder, "command")
    loader = PairLoader(images, tuple(images.identifiers), task.patch_size, task.spacing, 3, config, 0)
    return Trainer(build_state(task, config, CPU), config, task.spacing, CPU, tmp_path / "bad.json"), loader


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = PretrainConfig(epochs=10, iterations=10, warmup=0.1, learning_rate=0.5)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:2] == [pytest.approx(0.05), pytest.approx(0.1)]
    assert rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_every_parameter_gets_a_gradient(tiny: Any, configuration: str, tmp_path: Path) -> None:
    tiny.add_cases(5)
    trainer, loader = setup(tiny, configuration, tmp_path)
    total, metrics = trainer.compute(loader.batch(0))
    assert set(metrics) == set(METRICS)
    assert metrics["matched"] > 0
    total.backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in trainer.state.model.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in trainer.state.network.decoder.seg_layers.parameters())


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_constant_images_give_a_finite_step_without_matches(tiny: Any, configuration: str, tmp_path: Path) -> None:
    tiny.add("flat", np.full((1, 10, 28, 20), 0.0, np.float32))
    trainer, loader = setup(tiny, configuration, tmp_path)
    values = trainer.step(loader.batch(0), 0)
    assert values["local"] == values["matched"] == 0
    assert all(math.isfinite(v) for v in values.values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_loss_falls_on_one_batch(tiny: Any, optimizer: str, tmp_path: Path) -> None:
    tiny.add_cases(3)
    rate = 3e-3 if optimizer == "adamw" else 0.03
    trainer, loader = setup(tiny, "2d", tmp_path, optimizer=optimizer, learning_rate=rate, epochs=20)
    batch = loader.batch(0)
    losses = [trainer.step(batch, step)["total"] for step in range(20)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(tiny: Any, tmp_path: Path) -> None:
    tiny.add_cases(3)
    trainer, loader = setup(tiny, "2d", tmp_path)
    batch = loader.batch(0)
    batch.views[0, 0, 3, 3] = torch.inf
    with pytest.raises(KAFError, match=batch.cases[0]):
        trainer.step(batch, 7)
    record = json.loads((tmp_path / "bad.json").read_text())
    assert record["step"] == 7
    assert record["cases"] == list(batch.cases)


def test_exploding_gradients_stop_too(tiny: Any, tmp_path: Path) -> None:
    tiny.add_cases(3)
    trainer, loader = setup(tiny, "2d", tmp_path)
    parameter = next(trainer.state.model.parameters())
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    before = parameter.detach().clone()
    with pytest.raises(KAFError, match="gradient"):
        trainer.step(loader.batch(0), 0)
    assert torch.equal(parameter, before)


def test_correspondence_follows_the_transforms(tiny: Any, tmp_path: Path) -> None:
    """Points placed on the same source places in both views are matched to each other, whatever the deformation."""
    tiny.add_cases(3, shape=(1, 12, 40, 32))
    _, loader = setup(tiny, "3d_fullres", tmp_path, spatial=1.0)
    batch, spacing = loader.batch(0), (4.0, 1.0, 1.0)
    count, generator = 40, torch.Generator().manual_seed(0)
    points = torch.stack([torch.randint(0, n, (6, count), generator=generator) for n in (8, 24, 16)], -1)
    planted = torch.zeros(3, count, dtype=torch.bool)
    for pair in range(3):
        seen = (batch.grids[pair + 3] * torch.tensor(spacing)).flatten(0, -2)
        for k in range(count):
            target = batch.grids[pair][tuple(points[pair, k])] * torch.tensor(spacing)
            distance, nearest = (seen - target).norm(dim=1).min(0)
            points[pair + 3, k] = torch.tensor(np.unravel_index(int(nearest), batch.grids.shape[1:-1]))
            planted[pair, k] = distance < 1
    valid = torch.ones(6, count, dtype=torch.bool)
    matches, usable = correspond(batch, Keypoints(points.float(), valid, valid.float()), spacing, PretrainConfig())
    planted &= usable[:3] & usable[3:]
    assert planted.sum() > 15
    assert (matches == torch.arange(count))[planted].float().mean() > 0.85
    nothing = correspond(batch, Keypoints(points.float(), ~valid, valid.float()), spacing, PretrainConfig())
    assert (nothing[0] == -1).all()
    assert not nothing[1].any()


def test_neighbouring_slices_are_matched_by_appearance(tiny: Any, tmp_path: Path) -> None:
    volume = np.repeat(np.random.default_rng(0).standard_normal((1, 1, 40, 32)).astype(np.float32), 6, axis=1)
    tiny.add("same_slices", volume)
    _, loader = setup(tiny, "2d", tmp_path, spatial=0.0, shift=0.0, mirror=0.0)
    batch = loader.batch(0)
    assert not batch.known_transform.any()
    g = torch.Generator().manual_seed(0)
    points = torch.stack([torch.randint(2, n - 2, (3, 20), generator=g) for n in (24, 16)], -1).float().repeat(2, 1, 1)
    valid = torch.ones(6, 20, dtype=torch.bool)
    matches, usable = correspond(batch, Keypoints(points, valid, valid.float()), (1.0, 1.0), PretrainConfig())
    matched = matches >= 0
    assert matched.float().mean() > 0.7
    same_place = points[3:].gather(1, matches.clamp_min(0).unsqueeze(2).expand(-1, -1, 2)) == points[:3]
    assert same_place.all(2)[matched].all()
    assert usable.all()
