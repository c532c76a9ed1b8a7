"""CutMix: boxes exchanged between patches, image and labels together (Yun et al., ICCV 2019)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def draw_box(
    generator: np.random.Generator, shape: tuple[int, ...], probability: float, share: tuple[float, float] = (0.1, 0.5)
) -> Tensor:
    """Draw the box of a patch that CutMix replaces (Yun et al., ICCV 2019).

    Args:
        generator: Source of all draws.
        shape: Shape of the patch.
        probability: Probability of a box at all; otherwise it is empty.
        share: Range of its share of the patch's voxels. The edges have all about the same share of the patch's.

    Returns:
        (D, 2) int64, first voxel and the one after the last.
    """
    use, amount, *places = generator.random(2 + len(shape))
    if use >= probability:
        return torch.zeros(len(shape), 2, dtype=torch.int64)
    edge = (share[0] + amount * (share[1] - share[0])) ** (1 / len(shape))
    box = []
    for n, place in zip(shape, places, strict=True):
        length = max(1, min(n, math.ceil(n * edge)))
        start = int(place * (n - length + 1))
        box.append([start, start + length])
    return torch.tensor(box)


def box_mask(boxes: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, 1, *shape) bool, true inside the boxes (B, D, 2)."""
    boxes = boxes.to(device, non_blocking=True)
    inside: Tensor | None = None
    for axis, n in enumerate(shape):
        place = torch.arange(n, device=device)
        along = (place >= boxes[:, axis, :1]) & (place < boxes[:, axis, 1:])
        view = along.view(len(boxes), 1, *[n if i == axis else 1 for i in range(len(shape))])
        inside = view if inside is None else inside & view
    assert inside is not None
    return inside


def cut_mix(inside: Tensor, partners: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Replace the boxes of the first patches of a batch by the same place of their partners.

    Args:
        inside: (N, 1, *S) bool, of the first N patches.
        partners: (N,) index of the patch that the box comes from.
        tensors: (B, C, *S) each; image, labels and confidence move together.

    Returns:
        (N, C, *S) each.
    """
    return tuple(torch.where(inside, tensor[partners], tensor[: len(inside)]) for tensor in tensors)
