"""The typed batch that goes from the loader to the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PairSample:
    """One pair of views of one case; index 0 of the leading axis is the first side.

    Attributes:
        case: identifier.
        views: (2, C, *V) float32.
        grids: (2, *V, D) float32 source voxel coordinates of every view voxel.
        extents: (D,) float32 source shape.
        positions: (2, A) float32 normalised positions along the volume.
        known_transform: both views show the same voxels.
        references: un-augmented source crops, two of (C, *R), 2D only (for descriptors), else ``None``.
        origins: (2, D) float32 source voxel at index 0 of the references.
    """

    case: str
    views: Tensor
    grids: Tensor
    extents: Tensor
    positions: Tensor
    known_transform: bool
    references: tuple[Tensor, Tensor] | None
    origins: Tensor


@dataclass(frozen=True)
class Batch:
    """B pairs; the leading axis of size 2B holds all first sides, then all second sides.

    Attributes:
        cases: B identifiers.
        views: (2B, C, *V).
        grids: (2B, *V, D).
        extents: (2B, D).
        positions: (2B, A).
        known_transform: (B,) bool.
        references: (2B, C, *R), padded by repeating the border, or ``None``.
        origins: (2B, D).
    """

    cases: tuple[str, ...]
    views: Tensor
    grids: Tensor
    extents: Tensor
    positions: Tensor
    known_transform: Tensor
    references: Tensor | None
    origins: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch with all tensors on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            self.cases,
            move(self.views),
            move(self.grids),
            move(self.extents),
            move(self.positions),
            move(self.known_transform),
            None if self.references is None else move(self.references),
            move(self.origins),
        )


def collate(samples: Sequence[PairSample]) -> Batch:
    """Stack samples into a batch; references of different sizes are padded, nothing is cut."""

    def sides(name: str) -> Tensor:
        return torch.stack([getattr(sample, name)[side] for side in (0, 1) for sample in samples])

    return Batch(
        cases=tuple(sample.case for sample in samples),
        views=sides("views"),
        grids=sides("grids"),
        extents=torch.stack([sample.extents for sample in samples]).repeat(2, 1),
        positions=sides("positions"),
        known_transform=torch.tensor([sample.known_transform for sample in samples]),
        references=_pad_references(samples),
        origins=sides("origins"),
    )


def _pad_references(samples: Sequence[PairSample]) -> Tensor | None:
    """Stack the reference crops, first sides then second sides, to the largest shape of the batch."""
    crops = [sample.references[side] for side in (0, 1) for sample in samples if sample.references is not None]
    if not crops:
        return None
    target = [max(crop.shape[axis] for crop in crops) for axis in range(1, crops[0].ndim)]
    padded = []
    for crop in crops:
        missing = [(0, t - s) for t, s in zip(target, crop.shape[1:], strict=True)]
        amounts = [amount for pair in reversed(missing) for amount in pair]
        # Repeating the border adds no edge that a descriptor near it could latch on to.
        padded.append(functional.pad(crop.unsqueeze(0), amounts, mode="replicate").squeeze(0))
    return torch.stack(padded)
