"""What the benchmarks share: the machine, one core, timing in alternation, the files of results."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    accelerator = {"accelerator": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": device.type,
        **accelerator,
        "system": platform.platform(),
    }


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def load_average() -> list[float] | None:
    """The load averages of 1, 5 and 15 minutes, None where the system does not tell."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def write_json(document: Any, path: Path) -> None:
    """Write results; what is not a finite number becomes null, which JSON has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def one_core(core: int | None = None) -> Iterator[dict[str, Any]]:
    """Keep torch to one thread and this thread to one core, as far as the system allows; restores both.

    Args:
        core: Number of the core; the last allowed one if None.

    Yields:
        What was done, for the results.
    """
    threads = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    pinned = None if allowed is None else max(allowed) if core is None else core
    try:
        torch.set_num_threads(1)
        if pinned is not None:
            os.sched_setaffinity(0, {pinned})
        yield {"torch_threads": 1, "workers": 0, "pinned_to_core": pinned}
    finally:
        torch.set_num_threads(threads)
        if allowed is not None:
            os.sched_setaffinity(0, allowed)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for the duration."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def alternate(
    arms: Mapping[str, Callable[[int], Callable[[], object]]],
    clock: Callable[[], tuple[float, float]],
    repetitions: int,
    warmup: int,
) -> dict[str, list[tuple[float, float]]]:
    """Time several arms side by side, so that a disturbance of the machine meets all of them.

    Args:
        arms: What prepares a step (not timed) and returns what is timed, by name.
        clock: Returns wall and processor seconds.
        repetitions: Timed steps.
        warmup: Steps before them.

    Returns:
        By name, wall and processor seconds of every timed step.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for step in range(warmup + repetitions):
        # Forth and back: no arm always finds the memory as the same other arm left it.
        for name in arms if step % 2 else reversed(list(arms)):
            work = arms[name](step)
            start = clock()
            work()
            end = clock()
            if step >= warmup:
                seconds[name].append((end[0] - start[0], end[1] - start[1]))
    return seconds


def stopwatch(device: torch.device) -> Callable[[], tuple[float, float]]:
    """A clock for `alternate`: wall and processor seconds of this process, once the device has finished."""

    def clock() -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter(), time.process_time()

    return clock


def ratios(seconds: Mapping[str, Sequence[tuple[float, float]]], baseline: str) -> dict[str, dict[str, Any]]:
    """Compare arms timed in alternation with one of them, round by round: the speed of a machine drifts.

    Args:
        seconds: Result of `alternate`.
        baseline: The arm to compare with.

    Returns:
        By name, median and quartiles of the ratios of the wall seconds of one round.
    """
    out = {}
    for name, times in seconds.items():
        found = [one[0] / other[0] for one, other in zip(times, seconds[baseline], strict=True)]
        low, middle, high = np.percentile(found, [25, 50, 75])
        out[name] = {"median": round(float(middle), 4), "quartiles": [round(float(low), 4), round(float(high), 4)]}
    return out
