"""One pretraining run from start (or resume) to the exported checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256
from pretraining import distributed
from pretraining.checkpoint import FINAL, LATEST, export, load_latest, run_identity, save_latest, set_aside, tidy
from pretraining.config import PretrainConfig
from pretraining.exchange.interop import initialize_encoder
from pretraining.loop import Trainer, TrainingState, amp_dtype, build_optimizer
from pretraining.monitoring.logfile import log_file
from pretraining.monitoring.monitor import Monitor
from pretraining.monitoring.progress import plot_progress
from pretraining.monitoring.tracking import Tracker, open_trackers
from pretraining.objectives.model import PretrainingModel
from pretraining.prepare import Data, DataOptions, prepare
from pretraining.signals import PreemptedError, Preemption
from pretraining.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """Options of a run besides those of its objectives.

    Attributes:
        device: where to train.
        fold: validation patients of this fold are left out; ``"all"`` uses every case.
        resume: go on from the last checkpoint if there is one.
        num_workers: threads that prepare images and pairs.
        folder: where everything is written; ``None``: the standard place, where the trainer looks.
        datasets: further datasets.
        folders: folders of unlabelled images.
        skip_bad: go on without the images that cannot be used.
        init: checkpoint that the convolutional part starts from.
        compiled: compile the model.
    """

    device: torch.device
    fold: int | str
    resume: bool = False
    num_workers: int = 1
    folder: Path | None = None
    datasets: Sequence[str] = ()
    folders: Sequence[Path] = ()
    skip_bad: bool = False
    init: Path | None = None
    compiled: bool = False


def default_batch_size(plan_batch_size: int, processes: int = 1) -> int:
    """Return the number of pairs per batch that fits where the plan's batch fits, on every process.

    A pair is two views, but only the encoder runs, which is about half of the UNet's memory. At least 2: one pair has
    nothing to be contrasted with. At most 32, the paper's.
    """
    return processes * min(32, max(2, plan_batch_size))


def build_state(task: Task, config: PretrainConfig, device: torch.device) -> TrainingState:
    """Build network, heads and optimiser from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = task.build_network()
        model = PretrainingModel(network.get_submodule("encoder"), config)
    network.to(device)
    model.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device) == torch.float16)
    return TrainingState(network, model, build_optimizer(model, config), scaler)


def run_folder(task: Task, options: RunOptions) -> Path:
    """Return where a run writes."""
    return options.folder or task.folder / f"fold_{options.fold}"


def pretrain(task: Task, config: PretrainConfig, options: RunOptions) -> Path:
    """Pretrain and return the path of the final checkpoint.

    Raises:
        KAFError: for missing or bad data, a checkpoint that does not fit, a loss that is not finite, a full disk.
        PreemptedError: if SIGTERM or SIGUSR1 came; the state has been saved.
    """
    folder = run_folder(task, options)
    batch_size = _batch_size(task, config)
    with Preemption() as preemption, ExitStack() as stack:
        if distributed.rank() == 0:
            tidy(folder)
            log = stack.enter_context(log_file(folder / "pretraining.log"))
        data_options = DataOptions(
            options.fold, options.datasets, options.folders, options.skip_bad, options.num_workers, options.device
        )
        data = prepare(task, config, data_options, batch_size)
        state = build_state(task, config, options.device)
        identity = run_identity(task, options.fold, data.cases, batch_size)
        identity, resumed = _start(folder, state, task, config, options, identity)
        if distributed.rank() == 0:
            # Not before everything has been checked: a command with a mistake must not hide an earlier run's result.
            if not resumed:
                set_aside(folder)
            log.flush()
        _announce(task, config, options, len(data.cases), batch_size)
        trainer = Trainer(
            state, config, task.patch_size, options.device, folder / "nonfinite_batch.json", options.compiled
        )
        tracker = None
        if distributed.rank() == 0:
            tracker = stack.enter_context(_tracker(folder, {**config.to_dict(), **identity}, resumed))
        _Run(trainer, data, folder, identity, tracker, preemption).epochs()
        if distributed.rank() == 0:
            epochs = state.step // config.iterations
            summary = {"config": config.to_dict(), **identity, "epochs_done": epochs, "history": state.history}
            export(folder / FINAL, state, task, options.fold, summary)
    return folder / FINAL


class _Run:
    """The epochs of a run, and what is recorded of them."""

    def __init__(
        self,
        trainer: Trainer,
        data: Data,
        folder: Path,
        identity: dict[str, object],
        tracker: Tracker | None,
        preemption: Preemption,
    ) -> None:
        self.trainer = trainer
        self.data = data
        self.folder = folder
        self.identity = identity
        self.tracker = tracker
        self.preemption = preemption
        self.saved = time.monotonic()
        self.monitor = Monitor(data.held_out, trainer.device) if distributed.rank() == 0 else None

    def epochs(self) -> None:
        """Run the remaining epochs; save and plot as the options say."""
        state, config = self.trainer.state, self.trainer.config
        self.preemption.deferred = True
        if not state.history:
            self._record({"epoch": 0.0})
        total = config.epochs * config.iterations
        while state.step < total:
            end = (state.step // config.iterations + 1) * config.iterations
            batches = self.data.loader.batches(state.step * config.accumulate, end * config.accumulate)
            record = self.trainer.epoch(batches, self._after_step)
            if record is not None:
                self._record(record)
            epoch = state.step // config.iterations
            asked = distributed.any_rank(self.preemption.requested is not None, self.trainer.device)
            if asked or epoch % config.save_every == 0 or state.step == total or self._due():
                self._save()
            if asked and state.step < total:
                raise PreemptedError(
                    f"{self.preemption.requested or 'a signal to another process'}: stopped after step {state.step} of "
                    f"{total}; everything is saved in {self.folder / LATEST}. The same command with --continue goes on."
                )

    def _after_step(self) -> bool:
        """Save a long epoch now and then; says whether the run was asked to stop."""
        # Not after its last step: the record of the epoch would be missing in the history.
        if self.trainer.state.step % self.trainer.config.iterations and self._due():
            self._save()
        return self.preemption.requested is not None

    def _due(self) -> bool:
        """Whether so much time has passed that the state should be saved."""
        return time.monotonic() - self.saved >= 60 * self.trainer.config.save_minutes

    def _save(self) -> None:
        self.saved = time.monotonic()
        if distributed.rank() == 0:
            save_latest(self.folder / LATEST, self.trainer.state, self.trainer.config, self.identity)

    def _record(self, record: dict[str, float]) -> None:
        """Measure on the held-out pairs; add the record to the history, the log, the plot and the trackers."""
        state, config = self.trainer.state, self.trainer.config
        if self.monitor is not None:
            record = {**record, **self.monitor.evaluate(state.model, self.trainer.dtype)}
        state.history.append(record)
        if distributed.rank() > 0:
            return
        epoch = round(record["epoch"])
        text = " ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "epoch")
        logger.info("epoch %d/%d: %s", epoch, config.epochs, text)
        plot_progress(state.history, self.folder / "progress.png")
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in record.items() if k != "epoch"}, epoch)


@contextmanager
def _tracker(folder: Path, options: dict[str, object], resumed: bool) -> Iterator[Tracker]:
    """Open TensorBoard (and Weights & Biases, if asked for) for the duration of the run."""
    tracker = open_trackers(folder, options, resumed)
    try:
        yield tracker
    finally:
        tracker.close()


def _batch_size(task: Task, config: PretrainConfig) -> int:
    """Return the pairs per batch over all processes.

    Raises:
        KAFError: if the processes cannot share it equally.
    """
    processes = distributed.world_size()
    batch_size = config.batch_size or default_batch_size(task.batch_size, processes)
    if batch_size % processes:
        raise KAFError(
            f"--batch-size is {batch_size}, which {processes} processes cannot share equally. It counts the pairs of "
            f"all processes: use a multiple of {processes}."
        )
    if batch_size == 1:
        logger.warning("With one pair per step the global losses have no negatives: use --batch-size 2 or more.")
    return batch_size


def _announce(task: Task, config: PretrainConfig, options: RunOptions, cases: int, batch_size: int) -> None:
    """Log what is about to run."""
    logger.info(
        "%s, %s, %s, %s encoder: %d training images, %d pairs per batch, %d batch(es) per step, %d epochs of %d steps, "
        "%d process(es) on %s; losses: %s",
        task.dataset_name,
        task.plans_name,
        task.configuration,
        task.network,
        cases,
        batch_size,
        config.accumulate,
        config.epochs,
        config.iterations,
        distributed.world_size(),
        options.device.type,
        ", ".join(f"{name} x {weight:g}" for name, weight in config.components.items()),
    )


def _start(
    folder: Path,
    state: TrainingState,
    task: Task,
    config: PretrainConfig,
    options: RunOptions,
    identity: dict[str, object],
) -> tuple[dict[str, object], bool]:
    """Load the last checkpoint if the run is to be continued and there is one, otherwise the weights of ``--init``.

    Args:
        folder: of the run.
        state: changed in place.
        task: what is trained.
        config: options of the objectives.
        options: options of the run.
        identity: what the run is about, but for ``--init``.

    Returns:
        The complete identity, and whether the run is continued.
    """
    latest = folder / LATEST
    if options.resume and latest.is_file():
        # The weights are in the checkpoint, so that the file may be gone; if it is there it must be the same.
        if options.init is None or options.init.is_file():
            identity = {**identity, "init": options.init and file_sha256(options.init)}
        else:
            identity = {key: value for key, value in identity.items() if key != "init"}
        saved = load_latest(latest, state, config, identity)
        logger.info("Continuing %s after step %d of %d.", latest, state.step, config.epochs * config.iterations)
        return saved, True
    if options.resume:
        logger.info("--continue: there is no %s to continue from; starting a new run.", latest)
    if options.init is not None:
        identity = {**identity, "init": initialize_encoder(state.network, options.init, task.channels).sha256}
    return identity, False
