"""Which two views make a pair: neighbouring slices (2D) or overlapping patches (3D) of one volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_kaf.errors import KAFError


@dataclass(frozen=True)
class Side:
    """Where one view of a pair is taken.

    Attributes:
        centre: centre of the crop in source voxels, array order, voxel centres at integers (D values).
        slice_index: the slice along the first axis of the volume in 2D, ``None`` in 3D.
        position: normalised position along the volume in [0, 1]; one value (slice axis) in 2D, three in 3D.
    """

    centre: tuple[float, ...]
    slice_index: int | None
    position: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Two sides of one case."""

    case: str
    first: Side
    second: Side

    @property
    def known_transform(self) -> bool:
        """Whether both views show the same voxels, so that their transforms alone give the correspondence."""
        return self.first.slice_index == self.second.slice_index


def sample_pair(
    case: str,
    volume_shape: Sequence[int],
    patch_size: Sequence[int],
    generator: np.random.Generator,
    *,
    slice_distance: float,
    shift: float,
) -> Pair:
    """Draw a pair from one volume.

    2D: a uniformly drawn slice and another one at most ``max(1, round(slice_distance * N))`` slices away (method:
    neighbouring slices are positives); a single-slice volume gives two views of its only slice. 3D, and the in-plane
    axes in 2D: the first centre is uniform, the second is shifted by up to ``shift`` of the patch per axis.

    Args:
        case: identifier of the case.
        volume_shape: spatial shape (Z, Y, X) of the volume.
        patch_size: view shape; two values (2D) or three (3D).
        generator: source of all draws.
        slice_distance: largest distance of the two slices as a share of the number of slices.
        shift: largest shift between the two centres as a share of the smaller of patch and volume, per axis.

    Raises:
        KAFError: if the volume is empty along an axis or is not three-dimensional.
    """
    if len(volume_shape) != 3 or min(volume_shape) < 1:
        raise KAFError(
            f"Case {case} has spatial shape {tuple(volume_shape)}; expected three axes of at least one voxel. "
            "Preprocess the dataset again."
        )
    shape = volume_shape[-len(patch_size) :]
    first, second = _centres(shape, patch_size, generator, shift)
    if len(patch_size) == 3:
        return Pair(case, Side(first, None, _position(first, shape)), Side(second, None, _position(second, shape)))
    depth = volume_shape[0]
    here, there = _slices(depth, slice_distance, generator)
    return Pair(
        case, Side(first, here, _position((here,), (depth,))), Side(second, there, _position((there,), (depth,)))
    )


def _slices(depth: int, slice_distance: float, generator: np.random.Generator) -> tuple[int, int]:
    """Draw a slice and a different one in its neighbourhood (the same one if there is no other)."""
    here = int(generator.integers(depth))
    reach = max(1, round(slice_distance * depth))
    candidates = [z for z in range(max(0, here - reach), min(depth, here + reach + 1)) if z != here]
    return here, int(generator.choice(candidates)) if candidates else here


def _centres(
    shape: Sequence[int], patch_size: Sequence[int], generator: np.random.Generator, shift: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Draw two nearby crop centres whose unrotated crops lie on the voxel raster.

    The crop stays inside the volume where the volume is large enough to leave room; in a volume that is not much larger
    than the patch the centre moves within the central half instead. Otherwise all patches of a small organ crop
    (smaller than the patch) would have the same position and nothing could be contrasted.
    """
    first, second = [], []
    for size, patch in zip(shape, patch_size, strict=True):
        half = (patch - 1) / 2
        margin = min(patch / 2, size / 4)
        low, high = (margin - 0.5, size - margin - 0.5) if size > 1 else (0.0, 0.0)
        centre = generator.uniform(low, high)
        reach = shift * min(patch, size) if size > 1 else 0.0
        other = float(np.clip(centre + generator.uniform(-reach, reach), low, high))
        # A single slice stays exactly on its centre: interpolating it with the padding would only darken it.
        first.append(round(centre - half) + half if size > 1 else 0.0)
        second.append(round(other - half) + half if size > 1 else 0.0)
    return tuple(first), tuple(second)


def _position(centre: Sequence[float], shape: Sequence[int]) -> tuple[float, ...]:
    """Return voxel coordinates as shares of the volume: the middle of a volume is 0.5 for any number of voxels."""
    return tuple(min(1.0, max(0.0, (c + 0.5) / n)) for c, n in zip(centre, shape, strict=True))
