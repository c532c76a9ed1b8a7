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
        # of every structure all voxels, and those outside the largest piece: labelled ones up to the last epoch and in
        # this one, and the teacher's in this one
        self._before = torch.zeros(2, structures, dtype=torch.int64, device=device)
        self._labelled = np.zeros((2, structures), dtype=np.int64)
        self._removed = torch.zeros(2, dtype=torch.int64, device=device)

    def learn(self, reference: Tensor) -> None:
        """Count the pieces in labelled patches.

        Args:
            reference: nnU-Net's target: (B, 1, *S) classes, or (B, R, *S) regions with one channel more if there is an
                ignore label; what is ignored is no structure.
        """
        for _, pieces in self._pieces(reference):
            for structure in np.unique(pieces.structure):
                sizes = pieces.size[pieces.structure == structure]
                self._labelled[:, structure - 1] += (sizes.sum(), sizes.sum() - sizes.max())

    def remove(self, labels: PseudoLabels) -> PseudoLabels:
        """Labels without islands.

        Args:
            labels: The teacher's; not changed.
        """
        self._removed[0] += (labels.target > 0).sum()
        if not self.one_piece.any():
            return labels
        shape = tuple(labels.target.shape)
        alone, touching = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for place, pieces in self._pieces(labels.target):
            island = pieces.smaller & self.one_piece[pieces.structure - 1]
            if island.any():
                islands = _where(island, pieces.number)
                stays = (pieces.number > 0) & ~islands
                near = _reached_from(stays, pieces.number > 0)
                alone[place], touching[place] = islands & ~near, islands & near
        device = labels.target.device
        background, left_out = torch.from_numpy(alone).to(device), torch.from_numpy(touching).to(device)
        self._removed[1] += background.sum() + left_out.sum()
        return PseudoLabels(labels.target.masked_fill(background, 0), (labels.sure | background) & ~left_out)

    def next_epoch(self, ddp: bool) -> float:
        """Judge by all labelled patches so far, of all processes, what is one piece.

        Returns:
            Islands' share of the voxels that the teacher gave to structures in this epoch.
        """
        labelled = torch.tensor(self._labelled, device=self._before.device)
        if ddp:
            dist.all_reduce(labelled)
            dist.all_reduce(self._removed)
        self._before += labelled
        self._labelled[:] = 0
        self._judge()
        given, removed = self._removed.tolist()
        self._removed.zero_()
        return float(removed / max(1.0, given))

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

    def _pieces(self, target: Tensor) -> Iterator[tuple[tuple[int, int], _Pieces]]:
        """The pieces of every patch, and of every region apart; where there are any."""
        maps = target.cpu().numpy()
        channels = self.structures if self.regions else 1
        for place in np.ndindex(len(maps), channels):
            labels = maps[place].astype(np.uint16)
            if self.regions:
                labels = labels * np.uint16(place[1] + 1)
            labels[labels > self.structures] = 0  # nnU-Net's ignore label is the highest one
            if labels.any():
                yield place, _find_pieces(labels)


class _Pieces(NamedTuple):
    """The pieces of a patch.

    Attributes:
        number: (*S) the piece of every voxel, from 1 on; 0 = none.
        structure: (n,) which structure each of the n pieces is of, from 1 on.
        size: (n,) voxels.
        smaller: (n,) bool, whether the structure has a larger piece.
    """

    number: NDArray[np.integer[Any]]
    structure: NDArray[np.integer[Any]]
    size: NDArray[np.integer[Any]]
    smaller: NDArray[np.bool_]


def _find_pieces(labels: NDArray[np.uint16]) -> _Pieces:
    number = _connected(labels)
    flat = number.ravel()
    size = np.bincount(flat)[1:]
    structure = np.zeros(len(size) + 1, dtype=np.int64)
    structure[flat] = labels.ravel()
    structure = structure[1:]
    largest = np.zeros(structure.max() + 1, dtype=size.dtype)
    np.maximum.at(largest, structure, size)
    return _Pieces(number, structure, size, size < largest[structure])


def _connected(labels: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Number the pieces of equal labels; diagonal neighbours are connected, as in nnU-Net's postprocessing."""
    number: NDArray[np.integer[Any]] = cc3d.connected_components(labels, connectivity=8 if labels.ndim == 2 else 26)
    return number


def _where(chosen: NDArray[np.bool_], number: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """The voxels of the chosen pieces."""
    voxels: NDArray[np.bool_] = np.concatenate(([False], chosen))[number]
    return voxels


def _reached_from(start: NDArray[np.bool_], within: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is connected with `start`, (*S) bool, without leaving `within`."""
    number = _connected(within.astype(np.uint8))
    reached = np.zeros(int(number.max()) + 1, dtype=bool)
    reached[number[start]] = True
    reached[0] = False
    connected: NDArray[np.bool_] = reached[number]
    return connected
