"""How busy pretraining keeps a device: real steps, with the batches made as in a run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import load_average

from pretraining.cli import build_parser
from pretraining.config import PretrainConfig
from pretraining.loop import Trainer
from pretraining.pairs.batch import Batch
from pretraining.prepare import DataOptions, prepare
from pretraining.run import build_state, default_batch_size
from pretraining.task import Task

SHARE = (
    "time between CUDA events recorded when a batch has arrived and after the step that used it, summed over the steps "
    "and divided by the wall time, which includes waiting for batches; gaps within a step count as busy"
)


def train(task: Task, config: PretrainConfig, steps: int, device: torch.device) -> dict[str, Any]:
    """Train at the default batch with the default workers and measure how busy the device is."""
    workers = int(build_parser().get_default("num_workers"))
    batch_size = default_batch_size(task.batch_size)
    loader = prepare(task, config, DataOptions(fold="all", num_workers=workers), device, batch_size).loader
    with tempfile.TemporaryDirectory() as folder:
        state = build_state(task, config, device)
        trainer = Trainer(state, config, task.patch_size, device, Path(folder) / "nonfinite.json")
        state.model.train()
        warmup = max(1, steps // 5)
        measured = busy(trainer, loader.batches(0, warmup + steps), steps, warmup)
    return {"batch_size": batch_size, "workers": workers, "steps": steps, **measured, "load_average": load_average()}


def busy(trainer: Trainer, batches: Iterator[Batch], steps: int, warmup: int) -> dict[str, float]:
    """Run steps and return the share of time that the device is busy (see `SHARE`) and the pairs per second.

    Args:
        trainer: Does the steps.
        batches: At least `warmup + steps` of them.
        steps: How many are measured.
        warmup: Steps before them.
    """
    arrivals: list[Any] = []
    pairs = 0

    def arriving() -> Iterator[Batch]:
        nonlocal pairs
        for batch in batches:
            pairs += len(batch.matches)
            arrivals.append(mark(trainer.device))
            yield batch

    source = arriving()
    for _ in range(warmup):
        trainer.step(source)
    synchronise(trainer.device)
    arrivals.clear()
    pairs, ends, start = 0, [], time.perf_counter()
    for _ in range(steps):
        trainer.step(source)
        ends.append(mark(trainer.device))
    synchronise(trainer.device)
    wall = time.perf_counter() - start
    work = sum(between(a, b) for a, b in zip(arrivals, ends, strict=True))
    return {"busy": round(work / wall, 4), "pairs_per_second": round(pairs / wall, 1)}


def mark(device: torch.device) -> Any:
    """Mark a moment: an event in the queue of a GPU, the time on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Any, end: Any) -> float:
    """The seconds between two marks."""
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1000)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
