"""Step and epoch: batch -> embeddings -> matches -> losses -> update."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.keypoints import Keypoints
from nnunetv2_kaf.unet import KAFUNet
from pretraining.batch import Batch
from pretraining.config import PretrainConfig
from pretraining.correspondences import UNMATCHED, match_by_descriptor, match_by_transform, patch_descriptors
from pretraining.losses import PretrainingLoss
from pretraining.model import PretrainingModel
from pretraining.views import inside, source_coordinates

logger = logging.getLogger(__name__)

DEFAULT_RADIUS_VOXELS = 2.0
DEFAULT_SEARCH_VOXELS = 8.0
METRICS = ("total", "bottleneck", "keypoints", "local", "matched")


@dataclass
class TrainingState:
    """What changes during a run, and what a checkpoint must hold.

    Attributes:
        network: the full network; its encoder is part of ``model``.
        model: encoder and heads.
        optimizer: over the parameters of ``model``.
        scaler: loss scaling, active for float16 only.
        epoch: epochs done.
        history: per epoch, the mean of `METRICS` and the learning rate at its end.
    """

    network: KAFUNet
    model: PretrainingModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """Build the optimiser that the options name."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(config.momentum, 0.999), weight_decay=config.weight_decay
    )


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Return the rate of a step: linear warm-up over the first share of all steps, then cosine to 0."""
    total = config.epochs * config.iterations
    warm = round(config.warmup * total)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """Return the autocast type: bfloat16 where a CUDA device has it, else float16; none on other devices."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def correspond(
    batch: Batch, points: Keypoints, spacing: tuple[float, ...], config: PretrainConfig
) -> tuple[Tensor, Tensor]:
    """Match the keypoints of the two views of each pair.

    Pairs of views of the same voxels are matched by their transforms, neighbouring slices by appearance.

    Args:
        batch: on the device of the points.
        points: detected in ``batch.views``, 2B views.
        spacing: voxel size in mm.
        config: radii.

    Returns:
        matches (B, K) long, and usable (2B, K) bool: the valid keypoints that show a voxel of the source image.
    """
    source = source_coordinates(batch.grids, points.coords.float())
    usable = points.valid & inside(source, batch.extents)
    mm = torch.tensor(spacing, device=source.device, dtype=torch.float32)
    finest = min(spacing)
    radius = DEFAULT_RADIUS_VOXELS * finest if config.radius_mm is None else config.radius_mm
    one, two = source.chunk(2)
    usable_one, usable_two = usable.chunk(2)
    matches = match_by_transform(one, two, usable_one, usable_two, mm, radius)
    if batch.references is None:
        return matches, usable
    search = DEFAULT_SEARCH_VOXELS * finest if config.search_radius_mm is None else config.search_radius_mm
    described = patch_descriptors(batch.references, source - batch.origins.unsqueeze(1), mm, step_mm=finest)
    first, second = described.chunk(2)
    similar = match_by_descriptor(one, two, usable_one, usable_two, first, second, mm, search)
    return torch.where(batch.known_transform.unsqueeze(1), matches, similar), usable


class Trainer:
    """Runs epochs of one configuration on one device.

    Args:
        state: changed in place.
        config: options.
        spacing: voxel size in mm.
        device: where the model is.
        failure_file: JSON written when the loss is not finite.
    """

    def __init__(
        self,
        state: TrainingState,
        config: PretrainConfig,
        spacing: tuple[float, ...],
        device: torch.device,
        failure_file: Path,
    ) -> None:
        """Set up the loss and the precision."""
        self.state = state
        self.config = config
        self.spacing = spacing
        self.device = device
        self.failure_file = failure_file
        self.dtype = amp_dtype(device)
        self.loss = PretrainingLoss(
            temperature=config.temperature,
            position_threshold=config.position_threshold,
            weight_bottleneck=config.weight_bottleneck,
            weight_keypoints=config.weight_keypoints,
            weight_local=config.weight_local,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def compute(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss (with a graph) and all `METRICS` (detached) of a batch on the device."""
        with self._autocast():
            out = self.state.model(batch.views)
        matches, usable = correspond(batch, out.points, self.spacing, self.config)
        parts = self.loss(out.bottleneck, out.keypoints, out.descriptors, usable, matches, batch.positions)
        found = (matches != UNMATCHED).sum() / usable.chunk(2)[0].sum().clamp_min(1)
        metrics = {name: value.detach() for name, value in parts._asdict().items()}
        return parts.total, {**metrics, "matched": found}

    def step(self, batch: Batch, index: int) -> dict[str, float]:
        """Do one optimiser step.

        Args:
            batch: from the loader.
            index: number of the step since the start of the run; determines the learning rate.

        Returns:
            The `METRICS`.

        Raises:
            KAFError: if the loss or the gradient is not finite; the batch's cases are in ``failure_file``.
        """
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate(index, self.config)
        total, metrics = self.compute(batch.to(self.device))
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["total"]):
            self._fail("loss", batch, index, values)
        self.state.optimizer.zero_grad(set_to_none=True)
        scaler = self.state.scaler
        torch.autograd.backward(scaler.scale(total))
        scaler.unscale_(self.state.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.state.model.parameters(), self.config.clip_norm))
        # With loss scaling an overflow is expected now and then; the scaler skips that step itself.
        if not math.isfinite(norm) and not scaler.is_enabled():
            self._fail("gradient", batch, index, values)
        scaler.step(self.state.optimizer)
        scaler.update()
        return values

    def epoch(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Run one epoch, show a progress bar, append to the history and return the epoch's means."""
        config, state = self.config, self.state
        state.model.train()
        sums = dict.fromkeys(METRICS, 0.0)
        first = state.epoch * config.iterations
        interactive = sys.stderr.isatty()
        with tqdm(
            total=config.iterations,
            desc=f"epoch {state.epoch + 1}/{config.epochs}",
            leave=False,
            mininterval=0.1 if interactive else 30,
        ) as bar:
            for done, batch in enumerate(batches, start=1):
                values = self.step(batch, first + done - 1)
                for name in METRICS:
                    sums[name] += values[name]
                bar.set_postfix_str(" ".join(f"{k}={v / done:.3f}" for k, v in sums.items()), refresh=False)
                bar.update()
        record = {name: value / config.iterations for name, value in sums.items()}
        record["learning_rate"] = learning_rate(first + config.iterations - 1, config)
        state.epoch += 1
        state.history.append(record)
        return record

    def _fail(self, what: str, batch: Batch, index: int, values: dict[str, float]) -> None:
        """Write the cases of a batch whose loss or gradient is not finite, and stop."""
        record = {"step": index, "cases": list(batch.cases), "losses": {k: str(v) for k, v in values.items()}}
        self.failure_file.write_text(json.dumps(record, indent=2) + "\n")
        raise KAFError(
            f"The {what} is not finite in step {index}, cases {', '.join(batch.cases)} (saved to {self.failure_file}). "
            "Look at these images for extreme values, or lower --learning-rate; then continue from the last good "
            "checkpoint with --continue (same options) or start again."
        )
