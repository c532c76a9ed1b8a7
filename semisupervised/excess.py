"""Excess among the teacher's labels: more of a structure than the labelled patches give reason for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from semisupervised.histogram import add_to_histogram
from semisupervised.losses import PseudoLabels

STEP, BINS = 0.1, 400
"""Voxels are counted in bins of how sure the teacher is, from 0 on; all above 40 are in the last one, and never cut."""
HALF_LIFE = 60
"""Steps after which what was given counts half, about as long as the teacher remembers."""


class Excess:
    """Takes voxels away from a structure that the teacher gives to more voxels than it may: those it is least sure of.

    With few labelled cases the teacher takes places that these do not show, like the chest beside labelled heads, for
    structures. The network learns that, and its next teacher finds more of them. So a structure may grow many
    times over, while the teacher is sure of it and right in the labelled patches. Excess is taught as background,
    unless the teacher's second guess is another structure that is within its limit: there it is left out of the loss.

    How sure the teacher is of a class is how far its logit is above that of the second guess; of a region, its logit.
    The absence of a region is left out of the loss where another region stays, which may be a part of it.

    Args:
        structures: Foreground classes, or regions, of the network.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        device: Of the outputs.

    Attributes:
        most: (structures,) share of the voxels that may be given to each; set after every epoch, infinite at first.
        cut: (1 + structures,) how sure the teacher has to be; minus infinity where there is no excess, and for the
            background, which is first.
    """

    def __init__(self, structures: int, regions: bool, device: torch.device) -> None:
        self.structures, self.regions = structures, regions
        self.most = torch.full((structures,), torch.inf, device=device)
        self.cut = torch.full((1 + structures,), -torch.inf, device=device)
        # voxels of the background and the structures: since the last refresh, in this epoch before it, and lately
        self._since, self._epoch, self._recent = (torch.zeros(1 + structures, BINS, device=device) for _ in range(3))
        self._removed = torch.zeros((), device=device)
        self._steps = 0

    @torch.no_grad()
    def remove(self, logits: Tensor, labels: PseudoLabels) -> PseudoLabels:
        """Labels without excess; counts them.

        Args:
            logits: The teacher's, (B, C, *S) classes, or (B, R, *S) regions.
            labels: Of these logits, islands taken out; not changed.
        """
        logits, target = logits.float(), labels.target
        if self.regions:
            sure = logits
            which = target.long() * torch.arange(1, 1 + self.structures, device=target.device).view(
                -1, *[1] * (target.ndim - 2)
            )
        else:
            others = logits.scatter(1, target, -torch.inf)
            sure = logits.gather(1, target) - others.amax(1, keepdim=True)
            which = target
        add_to_histogram(self._since, which, (sure / STEP).nan_to_num(0).clamp(0, BINS - 1).long())
        self._steps += 1
        excess = sure < self.cut[which]
        self._removed += excess.sum()
        if self.regions:
            background = ~((target > 0) & ~excess).any(1, keepdim=True)
        else:
            beyond = torch.isfinite(self.cut).view(1, -1, *[1] * (logits.ndim - 2))
            background = others[:, :1] >= others.masked_fill(beyond, -torch.inf).amax(1, keepdim=True)
        return PseudoLabels(target.masked_fill(excess, 0), torch.where(excess, background, labels.sure))

    def refresh(self, ddp: bool) -> None:
        """Judge anew what is excess, by what was given lately, over all processes.

        To be called so often that the teacher does not change much in between.
        """
        if self._steps == 0:
            return
        if ddp:
            dist.all_reduce(self._since)
        self._epoch += self._since
        self._recent = 0.5 ** (self._steps / HALF_LIFE) * self._recent + self._since
        self._since, self._steps = torch.zeros_like(self._since), 0
        self._judge()

    def next_epoch(self, ddp: bool, most: Tensor) -> dict[str, Any]:
        """Set new limits.

        Args:
            ddp: Whether there are several processes.
            most: See the attribute.

        Returns:
            given: share of all voxels that was given to each structure in this epoch, before the excess was taken out;
            excess: its share of the voxels of all structures.
        """
        self.refresh(ddp)
        if ddp:
            dist.all_reduce(self._removed)
        self.most = most
        self._judge()
        given = self._epoch[1:].sum(1)
        record = {
            "given": (given / self._voxels(self._epoch).clamp_min(1)).tolist(),
            "excess": float(self._removed / given.sum().clamp_min(1)),
        }
        self._epoch, self._removed = torch.zeros_like(self._epoch), torch.zeros_like(self._removed)
        return record

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        return {"most": self.most.tolist(), "recent": self._recent.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        self.most, self._recent = (torch.tensor(state[name], device=self.cut.device) for name in ("most", "recent"))
        self._judge()

    def _judge(self) -> None:
        at_least = self._recent[1:].flip(1).cumsum(1).flip(1)
        beyond = (at_least > (self.most * self._voxels(self._recent))[:, None]).sum(1).clamp_max(BINS - 1)
        self.cut[1:] = torch.where(beyond > 0, STEP * beyond, -torch.inf)

    def _voxels(self, counts: Tensor) -> Tensor:
        """How many voxels were counted; of regions each one was counted for every region."""
        return counts.sum() / (self.structures if self.regions else 1)
