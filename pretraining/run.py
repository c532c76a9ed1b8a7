"""One pretraining run from start (or resume) to the exported checkpoint."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256
from nnunetv2_kaf.tensors import LARGEST_WEIGHT, diverged
from pretraining import distributed
from pretraining.checkpoint import FINAL, LATEST, check_latest, load_latest, run_identity
from pretraining.config import PretrainConfig
from pretraining.exchange.interop import initialize_encoder
from pretraining.loop import Trainer, TrainingState, amp_dtype, build_optimizer
from pretraining.objectives.model import PretrainingModel
from pretraining.pairs.loader import PairLoader
from pretraining.prepare import DataOptions, prepare
from pretraining.recorder import Recorder, open_recorder
from pretraining.signals import PreemptedError, Preemption
from pretraining.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes, besides its objectives.

    Attributes:
        device: Where to train.
        data: Which images to use, and how to prepare them.
        resume: Go on from the last checkpoint if there is one.
        folder: Where everything is written; `None` is the standard place, where the trainer looks.
        init: Checkpoint that the convolutional part starts from.
        init_adapt: Also adapt kernel sizes and depth.
        compiled: Compile the model.
    """

    device: torch.device
    data: DataOptions = field(default_factory=DataOptions)
    resume: bool = False
    folder: Path | None = None
    init: Path | None = None
    init_adapt: bool = False
    compiled: bool = False


def default_batch_size(plan_batch_size: int, processes: int = 1) -> int:
    """The number of pairs per batch that fits where the plan's batch fits, on every process.

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
    """Where a run writes."""
    return options.folder or task.folder / f"fold_{options.data.fold}"


def pretrain(task: Task, config: PretrainConfig, options: RunOptions) -> Path:
    """Pretrain and return the path of the final checkpoint.

    Raises:
        KAFError: Data are missing or bad, a checkpoint does not fit, a loss is not finite, or the disk is full.
        PreemptedError: If SIGTERM or SIGUSR1 came; the state has been saved.
    """
    folder = run_folder(task, options)
    batch_size = _batch_size(task, config)
    with Preemption() as preemption, open_recorder(folder) as recorder:
        state = build_state(task, config, options.device)
        identity, resumed = _start(folder, state, task, config, options, batch_size)
        data = prepare(task, config, options.data, options.device, batch_size)
        identity["cases"] = list(data.cases)
        if resumed:
            identity = _resume(folder / LATEST, state, config, identity)
        identity["held_out"] = list(data.held_out_cases)
        recorder.begin({**config.to_dict(), **identity}, resumed, data.held_out, options.device)
        _announce(task, config, options, len(data.cases), batch_size)
        failure_file = folder / "nonfinite_batch.json"
        trainer = Trainer(state, config, task.patch_size, options.device, failure_file, options.compiled)
        _Run(trainer, data.loader, identity, recorder, preemption).epochs()
        epochs = state.step // config.iterations
        summary = {"config": config.to_dict(), **identity, "epochs_done": epochs, "history": state.history}
        recorder.finish(state, task, options.data.fold, summary)
    return folder / FINAL


class _Run:
    """The epochs of a run, and when they are recorded and saved."""

    def __init__(
        self,
        trainer: Trainer,
        loader: PairLoader,
        identity: dict[str, object],
        recorder: Recorder,
        preemption: Preemption,
    ) -> None:
        self.trainer = trainer
        self.loader = loader
        self.identity = identity
        self.recorder = recorder
        self.preemption = preemption
        self.saved = time.monotonic()

    def epochs(self) -> None:
        """Run the remaining epochs; save and plot as the options say."""
        state, config = self.trainer.state, self.trainer.config
        self.preemption.deferred = True
        if not state.history:
            self._record({"epoch": 0.0})
        total = config.epochs * config.iterations
        while state.step < total:
            end = (state.step // config.iterations + 1) * config.iterations
            batches = self.loader.batches(state.step * config.accumulate, end * config.accumulate)
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
                    f"{total}; everything is saved in {self.recorder.folder / LATEST}. The same command with "
                    "--continue goes on."
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
        """Save, unless the weights have diverged: what was saved last is worth more then.

        Raises:
            KAFError: They have diverged, or the file cannot be written.
        """
        self.saved = time.monotonic()
        state = self.trainer.state
        bad = diverged(state.model.state_dict())
        if bad:
            latest = self.recorder.folder / LATEST
            kept = f"{latest} holds the last good state" if latest.is_file() else "nothing was saved"
            raise KAFError(
                f"The weights have diverged by step {state.step}: found NaN, infinite or absurd values in {len(bad)} "
                f"tensor(s), the first is {bad[0]}; expected finite weights below {LARGEST_WEIGHT:g}. {kept}. Start "
                "again with a lower --learning-rate."
            )
        self.recorder.save(state, self.trainer.config, self.identity)

    def _record(self, record: dict[str, float]) -> None:
        """Measure on the held-out pairs, and add the record to the history."""
        state = self.trainer.state
        state.history.append({**record, **self.recorder.measure(state, self.trainer.dtype)})
        self.recorder.record(state.history, self.trainer.config.epochs, self.loader.batch_size)


def _batch_size(task: Task, config: PretrainConfig) -> int:
    """The pairs per batch over all processes.

    Raises:
        KAFError: If the processes cannot share it equally.
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
    batch_size: int,
) -> tuple[dict[str, object], bool]:
    """Check the last checkpoint if the run is to be continued, otherwise take the weights of `--init`.

    Both before any image is read: a wrong file is known in seconds.

    Args:
        folder: Folder of the run.
        state: Changed in place.
        task: What is trained.
        config: Options of the objectives.
        options: Options of the run.
        batch_size: Pairs per batch, over all processes.

    Returns:
        What the run is about, but for the cases, and whether the run is continued.
    """
    latest = folder / LATEST
    identity = run_identity(task, options.data.fold, (), batch_size)
    del identity["cases"]
    if options.resume and latest.is_file():
        # The weights are in the checkpoint, so that the file may be gone; if it is there it must be the same.
        if options.init is None or options.init.is_file():
            identity["init"] = options.init and file_sha256(options.init)
        else:
            del identity["init"]
        check_latest(latest, config, identity)
        return identity, True
    if options.resume:
        logger.info("--continue: there is no %s to continue from; starting a new run.", latest)
    if options.init is not None:
        identity["init"] = initialize_encoder(state.network, options.init, task.channels, options.init_adapt).sha256
    return identity, False


def _resume(
    latest: Path, state: TrainingState, config: PretrainConfig, identity: dict[str, object]
) -> dict[str, object]:
    """Restore the state of a run that is continued; returns its complete identity."""
    saved = load_latest(latest, state, config, identity)
    logger.info("Continuing %s after step %d of %d.", latest, state.step, config.epochs * config.iterations)
    return saved
