"""One training step: the unlabelled batch as the network sees it, and the network that learns from it first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semisupervised.cut_mix import box_mask, cut_mix
from semisupervised.losses import PseudoLabels
from semisupervised.strong import strong_view


class UnlabelledFirst(nn.Module):
    """The network in one training step: learns from unlabelled patches, then sees the labelled ones.

    Args:
        network: Compiled or wrapped as it is trained.
        learn: Called with the network before each pass.
    """

    def __init__(self, network: nn.Module, learn: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.network, self.learn = network, learn
        self.output: Tensor | None = None

    def forward(self, image: Tensor) -> Any:
        """The network's output; the finest one stays in `output`."""
        self.learn(self.network)
        output = self.network(image)
        self.output = (output[0] if isinstance(output, (list, tuple)) else output).detach()
        return output


@torch.no_grad()
def strong_batch(
    weak: Tensor, labels: PseudoLabels, batch: Mapping[str, Any], masked: Sequence[int], flat_axis: bool
) -> tuple[Tensor, PseudoLabels]:
    """The strong view of a batch, with boxes exchanged between its patches, and the labels moved along.

    Args:
        weak: (n, C, *S) the weak view, which the teacher has labelled.
        labels: Its labels.
        batch: Entries `intensity`, `seeds`, `boxes` and `partners` of `UnlabelledPatches`, in main memory.
        masked: Channels that nnU-Net normalises within a mask: they stay 0 where they are 0.
        flat_axis: See `strong_view`.

    Returns:
        (m, C, *S) and labels of the same patches, m being the number of boxes.
    """
    strong = strong_view(weak, batch["intensity"], batch["seeds"], flat_axis)
    if masked:
        strong[:, masked] = strong[:, masked].masked_fill(weak[:, masked] == 0, 0)
    inside = box_mask(batch["boxes"], tuple(weak.shape[2:]), weak.device)
    partners = batch["partners"].to(weak.device, non_blocking=True)
    strong, target, sure = cut_mix(inside, partners, strong, labels.target, labels.sure)
    return strong, PseudoLabels(target, sure)
