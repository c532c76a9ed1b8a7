"""How much of each structure labelled patches show: the measure of what the teacher may give to it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from nnunetv2_kaf.errors import KAFError


class Amounts:
    """Counts the voxels of every structure in the labelled patches, case by case.

    Args:
        structures: Foreground classes, or regions, of the network.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        cases: Identifiers of the labelled training cases.
        device: Of the references.
    """

    def __init__(self, structures: int, regions: bool, cases: Sequence[str], device: torch.device) -> None:
        self.structures, self.regions = structures, regions
        self.cases = sorted(cases)
        # of every case its voxels that are not ignored (of regions: counted for each), and those of every structure:
        # before this epoch, and in it
        self._before = torch.zeros(len(self.cases), 1 + structures, dtype=torch.int64, device=device)
        self._now = torch.zeros_like(self._before)

    @torch.no_grad()
    def learn(self, reference: Tensor, keys: Sequence[str]) -> None:
        """Count a labelled batch.

        Args:
            reference: nnU-Net's target: (B, 1, *S) classes, or (B, R, *S) regions with one channel more if there is an
                ignore label; what is ignored does not count.
            keys: B identifiers of cases.
        """
        for patch, key in zip(reference, keys, strict=True):
            if self.regions:
                counted = (patch[self.structures :] == 0).all(0)
                present = (patch[: self.structures] > 0) & counted
                voxels = [counted.sum(), *present.flatten(1).sum(1)]
            else:  # nnU-Net's ignore label is the highest one
                sizes = torch.bincount(patch.long().clamp_min(0).flatten(), minlength=self.structures + 1)
                voxels = [sizes[: self.structures + 1].sum(), *sizes[1 : self.structures + 1]]
            self._now[self.cases.index(str(key))] += torch.stack(voxels)

    def next_epoch(self, ddp: bool, times: float) -> Tensor:
        """Add the epoch's counts, of all processes, to those before it.

        Args:
            ddp: Whether there are several processes.
            times: At least so many times the largest share of a case is allowed.

        Returns:
            (structures,) the share of the voxels that may be given to each structure: the largest share in the labelled
            patches of a case so far, times `times`, or times the largest by the smallest share if that is more. So what
            differs much between the labelled cases may differ as much beyond them. Infinite for a structure that is
            not in all of them.
        """
        if ddp:
            dist.all_reduce(self._now)
        self._before += self._now
        self._now.zero_()
        shares = self._before[:, 1:] / self._before[:, :1].clamp_min(1)
        most, least = shares.amax(0), shares.amin(0)
        return torch.where(least > 0, most * (most / least).clamp_min(times), torch.inf)

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        return {"cases": self.cases, "voxels": self._before.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`.

        Raises:
            KAFError: It is that of other labelled cases.
        """
        lost, new = sorted(set(state["cases"]) - set(self.cases)), sorted(set(self.cases) - set(state["cases"]))
        if lost or new:
            parts = [f"{what} {', '.join(cases)}" for what, cases in (("without", lost), ("with", new)) if cases]
            raise KAFError(
                f"the labelled training cases of this fold: found them {' and '.join(parts)}, expected those that the "
                "training began with. splits_final.json has changed since, or for fold all the preprocessed cases: "
                "undo that to continue, or train again without --c."
            )
        self._before = torch.tensor(state["voxels"], dtype=torch.int64, device=self._before.device)
