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
LOWEST, STEP, BINS = -6.0, 0.1, 460
"""The voxels of every label are counted in bins of the log odds of its probability, from `LOWEST` on."""
CERTAIN = 219
"""Bin from which on a probability is 1 in single precision."""
RECENT = 0.75
"""What was given before counts this much less with every `Thresholds.refresh`."""


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
    background, or left out of the loss where its second guess is another structure. With few labelled cases the teacher
    takes places that these do not show, like the chest beside labelled heads, for structures. The network learns that,
    and its next teacher finds more of them. So a structure may grow tenfold, while the teacher is sure of it and right
    in the labelled patches.

    For regions the two labels are absence, which is their background, and presence, region by region.

    Args:
        usual: Threshold of the structures that the teacher is sure of, and of all labels in the first epoch.
        outputs: Channels C of the network's output, or R regions.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        device: Of the outputs.

    Attributes:
        values: (C,) of the classes; (2 R,) of absence and presence of the first region, of the second, and so on.
        excess: Below these log odds a label of a structure is excess; as `values`, minus infinity where there is none.
        most: (C - 1,) or (R,) share of the voxels that may be given to each structure.
    """

    def __init__(self, usual: float, outputs: int, regions: bool, device: torch.device) -> None:
        self.usual, self.regions = usual, regions
        labels = 2 * outputs if regions else outputs
        self.values = torch.full((labels,), usual, device=device)
        self.excess = torch.full((labels,), -torch.inf, device=device)
        # labels given since the last refresh, in this epoch before it, and lately, the older the less
        self._since, self._epoch, self._recent = (torch.zeros(labels, BINS, device=device) for _ in range(3))
        self._removed = torch.zeros((), device=device)
        self._background = torch.zeros(labels, dtype=torch.bool, device=device)
        self._background[slice(0, None, 2) if regions else 0] = True
        self.most = torch.full((int((~self._background).sum()),), torch.inf, device=device)

    @torch.no_grad()
    def label(self, logits: Tensor) -> PseudoLabels:
        """Label voxels by the teacher's output, and count how sure it is.

        Args:
            logits: (B, C, *S) classes, or (B, R, *S) regions.
        """
        target, probability = hard_labels(logits, self.regions)
        which = target.long()
        if self.regions:
            odds = logits.float().abs()
            which = which + 2 * torch.arange(which.shape[1], device=which.device).view(-1, *[1] * (which.ndim - 2))
        else:
            others = logits.float().scatter(1, target, -torch.inf)
            odds = logits.float().gather(1, target) - others.logsumexp(1, keepdim=True)
        bins = ((odds - LOWEST) / STEP).long().clamp(0, BINS - 1)
        place = which * BINS + bins
        # whole numbers: the order of the sum does not matter
        counts = torch.zeros(self._since.numel(), dtype=torch.int32, device=place.device)
        counts.scatter_add_(0, place.flatten(), torch.ones_like(place, dtype=torch.int32).flatten())
        self._since += counts.view_as(self._since)
        excess = odds < self.excess[which]
        self._removed += excess.sum()
        if self.regions:
            background = ~((target > 0) & ~excess).any(1, keepdim=True)
        else:
            background = others[:, :1] >= others.amax(1, keepdim=True)
        learned = torch.where(excess, background, probability >= self.values[which])
        return PseudoLabels(target.masked_fill(excess, 0), learned)

    def refresh(self, ddp: bool) -> None:
        """Judge anew what is excess, by what was given lately, over all processes.

        To be called so often that the teacher does not change much in between.
        """
        if ddp:
            dist.all_reduce(self._since)
        self._epoch += self._since
        self._recent = RECENT * self._recent + self._since
        self._since = torch.zeros_like(self._since)
        at_least, voxels = _at_least(self._recent), self._voxels(self._recent)
        allowed = (
            torch.full_like(voxels, torch.inf)
            .expand(len(at_least))
            .masked_scatter(~self._background, (self.most * voxels).to(voxels))
        )
        beyond = (at_least > allowed[:, None]).sum(1)
        self.excess = torch.where(beyond > 0, LOWEST + STEP * beyond, -torch.inf)

    def next_epoch(self, ddp: bool, most: Tensor) -> dict[str, Any]:
        """Set the thresholds by what was counted, over all processes; a label that was not given keeps its own.

        Args:
            ddp: Whether there are several processes.
            most: Share of the voxels that may be given to each structure from now on.

        Returns:
            given: share of all voxels that the teacher gave to each structure in this epoch; excess: share of the
            excess in these voxels of all structures.
        """
        self.most = most
        self.refresh(ddp)
        if ddp:
            dist.all_reduce(self._removed)
        at_least = _at_least(self._epoch)
        given = at_least[:, 0]
        # from which bin on at least half of the voxels lie, and from which on at most nearly all
        half = (at_least >= LEARNED * given[:, None]).sum(1) - 1
        nearly_all = (at_least > BACKGROUND_LEARNED * given[:, None]).sum(1)
        bins = torch.where(self._background, nearly_all, half).clamp_max(CERTAIN)
        found = torch.sigmoid(LOWEST + STEP * bins)
        found = torch.where(self._background, found.clamp_min(self.usual), found.clamp_max(self.usual))
        self.values = torch.where(given > 0, found, self.values)
        structures = given[~self._background]
        record = {
            "given": (structures / self._voxels(self._epoch).clamp_min(1)).tolist(),
            "excess": float(self._removed / structures.sum().clamp_min(1)),
        }
        self._epoch, self._removed = torch.zeros_like(self._epoch), torch.zeros_like(self._removed)
        return record

    def _voxels(self, counts: Tensor) -> Tensor:
        """How many voxels were counted; every region has labels of its own."""
        return counts.sum() / (len(self.most) if self.regions else 1)

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        names = ("values", "excess", "most", "recent")
        return dict(zip(names, (v.tolist() for v in (self.values, self.excess, self.most, self._recent)), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        device = self.values.device
        self.values, self.excess, self.most, self._recent = (
            torch.tensor(state[name], device=device) for name in ("values", "excess", "most", "recent")
        )


def _at_least(counts: Tensor) -> Tensor:
    """(labels, bins) voxels in this bin or a higher one."""
    return counts.flip(1).cumsum(1).flip(1)
