"""Islands among the teacher's labels: pieces of a structure that is always one piece in the labelled patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from semisupervised.losses import PseudoLabels

ONE_PIECE = 0.05
"""A structure is one piece if at most this share of its labelled voxels lies outside the largest piece of a patch."""


class Islands:
    """Takes islands out of the pseudo-labels, as nnU-Net's postprocessing takes them out of predictions.

    With few labelled cases the teacher takes unknown organs for the structures, and is sure of it. Whether a structure
    is one piece is known, though: the labelled patches show it. Of such a structure the network learns the largest
    piece of an unlabelled patch alone. Smaller ones are background; those that touch what stays of the structures are
    left out of the loss, because they may belong to it.

    Measured in patches, not in whole images: a patch may cut a bent structure into several pieces. A structure that
    comes in several pieces, like lesions or a pair of organs, keeps all of them.

    Args:
        structures: Foreground classes, or regions, of the network.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        device: Where the processes of a training exchange numbers.

    Attributes:
        one_piece: (structures,) bool; set anew after every epoch by all labelled patches so far.
    """

    def __init__(self, structures: int, regions: bool, device: torch.device) -> None:
        self.structures, self.regions = structures, regions
        self.one_piece: NDArray[np.bool_] = np.zeros(structures, dtype=bool)
        # labelled voxels of every structure, and those of them outside the largest piece: before this epoch, and in it
        self._before = torch.zeros(2, structures, dtype=torch.int64, device=device)
        self._labelled = np.zeros((2, structures), dtype=np.int64)
        # the teacher's voxels of all structures in this epoch, and those of them in islands
        self._removed = np.zeros(2, dtype=np.int64)

    def learn(self, reference: Tensor) -> None:
        """Count the pieces in labelled patches.

        Args:
            reference: nnU-Net's target: (B, 1, *S) classes, or (B, R, *S) regions with one channel more if there is an
                ignore label; what is ignored is no structure.
        """
        for *_, pieces in self._pieces(reference):
            for structure in np.unique(pieces.structure):
                sizes = pieces.size[pieces.structure == structure]
                self._labelled[:, structure - 1] += (sizes.sum(), sizes.sum() - sizes.max())

    def remove(self, labels: PseudoLabels) -> PseudoLabels:
        """Labels without islands.

        Args:
            labels: The teacher's; not changed.
        """
        if not self.one_piece.any():
            return labels
        shape = tuple(labels.target.shape)
        alone, touching = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for place, patch, pieces in self._pieces(labels.target):
            self._removed[0] += len(pieces.voxels)
            smaller = pieces.smaller & self.one_piece[pieces.structure - 1]
            if smaller.any():
                island = smaller[pieces.number]
                self._removed[1] += np.count_nonzero(island)
                whole = _connected(patch > 0, pieces.voxels)  # structures of all kinds together
                stays = np.zeros(int(whole.max()) + 1, dtype=bool)
                stays[whole[~island]] = True
                alone[place].reshape(-1)[pieces.voxels] = island & ~stays[whole]
                touching[place].reshape(-1)[pieces.voxels] = island & stays[whole]
        device = labels.target.device
        background, left_out = torch.from_numpy(alone).to(device), torch.from_numpy(touching).to(device)
        return PseudoLabels(labels.target.masked_fill(background, 0), (labels.sure | background) & ~left_out)

    def next_epoch(self, ddp: bool) -> float:
        """Judge by all labelled patches so far, of all processes, what is one piece.

        Returns:
            Islands' share of the voxels that the teacher gave to structures in this epoch.
        """
        labelled, found = (torch.tensor(n, device=self._before.device) for n in (self._labelled, self._removed))
        if ddp:
            dist.all_reduce(labelled)
            dist.all_reduce(found)
        self._labelled[:], self._removed[:] = 0, 0
        self._before += labelled
        self._judge()
        given, removed = found.tolist()
        return float(removed / max(1, given))

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        return {"labelled": self._before.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        self._before = torch.tensor(state["labelled"], dtype=torch.int64, device=self._before.device)
        self._judge()

    def _judge(self) -> None:
        voxels, outside = self._before.cpu().numpy()
        self.one_piece = (voxels > 0) & (outside <= ONE_PIECE * voxels)

    def _pieces(self, target: Tensor) -> Iterator[tuple[tuple[int, ...], NDArray[np.int16], _Pieces]]:
        """Place, labels and pieces of every patch, of regions one by one; where there are any."""
        channels = self.structures if self.regions else 1
        maps = target[:, :channels].to(torch.int16).cpu().numpy()
        for place in np.ndindex(maps.shape[:2]):
            patch = maps[place] * np.int16(place[1] + 1)  # presence of a region becomes its number
            patch[patch > self.structures] = 0  # nnU-Net's ignore label is the highest one
            if patch.any():
                yield place, patch, _find_pieces(patch)


class _Pieces(NamedTuple):
    """The n pieces of a patch.

    Attributes:
        voxels: (m,) flat indices of the voxels of structures; all others are background.
        number: (m,) the piece of each of them, 0 to n - 1.
        structure: (n,) which structure a piece is of, from 1 on.
        size: (n,) voxels.
        smaller: (n,) bool, whether the structure has a larger piece.
    """

    voxels: NDArray[np.int64]
    number: NDArray[np.int64]
    structure: NDArray[np.int64]
    size: NDArray[np.int64]
    smaller: NDArray[np.bool_]


def _find_pieces(patch: NDArray[np.int16]) -> _Pieces:
    voxels = np.flatnonzero(patch > 0)
    number = _connected(patch, voxels) - 1
    size = np.bincount(number)
    structure = np.zeros_like(size)
    structure[number] = patch.reshape(-1)[voxels]
    largest = np.zeros(structure.max() + 1, dtype=size.dtype)
    np.maximum.at(largest, structure, size)
    return _Pieces(voxels, number, structure, size, size < largest[structure])


def _connected(patch: NDArray[Any], voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers, from 1 on, of the pieces of equal values that voxels belong to.

    Diagonal neighbours are connected, as in nnU-Net's postprocessing.
    """
    number = cc3d.connected_components(patch, connectivity=8 if patch.ndim == 2 else 26)
    at_voxels: NDArray[np.int64] = number.reshape(-1)[voxels].astype(np.int64)
    return at_voxels
