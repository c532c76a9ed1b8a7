from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from kaf_report import scores

SPACING = (4.0, 1.0, 1.5)


def blobs(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (8, 20, 24)], indexing="ij"))
    centre, radius = generator.uniform(0.4, 0.6, 3) * [8, 20, 24], generator.uniform(0.2, 0.35, 3) * [8, 20, 24]
    scaled = (grid - centre[:, None, None, None]) / radius[:, None, None, None]
    return np.asarray((scaled**2).sum(0) < 1)


@pytest.mark.parametrize("seed", range(4))
def test_the_distance_is_monais(seed: int) -> None:
    ours, theirs = blobs(2 * seed), blobs(2 * seed + 1)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (ours, theirs)]
    expected = float(compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=SPACING))
    assert scores.hausdorff95(ours, theirs, SPACING) == pytest.approx(expected, rel=1e-5)
    dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
    assert scores.compare(ours, theirs, SPACING).dice == pytest.approx(dice)


@pytest.mark.parametrize("seed", range(4))
def test_of_a_flat_image_the_outlines_count(seed: int) -> None:
    ours, theirs = (blobs(number)[4:5] for number in (2 * seed, 2 * seed + 1))
    tensors = [torch.from_numpy(mask)[None].float() for mask in (ours, theirs)]
    expected = float(compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=SPACING[1:]))
    assert scores.hausdorff95(ours, theirs, SPACING) == pytest.approx(expected, rel=1e-5)


def test_a_single_voxel_is_its_own_surface() -> None:
    voxel = np.ones((1, 1, 1), dtype=bool)
    assert scores.hausdorff95(voxel, voxel, SPACING) == 0


def test_masks_at_the_border_have_a_surface_there() -> None:
    full = np.ones((2, 3, 4), dtype=bool)
    assert scores.compare(full, full, SPACING) == scores.Score(1.0, 0.0)


def test_empty_masks_are_told_apart() -> None:
    empty, full = np.zeros((2, 2, 2), dtype=bool), np.ones((2, 2, 2), dtype=bool)
    assert scores.compare(empty, empty, SPACING) == scores.Score(None, None)
    assert scores.compare(empty, full, SPACING) == scores.Score(0.0, None, "prediction")
    assert scores.compare(full, empty, SPACING) == scores.Score(0.0, None, "reference")


def test_regions_and_the_ignore_label() -> None:
    labels = {"background": 0, "heart": [1, 2], "lv": 2, "ignore": 3}
    manager = LabelManager(labels, [1, 2])
    reference = np.array([[[1, 2, 3, 0]]], dtype=np.int16)
    prediction = np.array([[[1, 1, 2, 0]]], dtype=np.int16)
    found = scores.score(prediction, reference, (1, 1, 1), manager)
    assert {part: entry.dice for part, entry in found.items()} == {(1, 2): 1.0, 2: 0.0}
    assert found[2].missing == "prediction"
    assert scores.names(labels, list(found)) == {(1, 2): "heart", 2: "lv"}
    assert scores.mean_dice(found) == 0.5
    assert scores.mean_dice({}) is None
