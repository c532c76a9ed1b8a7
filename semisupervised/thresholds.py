"""How sure the teacher has to be of a voxel before the network learns its label: class by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from semisupervised.losses import PseudoLabels, hard_labels

BINS = 100
"""Of the probabilities from 0 to 1, in which the voxels of every class are counted."""
LEARNED = 0.5
"""At least this share of the voxels that the teacher gives to a class is learned."""


class Thresholds:
    """The smallest probability of a label that is learned, for every class; set anew after every epoch.

    It is `highest`, unless fewer than half of the voxels that the teacher gave to the class in the last epoch reach
    that; then it is as low as half of them need. With one threshold for all, the voxels of a class that is hard to tell
    are never learned, while the background around them is, which teaches the network that the class is not there.
    Thresholds by class are those of FlexMatch (Zhang et al., NeurIPS 2021) and FreeMatch (Wang et al., ICLR 2023); here
    they are quantiles.

    For regions the two labels are absence and presence, region by region.

    Args:
        highest: Threshold of the classes that the teacher is sure of, and of all in the first epoch.
        outputs: Channels C of the network's output, or R regions.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        device: Of the outputs.

    Attributes:
        values: (C,) of the classes; (2 R,) of absence and presence of the first region, of the second, and so on.
    """

    def __init__(self, highest: float, outputs: int, regions: bool, device: torch.device) -> None:
        self.highest, self.regions = highest, regions
        labels = 2 * outputs if regions else outputs
        self.values = torch.full((labels,), highest, device=device)
        self._counts = torch.zeros(labels, BINS, device=device)

    @torch.no_grad()
    def label(self, logits: Tensor) -> PseudoLabels:
        """Label voxels by the teacher's output, and count how sure it is.

        Args:
            logits: (B, C, *S) classes, or (B, R, *S) regions.
        """
        target, probability = hard_labels(logits, self.regions)
        which = target.long()
        if self.regions:
            which = which + 2 * torch.arange(which.shape[1], device=which.device).view(-1, *[1] * (which.ndim - 2))
        place = which * BINS + (probability * BINS).long().clamp(0, BINS - 1)
        # whole numbers: the order of the sum does not matter
        counts = torch.zeros(self._counts.numel(), dtype=torch.int32, device=place.device)
        counts.scatter_add_(0, place.flatten(), torch.ones_like(place, dtype=torch.int32).flatten())
        self._counts += counts.view_as(self._counts)
        return PseudoLabels(target, probability >= self.values[which])

    def next_epoch(self, ddp: bool) -> None:
        """Set the thresholds by what was counted, over all processes; a label that was not given keeps its own."""
        if ddp:
            dist.all_reduce(self._counts)
        at_least = self._counts.flip(1).cumsum(1).flip(1)
        given = at_least[:, 0]
        enough = at_least >= LEARNED * given[:, None]  # true up to the bin that is looked for
        found = (enough.sum(1) - 1) / BINS
        self.values = torch.where(given > 0, found.clamp_max(self.highest), self.values)
        self._counts = torch.zeros_like(self._counts)

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        return {"values": self.values.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        self.values = torch.tensor(state["values"], device=self.values.device)
