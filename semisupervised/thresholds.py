"""Which of the teacher's labels the network learns, by how sure the teacher is of them: class by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

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

    If the teacher gives a structure to more voxels than it may, the least sure of them are excess: they are taught as
    background. With few labelled cases the teacher takes places that these do not show, like the chest beside labelled
    heads, for structures. The network learns that, and its next teacher finds more of them. So a structure may grow
    tenfold, while the teacher is sure of it and right in the labelled patches.

    For regions the two labels are absence, which is their background, and presence, region by region.

    Args:
        usual: Threshold of the structures that the teacher is sure of, and of all labels in the first epoch.
        outputs: Channels C of the network's output, or R regions.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        device: Of the outputs.

    Attributes:
        values: (C,) of the classes; (2 R,) of absence and presence of the first region, of the second, and so on.
        excess: Below this probability a label of a structure is excess; as `values`, 0 where there is none.
    """

    def __init__(self, usual: float, outputs: int, regions: bool, device: torch.device) -> None:
        self.usual, self.regions = usual, regions
        labels = 2 * outputs if regions else outputs
        self.values = torch.full((labels,), usual, device=device)
        self.excess = torch.zeros(labels, device=device)
        self._counts = torch.zeros(labels, BINS, device=device)
        self._removed = torch.zeros((), device=device)
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
        bins = ((torch.logit(probability, eps=1e-7) - LOWEST) / STEP).long().clamp(0, BINS - 1)
        place = which * BINS + bins
        # whole numbers: the order of the sum does not matter
        counts = torch.zeros(self._counts.numel(), dtype=torch.int32, device=place.device)
        counts.scatter_add_(0, place.flatten(), torch.ones_like(place, dtype=torch.int32).flatten())
        self._counts += counts.view_as(self._counts)
        excess = probability < self.excess[which]
        self._removed += excess.sum()
        return PseudoLabels(target.masked_fill(excess, 0), (probability >= self.values[which]) | excess)

    def next_epoch(self, ddp: bool, most: Tensor) -> float:
        """Set the thresholds by what was counted, over all processes; a label that was not given keeps its own.

        Args:
            ddp: Whether there are several processes.
            most: Largest share of the voxels that the teacher may give to each structure, which is no excess.

        Returns:
            Share of the excess in the voxels that the teacher gave to structures in this epoch.
        """
        if ddp:
            dist.all_reduce(self._counts)
            dist.all_reduce(self._removed)
        structures = ~self._background
        at_least = self._counts.flip(1).cumsum(1).flip(1)
        given = at_least[:, 0]
        # from which bin on at least half of the voxels lie, and from which on at most nearly all
        half = (at_least >= LEARNED * given[:, None]).sum(1) - 1
        nearly_all = (at_least > BACKGROUND_LEARNED * given[:, None]).sum(1)
        found = torch.sigmoid(LOWEST + STEP * torch.where(self._background, nearly_all, half))
        found = torch.where(self._background, found.clamp_min(self.usual), found.clamp_max(self.usual))
        self.values = torch.where(given > 0, found, self.values)
        # the surest ones always stay, however many they are
        voxels = given.sum() / (len(most) if self.regions else 1)  # every region has labels of its own
        allowed = torch.full_like(given, torch.inf).masked_scatter(structures, (most * voxels).to(given))
        beyond = (at_least > allowed[:, None]).sum(1).clamp_max(BINS - 1)
        self.excess = torch.where(beyond > 0, torch.sigmoid(LOWEST + STEP * beyond), torch.zeros_like(self.excess))
        removed = float(self._removed / given[structures].sum().clamp_min(1))
        self._counts, self._removed = torch.zeros_like(self._counts), torch.zeros_like(self._removed)
        return removed

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        return {"values": self.values.tolist(), "excess": self.excess.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        self.values = torch.tensor(state["values"], device=self.values.device)
        self.excess = torch.tensor(state["excess"], device=self.excess.device)
