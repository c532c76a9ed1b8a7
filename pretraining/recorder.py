"""What a run leaves in its folder: log, checkpoints, curves, trackers; of several processes the first one does it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.locking import folder_lock
from pretraining import distributed
from pretraining.checkpoint import (
    FINAL,
    LATEST,
    earlier_files,
    export,
    put_back,
    save_latest,
    set_aside,
    tidy,
)
from pretraining.config import PretrainConfig
from pretraining.loop import TrainingState
from pretraining.monitoring.logfile import log_file
from pretraining.monitoring.monitor import Monitor, collapse_warning, collapsed
from pretraining.monitoring.progress import plot_progress
from pretraining.monitoring.tracking import Tracker, check_trackers, open_trackers
from pretraining.pairs.loader import PairLoader
from pretraining.task import Task

logger = logging.getLogger(__name__)


class Recorder:
    """Records nothing: the recorder of every process but the first.

    The calls come in this order: `begin` when everything has been checked, then `measure`, `record` and `save` any
    number of times, then `finish`.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Recorder:
        """Open what is needed from the start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything."""

    def begin(self, options: Mapping[str, Any], resumed: bool, held_out: PairLoader, device: torch.device) -> None:
        """Start to write.

        Args:
            options: Of the run, for the trackers.
            resumed: Whether an earlier run goes on; otherwise its files are set aside.
            held_out: Makes the pairs to measure on.
            device: Where the model is.
        """

    def measure(self, state: TrainingState, dtype: torch.dtype | None) -> dict[str, float]:
        """Evaluate the model on the held-out pairs: value by name of the metric."""
        return {}

    def record(self, history: list[dict[str, float]], epochs: int, pairs: int) -> None:
        """Show the last entry of the history.

        Args:
            history: One record before training and one per epoch.
            epochs: Of the whole run.
            pairs: That are contrasted with each other, over all processes.
        """

    def save(self, state: TrainingState, config: PretrainConfig, identity: Mapping[str, Any]) -> None:
        """Write the checkpoint that a run is continued from."""

    def finish(self, state: TrainingState, task: Task, fold: int | str, summary: Mapping[str, Any]) -> None:
        """Write the checkpoint that the trainer starts from."""


class FolderRecorder(Recorder):
    """Writes to the folder of the run, which no other run may use meanwhile.

    The files of an earlier run in the folder stay as they are until this one saves for the first time: before, it may
    still fail, and its result would be worth less than theirs. Log and records wait until then.

    Raises:
        KAFError: The folder cannot be made, locked or written to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stack = ExitStack()
        self._tracker: Tracker | None = None
        self._waiting: list[tuple[list[dict[str, float]], int]] = []

    def __enter__(self) -> Recorder:
        """Make and lock the folder, and start the log, which is written from the first save on."""
        check_trackers()
        elsewhere = "Or choose another folder with --output."
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KAFError(f"{self.folder}: the folder cannot be made ({error}). {elsewhere}") from error
        with ExitStack() as stack:
            stack.enter_context(folder_lock(self.folder, elsewhere))
            tidy(self.folder)
            self._log = stack.enter_context(log_file(self.folder / "pretraining.log"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close log and trackers, and unlock the folder."""
        self._stack.close()

    def begin(self, options: Mapping[str, Any], resumed: bool, held_out: PairLoader, device: torch.device) -> None:
        """See `Recorder`."""
        self._options, self._resumed = options, resumed
        self._monitor = Monitor(held_out, device)
        if resumed or not earlier_files(self.folder):
            self._start()
        else:
            logger.info("The files of an earlier run in %s stay until this one saves for the first time.", self.folder)

    def _start(self) -> None:
        """Set the earlier run aside, and write what has been waiting.

        Raises:
            KAFError: A tracker does not start; the earlier run is back in place then.
        """
        moved = {} if self._resumed else set_aside(self.folder)
        try:
            self._tracker = open_trackers(self.folder, self._options, self._resumed)
        except KAFError:
            put_back(moved)
            raise
        self._stack.callback(self._tracker.close)
        self._log.flush()
        for history, epochs in self._waiting:
            self._show(history, epochs, self._tracker)

    def measure(self, state: TrainingState, dtype: torch.dtype | None) -> dict[str, float]:
        """See `Recorder`."""
        return self._monitor.evaluate(state.model, dtype)

    def record(self, history: list[dict[str, float]], epochs: int, pairs: int) -> None:
        """See `Recorder`: into the log, the plot and the trackers; warns of collapsed losses."""
        values = {name: value for name, value in history[-1].items() if name != "epoch"}
        epoch = round(history[-1]["epoch"])
        logger.info("epoch %d/%d: %s", epoch, epochs, " ".join(f"{name} {value:.4g}" for name, value in values.items()))
        stuck = collapsed(history, pairs)
        # Once when it shows, and once at the end, where it is read.
        if stuck and (not collapsed(history[:-1], pairs) or epoch == epochs):
            logger.warning(collapse_warning(stuck, pairs))
        if self._tracker is None:
            self._waiting.append((list(history), epochs))
        else:
            self._show(history, epochs, self._tracker)

    def _show(self, history: list[dict[str, float]], epochs: int, tracker: Tracker) -> None:
        plot_progress(history, self.folder / "progress.png")
        tracker.log(
            {name: value for name, value in history[-1].items() if name != "epoch"}, round(history[-1]["epoch"])
        )

    def save(self, state: TrainingState, config: PretrainConfig, identity: Mapping[str, Any]) -> None:
        """See `Recorder`."""
        first = self._start if self._tracker is None else lambda: None
        save_latest(self.folder / LATEST, state, config, identity, first)

    def finish(self, state: TrainingState, task: Task, fold: int | str, summary: Mapping[str, Any]) -> None:
        """See `Recorder`."""
        export(self.folder / FINAL, state, task, fold, summary)


def open_recorder(folder: Path) -> Recorder:
    """The recorder of this process."""
    return FolderRecorder(folder) if distributed.rank() == 0 else Recorder(folder)
