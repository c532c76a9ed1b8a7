"""Where structures lie in the labelled images, so that unlabelled patches show them as often as labelled ones do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOXELS = 10_000
"""Of a class in all cases together, about; at least one of every case."""


@dataclass(frozen=True)
class Positions:
    """Positions of labelled voxels, relative to their images, from which unlabelled patches are drawn.

    nnU-Net centres a share of the labelled patches on foreground. In unlabelled patches from anywhere a small structure
    is so rare that they teach little about it. The labels of unlabelled images are not known, but bodies are alike:
    where a structure lies in the labelled image, it often lies in another one. Patches show that position anywhere in
    them: centred on it they would seldom show what lies far from all structures.

    Attributes:
        share: Of the patches that show one of them; nnU-Net's `oversample_foreground_percent`.
        by_class: (n, D) float64 each, from 0 to 1 along every axis; classes without voxels are left out.
    """

    share: float = 0.0
    by_class: tuple[NDArray[np.float64], ...] = ()

    def draw(self, generator: np.random.Generator) -> NDArray[np.float64] | None:
        """The relative position that a patch is to show, every class equally often; None for a patch from anywhere."""
        if not self.by_class or generator.random() >= self.share:
            return None
        positions = self.by_class[int(generator.integers(len(self.by_class)))]
        position: NDArray[np.float64] = positions[int(generator.integers(len(positions)))]
        return position


def labelled_positions(dataset: Any, cases: Iterable[str], share: float) -> Positions:
    """Read the positions of the foreground, which nnU-Net's preprocessing has listed.

    Args:
        dataset: nnU-Net's dataset of preprocessed cases.
        cases: Labelled training cases.
        share: See `Positions`.
    """
    found: dict[Any, list[NDArray[np.float64]]] = {}
    cases = sorted(cases)
    most = max(1, VOXELS // max(1, len(cases)))
    for case in cases:
        data, _, _, properties = dataset.load_case(case)
        shape = np.array(data.shape[1:])
        for label, voxels in properties["class_locations"].items():
            everything = isinstance(label, tuple) and -1 in label  # nnU-Net's key for all that is not ignored
            if len(voxels) and not everything:
                chosen = np.asarray(voxels)[:: -(-len(voxels) // most), 1:]  # the first column is the channel
                found.setdefault(label, []).append((chosen + 0.5) / shape)
    return Positions(share, tuple(np.concatenate(positions) for positions in found.values()))
