"""Step and epoch: batch -> embeddings -> losses -> update."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.precision import autocast
from pretraining import distributed
from pretraining.config import PretrainConfig
from pretraining.objectives.losses import PretrainingLoss
from pretraining.objectives.model import PretrainingModel
from pretraining.pairs.batch import Batch


@dataclass
class TrainingState:
    """What changes during a run, and what a checkpoint must hold.

    Attributes:
        network: The full network; its encoder is part of `model`.
        model: Encoder and heads.
        optimizer: Over the parameters of `model`.
        scaler: Loss scaling, active for float16 only.
        step: Optimiser steps done.
        sums: Sums of the metrics over the steps of an unfinished epoch.
        history: One record before training (monitoring only) and one per epoch.
    """

    network: nn.Module
    model: PretrainingModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
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
    """The rate of a step: linear warm-up over the first share of all steps, then cosine to 0."""
    total = config.epochs * config.iterations
    warm = round(config.warmup * total)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 where a CUDA device has it, else float16; none on other devices.

    Before compute capability 8 torch emulates bfloat16, slowly.
    """
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class Trainer:
    """Runs epochs of one configuration on one device, or its share of them as one of several processes.

    Args:
        state: Changed in place.
        config: Options.
        patch_size: Shape of the views.
        device: Device of the model.
        failure_file: JSON written when the loss is not finite.
        compiled: Compile the model with `torch.compile`.
    """

    def __init__(
        self,
        state: TrainingState,
        config: PretrainConfig,
        patch_size: tuple[int, ...],
        device: torch.device,
        failure_file: Path,
        compiled: bool = False,
    ) -> None:
        """Set up the loss, the precision and the processes."""
        self.state = state
        self.config = config
        self.patch_size = patch_size
        self.device = device
        self.failure_file = failure_file
        self.dtype = amp_dtype(device)
        self.loss = PretrainingLoss(config)
        self.forward: nn.Module = state.model
        if compiled:
            self.forward = torch.compile(state.model)  # type: ignore[assignment]
        if distributed.world_size() > 1:
            devices = [device.index] if device.type == "cuda" else None
            # Without the bottleneck's loss nothing reaches the last stage.
            unused = "bottleneck" not in config.components
            self.forward = DistributedDataParallel(self.forward, device_ids=devices, find_unused_parameters=unused)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch on the device, "total" with a graph, and the share of matched keypoints.

        All are values of the global batch, the same on every process.
        """
        views = batch.rendered(self.patch_size)
        with autocast(self.device.type, self.dtype):
            out = self.forward(views, batch.keypoints)
        values: dict[str, Tensor] = self.loss(out, batch.matches, batch.positions, batch.places)
        counts = torch.stack([(batch.matches >= 0).sum(), batch.keypoints.valid.chunk(2)[0].sum()]).float()
        matched, shown = distributed.sum_over_ranks(counts)
        return {**values, "matched": matched / shown.clamp_min(1)}

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Do one optimiser step on the next `accumulate` batches.

        Returns:
            The losses and the share of matched keypoints, means over the batches.

        Raises:
            KAFError: If the loss or the gradient is not finite; the cases are in `failure_file`.
        """
        state, config = self.state, self.config
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, config)
        state.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        cases: list[str] = []
        for part in range(config.accumulate):
            batch = next(batches)
            cases += batch.cases
            # Gradients are averaged over the processes once, with the last batch.
            wait = part + 1 < config.accumulate and isinstance(self.forward, DistributedDataParallel)
            with self.forward.no_sync() if wait else nullcontext():  # type: ignore[operator]
                metrics = self.compute(batch.to(self.device))
                values = torch.stack(list(metrics.values())).tolist()
                for name, value in zip(metrics, values, strict=True):
                    sums[name] = sums.get(name, 0.0) + value / config.accumulate
                if not math.isfinite(sums["total"]):
                    self._fail("loss", cases, sums)
                torch.autograd.backward(state.scaler.scale(metrics["total"] / config.accumulate))
        state.scaler.unscale_(state.optimizer)
        norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm))
        # With loss scaling an overflow is expected now and then; the scaler skips that step itself.
        if not math.isfinite(norm) and not state.scaler.is_enabled():
            self._fail("gradient", cases, sums)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        return sums

    def epoch(self, batches: Iterator[Batch], stop: Callable[[], bool]) -> dict[str, float] | None:
        """Run the rest of the current epoch; on a terminal a bar shows the time left of the whole run.

        Args:
            batches: All batches from the current step on.
            stop: Asked after every step; the epoch then ends early, its sums stay in the state.

        Returns:
            The means of the epoch and its last learning rate, or `None` if it was stopped.
        """
        config, state = self.config, self.state
        state.model.train()
        epoch, done = divmod(state.step, config.iterations)
        # Over all epochs, so that the time left is that of the run; None: on a terminal only.
        with tqdm(
            total=config.epochs * config.iterations,
            initial=state.step,
            desc=f"epoch {epoch + 1}/{config.epochs}",
            leave=False,
            unit="step",
            disable=True if distributed.rank() > 0 else None,
        ) as bar:
            while done < config.iterations:
                for name, value in self.step(batches).items():
                    state.sums[name] = state.sums.get(name, 0.0) + value
                done += 1
                text = " ".join(f"{k}={v / done:.3f}" for k, v in state.sums.items())
                bar.set_postfix_str(text, refresh=False)
                bar.update()
                if distributed.any_rank(stop(), self.device) and done < config.iterations:
                    return None
        record = {name: value / config.iterations for name, value in state.sums.items()}
        state.sums = {}
        return {"epoch": epoch + 1.0, **record, "learning_rate": learning_rate(state.step - 1, config)}

    def _fail(self, what: str, cases: list[str], values: dict[str, float]) -> None:
        """Write the cases of a batch whose loss or gradient is not finite, and stop."""
        everywhere = sorted(set(distributed.gather_names(cases)))
        record = {"step": self.state.step, "cases": everywhere, "losses": {k: str(v) for k, v in values.items()}}
        if distributed.rank() == 0:
            self.failure_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        raise KAFError(
            f"The {what} is not finite in step {self.state.step}, cases {', '.join(everywhere)} (saved to "
            f"{self.failure_file}). Look at these images for extreme values, or lower --learning-rate; then continue "
            "from the last good checkpoint with --continue (same options) or start again."
        )
