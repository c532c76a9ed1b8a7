"""Networks of nnU-Net's plans with and without KAF layers, and nnU-Net's training step, without any dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from synthetic import Layout, phases
from torch import Tensor, nn

from nnunetv2_kaf.config import FINEST_LEVEL, KAFConfig
from nnunetv2_kaf.fusion import Diffusion
from nnunetv2_kaf.plans import kaf_architecture


@dataclass(frozen=True)
class Case:
    """A network of nnU-Net's plans and what it is fed.

    Attributes:
        layout: Patch, spacing, planned batch, features and strides.
        classes: Background included.
        cpu_batch: Samples a step on a CPU; None where a CPU would take too long.
        batch_dice: Entry of the plans.
        arms: Names in `ARMS` that are compared unless asked otherwise.
    """

    layout: Layout
    classes: int
    cpu_batch: int | None
    batch_dice: bool = False
    arms: tuple[str, ...] = ("plain", "kaf")

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.layout.patch_size)

    def batch_size(self, device: torch.device, planned: bool) -> int | None:
        """Samples a step: as planned, or fewer on a CPU; None = not to be measured on this device."""
        return self.layout.batch_size if planned or device.type != "cpu" else self.cpu_batch


ARMS: dict[str, tuple[KAFConfig, str] | None] = {
    "plain": None,
    "kaf": (KAFConfig(), "auto"),
    "kaf_checkpointing": (KAFConfig(activation_checkpointing=True), "auto"),
    "paper": (KAFConfig.paper_code(), "auto"),
    "paper_sparse": (KAFConfig.paper_code(), "sparse"),
    "paper_dense": (KAFConfig.paper_code(), "dense"),
}
"""The layers, and how the fusion's convolutions are evaluated (see `Diffusion`); None = the plan's own network."""
PAPER_ARMS = ("paper", "paper_sparse", "paper_dense")
WITH_PAPER = ("plain", "kaf", "paper_sparse", "paper_dense")
_ISOTROPIC, _HEART = (1.0, 1.0, 1.0), (10.0, 1.5625, 1.5625)


def _halved(stages: int, dims: int = 3) -> tuple[tuple[int, ...], ...]:
    """The strides of an encoder that halves every axis between its stages."""
    return ((1,) * dims, *[(2,) * dims] * (stages - 1))


CASES = {
    "Hippocampus 2d": Case(
        Layout((40, 56, 40), _ISOTROPIC, (56, 40), 281, (32, 64, 128, 256), _halved(4, 2)), 3, 281, batch_dice=True
    ),
    "Hippocampus 2d, few slices": Case(
        Layout((40, 56, 40), _ISOTROPIC, (56, 40), 9, (32, 64, 128, 256), _halved(4, 2)), 3, 9, batch_dice=True
    ),
    "Hippocampus 3d_fullres": Case(
        Layout((40, 56, 40), _ISOTROPIC, (40, 56, 40), 7, (32, 64, 128, 256), _halved(4)), 3, 2, arms=WITH_PAPER
    ),
    "ACDC 2d": Case(
        Layout((10, 256, 224), _HEART, (256, 224), 56, (32, 64, 128, 256, 512, 512), _halved(6, 2)),
        4, 4, batch_dice=True,
    ),
    "ACDC 3d_fullres": Case(
        Layout(
            (10, 256, 224), _HEART, (10, 256, 224), 7, (32, 64, 128, 256, 320, 320),
            ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
        ),
        4, 1,
    ),
    "64^3": Case(
        Layout((64,) * 3, _ISOTROPIC, (64,) * 3, 1, (32, 64, 128, 256, 320), _halved(5)), 3, 1, arms=WITH_PAPER
    ),
    "128^3": Case(
        Layout((128,) * 3, _ISOTROPIC, (128,) * 3, 2, (32, 64, 128, 256, 320, 320), _halved(6)), 3, None,
        arms=WITH_PAPER,
    ),
}  # fmt: skip
"""The networks of nnU-Net 2.8's own plans for two public datasets, and of two cubes."""


def build(case: Case, arm: str, seed: int, device: torch.device) -> nn.Module:
    """Build the network of an arm with nnU-Net's own function.

    Args:
        case: The case whose network is built.
        arm: Name in `ARMS`.
        seed: Seed of the initialisation, the same in every arm.
        device: Device of the network.
    """
    plan = case.layout.plan()
    architecture, choice = plan["architecture"], ARMS[arm]
    if choice is not None:
        finest = 0 if arm in PAPER_ARMS else FINEST_LEVEL
        config = choice[0].planned(plan["patch_size"], architecture["arch_kwargs"]["n_stages"], finest)
        architecture = kaf_architecture(architecture, plan["spacing"], 1, config)
    # nnU-Net draws from the global generator
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network: nn.Module = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            1,
            case.classes,
            deep_supervision=True,
        )
    for module in network.modules():
        if isinstance(module, Diffusion) and choice is not None:
            module.evaluation = choice[1]
    return network.to(device)


class Batch(NamedTuple):
    """Input of a step.

    Attributes:
        data: (B, 1, *S) float32.
        targets: (B, 1, *S_l) int16 labels, one per output of the deep supervision, largest first.
    """

    data: Tensor
    targets: list[Tensor]


def make_batch(case: Case, size: int, seed: int, device: torch.device) -> Batch:
    """Draw smooth noise of three sizes, with about as many extrema as real scans, and labels of its intensities."""
    patch, spacing = case.layout.patch_size, case.layout.spacing
    if case.dims == 3:
        images = np.stack([phases(patch, spacing, [seed, sample])[0] for sample in range(size)])
    else:
        images = phases((size, *patch), spacing, [seed])[0][0][:, None]
    data = torch.from_numpy(images)
    limits = torch.quantile(data.flatten()[:: max(1, data.numel() // 10**6)], torch.linspace(0.5, 1, case.classes)[:-1])
    label = torch.bucketize(data, limits).to(torch.int16)
    targets, stride = [label], np.ones(case.dims, dtype=int)
    for step in case.layout.strides[1:-1]:
        stride = stride * step
        coarse: tuple[Any, ...] = (..., *(slice(None, None, int(s)) for s in stride))
        targets.append(label[coarse].contiguous())
    return Batch(data.to(device), [target.to(device) for target in targets])


def make_loss(case: Case, compiled: bool) -> nn.Module:
    """Build the loss as nnU-Net's trainer does: Dice and cross-entropy, half the weight at half the resolution."""
    dice = {"batch_dice": case.batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    if compiled:
        loss.dc = torch.compile(loss.dc)
    outputs = len(case.layout.strides) - 1
    weights = np.array([0.5**i for i in range(outputs)])
    weights[-1] = 0  # nnU-Net leaves the coarsest output out
    wrapped: nn.Module = DeepSupervisionWrapper(loss, weights / weights.sum())
    return wrapped


class TrainingStep:
    """nnU-Net's training step of one network on one batch.

    Args:
        network: Network to train, on its device.
        loss: Result of `make_loss`; compiled parts are shared between networks.
        batch: The same in every step.
        compiled: Whether to compile the network, nnU-Net's default on CUDA.
    """

    def __init__(self, network: nn.Module, loss: nn.Module, batch: Batch, compiled: bool) -> None:
        self.eager = network
        self.network: Any = torch.compile(network) if compiled else network
        self.loss, self.batch = loss, batch
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
        self.scaler = torch.amp.GradScaler("cuda") if batch.data.is_cuda else None

    def __call__(self) -> float:
        """Do one step and return the loss."""
        return self.step(self.network)

    def step(self, network: Any) -> float:
        """Do one step with the network as it is, or compiled."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if self.scaler is not None else contextlib.nullcontext():
            loss: Tensor = self.loss(network(self.batch.data), self.batch.targets)
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.eager.parameters(), 12)
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.eager.parameters(), 12)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return float(loss.detach())

    def alive(self) -> list[Tensor]:
        """What lives between two steps, gradients left out: the next step frees them first."""
        state: Mapping[Any, Mapping[str, Any]] = self.optimizer.state
        moments = [value for one in state.values() for value in one.values() if isinstance(value, Tensor)]
        held: Sequence[Tensor] = [*self.eager.parameters(), *self.eager.buffers()]
        return [*held, *moments, self.batch.data, *self.batch.targets]
