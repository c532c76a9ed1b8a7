"""Counting how sure the teacher is of its labels."""

from __future__ import annotations

import torch
from torch import Tensor


def add_to_histogram(counts: Tensor, which: Tensor, bins: Tensor) -> None:
    """Count voxels in place. Whole numbers are added, so that the order of the sum does not matter.

    Args:
        counts: (labels, bins) float32.
        which: Label of every voxel, int64, any shape.
        bins: Its bin, int64, the same shape; beyond the last one it is counted there.
    """
    place = (which * counts.shape[1] + bins.clamp(0, counts.shape[1] - 1)).flatten()
    found = torch.zeros(counts.numel(), dtype=torch.int32, device=place.device)
    found.scatter_add_(0, place, torch.ones_like(place, dtype=torch.int32))
    counts += found.view_as(counts)
