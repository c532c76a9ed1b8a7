"""What a machine can do at most, and the time that some work takes at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import stopwatch

FLOAT = 4
"""Bytes of a float32."""
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Work:
    """What a computation must move and calculate.

    Attributes:
        bytes: Read from and written to memory.
        flops: floating-point operations, a multiplication and an addition count two.
    """

    bytes: float
    flops: float

    def floor_seconds(self, limits: Mapping[str, Any]) -> float:
        """Seconds of the slower of the two, if the machine did both at its limits (the roofline model)."""
        return float(max(self.bytes / limits["bytes_per_second"], self.flops / limits["flops_per_second"]))


def machine_limits(device: torch.device, repetitions: int = 10, edge: int | None = None) -> dict[str, Any]:
    """Measure memory bandwidth and float32 arithmetic; the best of the repetitions, because they are limits.

    Args:
        device: CPU or CUDA.
        repetitions: How often each is run.
        edge: Rows of the matrices; by default large enough for the device.
    """
    edge = edge or (8192 if device.type == "cuda" else 2048)
    source = torch.ones(COPY_BYTES // FLOAT, device=device)
    target = torch.zeros_like(source)
    a, b = (torch.ones(edge, edge, device=device) for _ in range(2))
    out = torch.empty_like(a)
    with _tf32_as_in_convolutions():
        copy = best_seconds(lambda: target.copy_(source), device, repetitions)
        multiply = best_seconds(lambda: torch.mm(a, b, out=out), device, repetitions)
    return {
        "bytes_per_second": 2 * COPY_BYTES / copy,
        "flops_per_second": 2 * edge**3 / multiply,
        "how": f"copy of {COPY_BYTES // 2**20} MiB, read and written; float32 product of {edge} x {edge} matrices "
        f"(TF32 where torch allows it to convolutions); best of {repetitions}",
    }


@contextmanager
def _tf32_as_in_convolutions() -> Iterator[None]:
    """Allow matrices what torch allows convolutions by default, or these would beat the limit."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def best_limits(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The higher of two measured limits each: other load on the machine only ever lowers them."""
    numbers = ("bytes_per_second", "flops_per_second")
    return {**one, **{name: max(one[name], other[name]) for name in numbers}}


def best_seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """The shortest of several runs, after one to warm up."""
    clock, times = stopwatch(device), []
    for _ in range(repetitions + 1):
        start, _ = clock()
        work()
        times.append(clock()[0] - start)
    return min(times[1:])
