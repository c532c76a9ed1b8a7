"""What a run leaves in its folder: log, checkpoints, curves, trackers; of several processes the first one does it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pretraining import distributed
from pretraining.checkpoint import FINAL, LATEST, export, save_latest, set_aside, tidy
from pretraining.config import PretrainConfig
from pretraining.loop import TrainingState
from pretraining.monitoring.logfile import log_file
from pretraining.monitoring.monitor import Monitor
from pretraining.monitoring.progress import plot_progress
from pretraining.monitoring.tracking import open_trackers
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

    def record(self, history: list[dict[str, float]], epochs: int) -> None:
        """Show the last entry of the history, of a run of so many epochs."""

    def save(self, state: TrainingState, config: PretrainConfig, identity: Mapping[str, Any]) -> None:
        """Write the checkpoint that a run is continued from."""

    def finish(self, state: TrainingState, task: Task, fold: int | str, summary: Mapping[str, Any]) -> None:
        """Write the checkpoint that the trainer starts from."""


class FolderRecorder(Recorder):
    """Writes to the folder of the run.

    Raises:
        KAFError: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        """Make the folder and start the log, which is written from `begin` on."""
        tidy(self.folder)
        self._log = self._stack.enter_context(log_file(self.folder / "pretraining.log"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close log and trackers."""
        self._stack.close()

    def begin(self, options: Mapping[str, Any], resumed: bool, held_out: PairLoader, device: torch.device) -> None:
        """See `Recorder`. Until now nothing was written: a wrong command must not hide an earlier run's result."""
        if not resumed:
            set_aside(self.folder)
        self._log.flush()
        self._tracker = open_trackers(self.folder, options, resumed)
        self._stack.callback(self._tracker.close)
        self._monitor = Monitor(held_out, device)

    def measure(self, state: TrainingState, dtype: torch.dtype | None) -> dict[str, float]:
        """See `Recorder`."""
        return self._monitor.evaluate(state.model, dtype)

    def record(self, history: list[dict[str, float]], epochs: int) -> None:
        """See `Recorder`: into the log, the plot and the trackers."""
        values = {name: value for name, value in history[-1].items() if name != "epoch"}
        epoch = round(history[-1]["epoch"])
        logger.info("epoch %d/%d: %s", epoch, epochs, " ".join(f"{name} {value:.4g}" for name, value in values.items()))
        plot_progress(history, self.folder / "progress.png")
        self._tracker.log(values, epoch)

    def save(self, state: TrainingState, config: PretrainConfig, identity: Mapping[str, Any]) -> None:
        """See `Recorder`."""
        save_latest(self.folder / LATEST, state, config, identity)

    def finish(self, state: TrainingState, task: Task, fold: int | str, summary: Mapping[str, Any]) -> None:
        """See `Recorder`."""
        export(self.folder / FINAL, state, task, fold, summary)


def open_recorder(folder: Path) -> Recorder:
    """The recorder of this process."""
    return FolderRecorder(folder) if distributed.rank() == 0 else Recorder(folder)
