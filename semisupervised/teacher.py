"""The teacher: an exponential moving average of the network's weights (Tarvainen and Valpola, NeurIPS 2017)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Teacher:
    """A network whose weights follow those of another one.

    Args:
        student: The network, not wrapped; copied.
        decay: Share of the old weights that stays in each update.
        compiled: Compile the teacher with torch.compile.
    """

    def __init__(self, student: nn.Module, decay: float, compiled: bool = False) -> None:
        self.decay = decay
        self.network: nn.Module = copy.deepcopy(student).requires_grad_(False).eval()
        decoder: nn.Module = self.network.get_submodule("decoder")
        decoder.deep_supervision = False  # type: ignore[assignment]  # only the finest output is needed
        self._forward = torch.compile(self.network) if compiled else self.network
        self._own, self._theirs = _distinct(self.network), _distinct(student)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """The logits (B, C, *S) of a batch."""
        logits: Tensor = self._forward(image)
        return logits

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the student after its step number `step`, counted from 0.

        The first steps average less, so that the random first weights are soon forgotten: the share that stays is at
        most `step / (step + 1)`, which makes the teacher the mean of all students so far.
        """
        decay = min(self.decay, step / (step + 1))
        floating = [(a, b) for a, b in zip(self._own, self._theirs, strict=True) if a.is_floating_point()]
        own, theirs = [a for a, _ in floating], [b for _, b in floating]
        torch._foreach_lerp_(own, theirs, 1 - decay)
        for a, b in zip(self._own, self._theirs, strict=True):
            if not a.is_floating_point():
                a.copy_(b)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, by the names of the network."""
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights saved by `state_dict`."""
        self.network.load_state_dict(dict(state))


def _distinct(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once (an encoder convolution has several names)."""
    return [*(p.data for p in network.parameters()), *network.buffers()]
