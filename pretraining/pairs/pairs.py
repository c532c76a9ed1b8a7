"""Which two views make a pair: neighbouring slices (2D) or overlapping patches (3D) of one patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_kaf.coordinates import share_of_extent
from nnunetv2_kaf.errors import KAFError


@dataclass(frozen=True)
class Side:
    """Where one view of a pair is taken.

    Attributes:
        case: Identifier of the image.
        shape: Spatial shape of the image that is cropped: a slice (2 values) or a volume (3).
        centre: Centre of the crop in source voxels, array order, voxel centres at integers (D values).
        slice_index: The slice along the first axis of the volume in 2D, `None` in 3D.
        position: Normalised position of the centre in the volume, (z, y, x) in [0, 1]; also in 2D, where patches show
            a part of the slice.
    """

    case: str
    shape: tuple[int, ...]
    centre: tuple[float, ...]
    slice_index: int | None
    position: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Two sides of one patient."""

    first: Side
    second: Side

    @property
    def known_transform(self) -> bool:
        """Whether both views show the same voxels, so that their transforms alone give the correspondence."""
        return self.first.case == self.second.case and self.first.slice_index == self.second.slice_index


def sample_pair(
    cases: tuple[str, str],
    volume_shapes: tuple[Sequence[int], Sequence[int]],
    patch_size: Sequence[int],
    generator: np.random.Generator,
    *,
    slice_distance: float,
    shift: float,
) -> Pair:
    """Draw a pair from one volume, or from two volumes of a patient (time points, phases).

    2D: a uniformly drawn slice and one at most `max(1, round(slice_distance * N))` slices away (method: neighbouring
    slices are positives), a different one where both sides are of one volume; a single-slice volume gives two views of
    its only slice. 3D, and the in-plane axes in 2D: the first centre is uniform, the second is shifted by up to
    `shift` of the patch per axis. Two volumes of a patient are taken to be aligned at their centres, slices by their
    share of the volume.

    Args:
        cases: Identifiers of the two sides, often the same.
        volume_shapes: Their spatial shapes (Z, Y, X).
        patch_size: View shape; two values (2D) or three (3D).
        generator: Source of all draws.
        slice_distance: Largest distance of the two slices as a share of the number of slices.
        shift: Largest shift between the two centres as a share of the smaller of patch and volume, per axis.

    Raises:
        KAFError: If a volume is empty along an axis or is not three-dimensional.
    """
    for case, volume in zip(cases, volume_shapes, strict=True):
        if len(volume) != 3 or min(volume) < 1:
            raise KAFError(
                f"Case {case} has spatial shape {tuple(volume)}; expected three axes of at least one voxel. "
                "Preprocess the dataset again."
            )
    dims = len(patch_size)
    shapes = [tuple(int(n) for n in volume[-dims:]) for volume in volume_shapes]
    centres = _centres(shapes[0], shapes[1], patch_size, generator, shift)
    indices: tuple[int, int] | tuple[None, None] = (None, None)
    if dims == 2:
        depths = (volume_shapes[0][0], volume_shapes[1][0])
        indices = _slices(*depths, slice_distance, cases[0] == cases[1], generator)
        places = zip(indices, centres, depths, shapes, strict=True)
        positions = [_position((z, *centre), (depth, *shape)) for z, centre, depth, shape in places]
    else:
        positions = [_position(centre, shape) for centre, shape in zip(centres, shapes, strict=True)]
    first, second = (Side(*values) for values in zip(cases, shapes, centres, indices, positions, strict=True))
    return Pair(first, second)


def _slices(
    depth: int, other_depth: int, slice_distance: float, same_volume: bool, generator: np.random.Generator
) -> tuple[int, int]:
    """Draw a slice and one near the same share of the other volume; two different ones of one volume, if it has two."""
    here = int(generator.integers(depth))
    reach = max(1, round(slice_distance * other_depth))
    there = min(other_depth - 1, int((here + 0.5) / depth * other_depth))
    candidates = [z for z in range(max(0, there - reach), min(other_depth, there + reach + 1))]
    if same_volume and len(candidates) > 1:
        candidates.remove(here)
    return here, int(generator.choice(candidates))


def _centres(
    shape: Sequence[int], other: Sequence[int], patch_size: Sequence[int], generator: np.random.Generator, shift: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Draw two nearby crop centres whose unrotated crops lie on the voxel raster.

    The crop stays inside the volume where the volume is large enough to leave room; in a volume that is not much larger
    than the patch the centre moves within the central half instead. Otherwise all patches of a small organ crop
    (smaller than the patch) would have the same position and nothing could be contrasted.
    """
    first, second = [], []
    for size, other_size, patch in zip(shape, other, patch_size, strict=True):
        half = (patch - 1) / 2
        low, high = _range(size, patch)
        centre = generator.uniform(low, high)
        reach = shift * min(patch, size) if size > 1 else 0.0
        # The two images are aligned at their centres.
        moved = centre + generator.uniform(-reach, reach) + (other_size - size) / 2
        moved = float(np.clip(moved, *_range(other_size, patch)))
        # On the raster also where there is one slice: interpolating it with the padding would only darken it.
        first.append(round(centre - half) + half)
        second.append(round(moved - half) + half)
    return tuple(first), tuple(second)


def _range(size: int, patch: int) -> tuple[float, float]:
    """Where crop centres may lie along an axis."""
    margin = min(patch / 2, size / 4)
    return (margin - 0.5, size - margin - 0.5) if size > 1 else (0.0, 0.0)


def _position(centre: Sequence[float], shape: Sequence[int]) -> tuple[float, ...]:
    """Voxel coordinates as shares of the volume, from 0 to 1; 0.5 where there is one slice."""
    shares = share_of_extent(np.asarray(centre), shape).clip(0, 1)
    return tuple(np.where(np.asarray(shape) == 1, 0.5, shares).tolist())
