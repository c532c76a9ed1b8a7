"""The typed batch that goes from the loader to the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_kaf.keypoints import Keypoints
from pretraining.pairs.render import Recipe, join, render


class Places(NamedTuple):
    """Where the keypoints of pairs are in the patient, and from what distance on two of them are surely not one thing.

    Attributes:
        mm: (2B, K, D) float32 from the centre of the image, which is where two images of a patient are aligned; 0 where
            there is no keypoint.
        same: (B,) float32 mm; keypoints up to this far apart show the same place.
        reach: (B,) float32 mm; partners were looked for up to this distance.
    """

    mm: Tensor
    same: Tensor
    reach: Tensor


@dataclass(frozen=True)
class PairSample:
    """One pair of views of one patient; index 0 of the leading axis is the first side.

    Attributes:
        cases: Identifiers of the two sides.
        views: (2, C, *V) float32, or the recipe to render them from.
        keypoints: (2, K, D) float32 coordinates in view voxels, and validity.
        matches: (K,) long: index into the second side's keypoints, or -1.
        positions: (2, 3) float32 normalised positions of the centres in the volume.
        places: Of the keypoints: mm (2, K, D), same () and reach ().
    """

    cases: tuple[str, str]
    views: Tensor | Recipe
    keypoints: Keypoints
    matches: Tensor
    positions: Tensor
    places: Places


@dataclass(frozen=True)
class Batch:
    """B pairs; the leading axis of size 2B holds all first sides, then all second sides.

    Attributes:
        cases: 2B identifiers.
        views: (2B, C, *V), or the recipe to render them from.
        keypoints: (2B, K, D) coordinates in view voxels, and validity.
        matches: (B, K) long.
        positions: (2B, 3).
        places: Of the keypoints.
    """

    cases: tuple[str, ...]
    views: Tensor | Recipe
    keypoints: Keypoints
    matches: Tensor
    positions: Tensor
    places: Places

    def to(self, device: torch.device) -> Batch:
        """The batch with everything on `device`."""
        coords, valid, matches, positions, *places = (
            t.to(device, non_blocking=True) for t in (*self.keypoints, self.matches, self.positions, *self.places)
        )
        return Batch(self.cases, self.views.to(device), Keypoints(coords, valid), matches, positions, Places(*places))

    def rendered(self, shape: Sequence[int]) -> Tensor:
        """The views (2B, C, *V), computed on the batch's device if that has not been done yet."""
        return render(self.views, shape) if isinstance(self.views, Recipe) else self.views


def collate(samples: Sequence[PairSample]) -> Batch:
    """Stack samples into a batch; nothing is cut."""

    def sides(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(tensors), dim=1).flatten(0, 1)

    first = [sample.views for sample in samples if isinstance(sample.views, Recipe)]
    views: Tensor | Recipe = _sides_of(join(first)) if first else sides(_rendered(samples))
    return Batch(
        cases=tuple(sample.cases[side] for side in (0, 1) for sample in samples),
        views=views,
        keypoints=Keypoints(*(sides(tensors) for tensors in zip(*(s.keypoints for s in samples), strict=True))),
        matches=torch.stack([sample.matches for sample in samples]),
        positions=sides(sample.positions for sample in samples),
        places=Places(
            sides(sample.places.mm for sample in samples),
            torch.stack([sample.places.same for sample in samples]),
            torch.stack([sample.places.reach for sample in samples]),
        ),
    )


def _rendered(samples: Iterable[PairSample]) -> Iterator[Tensor]:
    """The views of samples that are rendered already."""
    for sample in samples:
        assert isinstance(sample.views, Tensor)
        yield sample.views


def _sides_of(recipe: Recipe) -> Recipe:
    """Reorder the views of joined pairs (first, second, first, ...) to all first sides, then all second sides."""
    order = [*range(0, len(recipe.seeds), 2), *range(1, len(recipe.seeds), 2)]
    index = torch.tensor(order)
    seeds = tuple(recipe.seeds[i] for i in order)
    return Recipe(recipe.sources[index], recipe.control[index], recipe.intensity[index], seeds)
