"""Several jobs at once, each in a process of its own; one that fails does not stop the others."""

from __future__ import annotations

import fcntl
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_kaf.errors import KAFError

from .layout import Layout
from .worker import THREADS_VARIABLE, Step, dump, is_done

LOGGER = logging.getLogger("low_label")
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "benchmarks.low_label"


@dataclass(frozen=True)
class Job:
    """Steps that one process does in order.

    Attributes:
        name: File name of its log.
        layout: Layout of its task.
        steps: Made when it starts, because the command of a training depends on what is there already.
        needs: Name of the job that must have succeeded before.
        finish: Called when all steps are done.
    """

    name: str
    layout: Layout
    steps: Callable[[], Sequence[Step]]
    needs: str | None = None
    finish: Callable[[], object] = lambda: None

    @property
    def key(self) -> str:
        """Unique among the tasks."""
        return f"{self.layout.task.name}/{self.name}"


Launch = Callable[[Job, Sequence[Step], int], int]


@dataclass
class Processes:
    """Starts workers, and ends them when the study is interrupted.

    Attributes:
        lock: File descriptor that every worker holds: as long as one lives, the work folder is in use.
    """

    lock: int
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def __call__(self, job: Job, steps: Sequence[Step], threads: int) -> int:
        """Run steps in a worker; its output is added to the job's log.

        Returns:
            The exit code.
        """
        layout, log = job.layout, job.layout.log(job.name)
        file = layout.scratch / "jobs" / f"{job.name}.json"
        for folder in (file.parent, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        file.write_text(dump(steps))
        environment = layout.environment(threads, **{THREADS_VARIABLE: str(threads)})
        command = [sys.executable, "-m", f"{PACKAGE}.worker", str(file)]
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
            )
            self.running.add(process)
            try:
                return process.wait()
            finally:
                self.running.discard(process)

    def terminate(self) -> None:
        """End all workers."""
        for process in list(self.running):
            process.terminate()


@contextmanager
def processes(work: Path) -> Iterator[Processes]:
    """Lock the work folder.

    Raises:
        KAFError: Another run uses it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KAFError(
                f"--work {work} is in use by another run, or by a worker that an earlier one left behind. Wait for it, "
                "or end it."
            ) from error
        launcher = Processes(lock.fileno())
        try:
            yield launcher
        finally:
            launcher.terminate()


def run_jobs(jobs: Sequence[Job], at_once: int, threads: int, launch: Launch) -> list[str]:
    """Do jobs, those that others need first.

    Args:
        jobs: A needed job stands before those that need it.
        at_once: Processes.
        threads: Threads of torch, per process.
        launch: Starts a worker.

    Returns:
        One line for each job that failed.
    """
    futures: dict[str, Future[str]] = {}
    pool = ThreadPoolExecutor(at_once)
    try:
        for job in jobs:
            # The pool starts jobs in this order, so that a job never waits for one that is not running.
            needed = futures.get(f"{job.layout.task.name}/{job.needs}")
            futures[job.key] = pool.submit(_do, job, needed, threads, launch)
        failures = [(key, future.result()) for key, future in futures.items()]
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return [f"{key}: {error}" for key, error in failures if error]


def _do(job: Job, needed: Future[str] | None, threads: int, launch: Launch) -> str:
    """Do a job; returns what went wrong, or nothing."""
    if needed is not None and needed.result():
        return f"not started, because {job.needs} failed"
    try:
        missing = [step for step in job.steps() if not is_done(step)]
        if missing:
            LOGGER.info("%s: %s", job.key, ", ".join(Path(step.record).stem for step in missing))
            code = launch(job, missing, threads)
            if code or not all(is_done(step) for step in missing):
                return f"ended with code {code}; see {job.layout.log(job.name)}"
        job.finish()
    except (KAFError, OSError) as error:
        return str(error)
    return ""
