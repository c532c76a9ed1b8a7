"""Run steps, each of which is a stock command or a function of this package, in this process; a step is done once.

    python -m benchmarks.low_label.worker STEPS.json

A process imports torch and nnU-Net once for the training, prediction and evaluation of a run, instead of once a
command. Every step has a record: how often it was tried, whether it is done, its seconds (unknown if an attempt was
killed). The record of a finished step is believed if it is that of the same command and its product exists.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing

THREADS_VARIABLE = "LOW_LABEL_THREADS"
INTERNAL = "low_label:"
"""First word of a step that is a function of `measure`."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        record: File of the record.
        identity: Hash of everything that decides about the result.
        command: Words; a console script, or `low_label:` and a function of `measure`.
        product: File that the command makes.
        environment: Variables for this step alone.
    """

    record: str
    identity: str
    command: list[str]
    product: str
    environment: dict[str, str]


def state(step: Step) -> dict[str, Any]:
    """The record of a step; an empty one if it was never tried.

    Raises:
        KAFError: The record is that of a run with other options.
    """
    path = Path(step.record)
    if not path.is_file():
        return {"identity": step.identity, "attempts": 0, "done": False, "seconds": 0.0}
    record: dict[str, Any] = json.loads(path.read_text())
    if record["identity"] != step.identity:
        raise KAFError(
            f"{path} is that of a run with other options. Choose another --work folder, or give the arm another name."
        )
    return record


def is_done(step: Step) -> bool:
    """Whether a step is finished and its product exists."""
    return bool(state(step)["done"]) and Path(step.product).exists()


def run_steps(steps: Sequence[Step], run: Callable[[Sequence[str]], None]) -> None:
    """Run what is not done, in order.

    Raises:
        SystemExit: A command failed or did not make its product.
    """
    for step in steps:
        if is_done(step):
            continue
        record = state(step)
        # An attempt that is killed never writes its seconds: the sum stays unknown.
        unfinished = {**record, "attempts": record["attempts"] + 1, "done": False, "seconds": None}
        _write(unfinished, step.record)
        sys.stdout.write(f"\n$ {' '.join(step.command)}\n")
        sys.stdout.flush()
        before = {name: os.environ.get(name) for name in step.environment}
        os.environ.update(step.environment)
        start = time.perf_counter()
        try:
            run(step.command)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            seconds = time.perf_counter() - start
            total = None if record["seconds"] is None else round(record["seconds"] + seconds, 1)
            _write({**unfinished, "seconds": total}, step.record)
        if not Path(step.product).exists():
            raise SystemExit(f"{step.command[0]} ended without {step.product}")
        _write({**unfinished, "seconds": total, "done": True}, step.record)


def run_command(words: Sequence[str]) -> None:
    """Run a console script, or a function of `measure`, in this process.

    Raises:
        SystemExit: It ended with an error.
    """
    if words[0].startswith(INTERNAL):
        from . import measure

        getattr(measure, words[0].removeprefix(INTERNAL))(*words[1:])
        return
    (script,) = entry_points(group="console_scripts", name=words[0])
    sys.argv = list(words)
    code = script.load()()
    if code:
        raise SystemExit(f"{words[0]} ended with code {code}")


def dump(steps: Sequence[Step]) -> str:
    """The content of the file of steps."""
    return json.dumps([asdict(step) for step in steps], indent=2) + "\n"


def main() -> None:
    """Run the steps of a file."""
    steps = [Step(**block) for block in json.loads(Path(sys.argv[1]).read_text())]
    threads = int(os.environ.get(THREADS_VARIABLE, "0"))
    if threads:
        # nnU-Net gives torch as many threads as there are cores; several runs at once share them.
        multiprocessing.cpu_count = lambda: threads
    run_steps(steps, run_command)


def _write(record: Mapping[str, Any], path: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":  # spawned processes import this file
    main()
