"""How sure the teacher has to be of a voxel before the network learns its label: class by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from semisupervised.histogram import add_to_histogram
from semisupervised.losses import PseudoLabels, hard_labels

LEARNED = 0.5
"""At least this share of the voxels that the teacher gives to a structure is learned."""
BACKGROUND_LEARNED = 0.95
"""At most this share of the voxels that it gives to the background is."""
LOWEST, STEP, BINS = -6.0, 0.1, 220
"""The voxels of every label are counted in bins of the log odds of its probability, from `LOWEST` on."""


class Thresholds:
    """The smallest probability of a label that is learned, for every class; set anew after every epoch.

    That of a structure is `usual`, unless fewer than half of the voxels that the teacher gave to it in the last epoch
    reach that; then it is as low as half of them need. That of the background is at least `usual`, and as high as it
    takes to leave out the least sure 5 % of it.

    With one threshold for all, the voxels of a structure that is hard to tell are never learned, while the background
    is, and most of what the teacher misses of a structure with it: nearly every voxel is background, so 0.95 is no high
    probability there. That teaches the network that the structure is not there.
    Thresholds by class are those of FlexMatch (Zhang et al., NeurIPS 2021) and FreeMatch (Wang et al., ICLR 2023); here
    they are quantiles.

    For regions the two labels are absence, which is their background, and presence, region by region.

    Args:
        usual: Threshold of the structures that the teacher is sure of, and of all labels in the first epoch.
        outputs: Channels C of the network's output, or R regions.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        device: Of the outputs.

    Attributes:
        values: (C,) of the classes; (2 R,) of absence and presence of the first region, of the second, and so on.
    """

    def __init__(self, usual: float, outputs: int, regions: bool, device: torch.device) -> None:
        self.usual, self.regions = usual, regions
        labels = 2 * outputs if regions else outputs
        self.values = torch.full((labels,), usual, device=device)
        self._counts = torch.zeros(labels, BINS, device=device)
        self._background = torch.zeros(labels, dtype=torch.bool, device=device)
        self._background[slice(0, None, 2) if regions else 0] = True

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
        add_to_histogram(self._counts, which, ((torch.logit(probability, eps=1e-7) - LOWEST) / STEP).long())
        return PseudoLabels(target, probability >= self.values[which])

    def next_epoch(self, ddp: bool) -> None:
        """Set the thresholds by what was counted, over all processes; a label that was not given keeps its own."""
        if ddp:
            dist.all_reduce(self._counts)
        at_least = self._counts.flip(1).cumsum(1).flip(1)
        given = at_least[:, 0]
        # from which bin on at least half of the voxels lie, and from which on at most nearly all
        half = (at_least >= LEARNED * given[:, None]).sum(1) - 1
        nearly_all = (at_least > BACKGROUND_LEARNED * given[:, None]).sum(1)
        found = torch.sigmoid(LOWEST + STEP * torch.where(self._background, nearly_all, half))
        found = torch.where(self._background, found.clamp_min(self.usual), found.clamp_max(self.usual))
        self.values = torch.where(given > 0, found, self.values)
        self._counts = torch.zeros_like(self._counts)

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        return {"values": self.values.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        self.values = torch.tensor(state["values"], device=self.values.device)
