"""One pretraining run from start (or resume) to the exported checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import pretraining_folder
from pretraining.checkpoint import FINAL, LATEST, export, load_latest, run_identity, save_latest, set_aside
from pretraining.config import PretrainConfig
from pretraining.dataset import PreprocessedImages, training_cases
from pretraining.loader import PairLoader
from pretraining.loop import Trainer, TrainingState, amp_dtype, build_optimizer
from pretraining.model import PretrainingModel
from pretraining.progress import plot_progress
from pretraining.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change its result on one machine.

    Attributes:
        device: where to train.
        fold: validation cases of this fold are left out; ``"all"`` uses every case.
        resume: go on from the last checkpoint if there is one.
        num_workers: threads that prepare pairs.
    """

    device: torch.device
    fold: int | str
    resume: bool
    num_workers: int


def default_batch_size(plan_batch_size: int) -> int:
    """Return the number of pairs per step that fits where the plan's batch fits.

    A pair is two views, but only the encoder runs, which is about half of the UNet's memory. At least 2: one pair has
    nothing to be contrasted with. At most 32, the paper's.
    """
    return min(32, max(2, plan_batch_size))


def build_state(task: Task, config: PretrainConfig, device: torch.device) -> TrainingState:
    """Build network, heads and optimiser from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = task.build_network()
        model = PretrainingModel(network.encoder, config.projection_dim, config.descriptor_dim)
    network.to(device)
    model.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device) == torch.float16)
    return TrainingState(network, model, build_optimizer(model, config), scaler)


def pretrain(task: Task, config: PretrainConfig, options: RunOptions) -> Path:
    """Pretrain and return the path of the final checkpoint.

    Raises:
        KAFError: for missing or bad data, a checkpoint that does not fit, a loss that is not finite, a full disk.
    """
    images = PreprocessedImages(task.image_folder, task.preprocess_command)
    cases = tuple(training_cases(images, task.dataset_folder, options.fold))
    batch_size = config.batch_size or default_batch_size(task.batch_size)
    if batch_size == 1:
        logger.warning("With one pair per step the global losses have no negatives: use --batch-size 2 or more.")
    loader = PairLoader(images, cases, task.patch_size, task.spacing, batch_size, config, options.num_workers)
    _check_channels(task, images, cases)
    folder = pretraining_folder(task.dataset_name, task.plans_name, task.configuration, options.fold)
    folder.mkdir(parents=True, exist_ok=True)
    state = build_state(task, config, options.device)
    identity = run_identity(task, options.fold, cases, batch_size)
    _start_or_resume(folder, state, config, identity, options.resume)
    trainer = Trainer(state, config, task.spacing, options.device, folder / "nonfinite_batch.json")
    with _log_file(folder / "pretraining.log"):
        _announce(task, config, options, len(cases), batch_size)
        _epochs(trainer, loader, folder, identity)
        summary = {"config": config.to_dict(), **identity, "epochs_done": state.epoch, "history": state.history}
        export(folder / FINAL, state, task, options.fold, summary)
    return folder / FINAL


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append the log of this package to a file for the duration of the run."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger(__name__.split(".")[0])
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _announce(task: Task, config: PretrainConfig, options: RunOptions, cases: int, batch_size: int) -> None:
    """Log what is about to run."""
    logger.info(
        "%s, %s, %s: %d cases, %d pairs per step, %d epochs of %d steps, %s",
        task.dataset_name,
        task.plans_name,
        task.configuration,
        cases,
        batch_size,
        config.epochs,
        config.iterations,
        options.device,
    )


def _epochs(trainer: Trainer, loader: PairLoader, folder: Path, identity: dict[str, object]) -> None:
    """Run the remaining epochs; save and plot as the options say."""
    state, config = trainer.state, trainer.config
    for epoch in range(state.epoch, config.epochs):
        start = epoch * config.iterations
        record = trainer.epoch(loader.batches(start, start + config.iterations))
        logger.info("epoch %d/%d: %s", state.epoch, config.epochs, " ".join(f"{k} {v:.4g}" for k, v in record.items()))
        if state.epoch % config.save_every == 0 or state.epoch == config.epochs:
            save_latest(folder / LATEST, state, config, identity)
        plot_progress(state.history, folder / "progress.png")


def _start_or_resume(
    folder: Path, state: TrainingState, config: PretrainConfig, identity: dict[str, object], resume: bool
) -> None:
    """Load the last checkpoint if the run is to be continued, else keep the files of an earlier run under new names."""
    latest = folder / LATEST
    if resume and latest.is_file():
        load_latest(latest, state, config, identity)
        logger.info("Continuing %s after epoch %d of %d.", latest, state.epoch, config.epochs)
        return
    if resume:
        logger.info("--continue: there is no %s to continue from; starting a new run.", latest)
    set_aside(folder)


def _check_channels(task: Task, images: PreprocessedImages, cases: tuple[str, ...]) -> None:
    """Raise a KAFError if the preprocessed images do not have the channels of dataset.json."""
    found = images.shape(cases[0])[0]
    if found != task.channels:
        raise KAFError(
            f"{images.path(cases[0])} has {found} channel(s), {task.dataset_folder / 'dataset.json'} names "
            f"{task.channels}. Preprocess again: {images.command}"
        )
