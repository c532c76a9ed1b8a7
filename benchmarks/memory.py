"""Peak memory of tensors during a piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

DEFINITION = {
    "cpu": "tensor memory alive at once: parameters, buffers, optimiser state and input, plus the running sum of the "
    "allocations and frees that torch's profiler records during one step (temporary memory of operators included, "
    "memory that libraries allocate on their own not)",
    "cuda": "parameters, buffers, optimiser state and input, plus by how much torch.cuda.max_memory_allocated of one "
    "step exceeds what was allocated before it",
}


def peak_bytes(work: Callable[[], object], alive: Iterable[Tensor], device: torch.device) -> int:
    """Run some work once and return the largest number of bytes its tensors take at once.

    Args:
        work: Must not free memory that was allocated before, or the peak is too small on CUDA and too large on a CPU
            (whose profiler does not see such frees).
        alive: Tensors that are there before; a memory that several share counts once.
        device: Device of the tensors.
    """
    base = storage_bytes(alive)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return base + torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    return base + highest(_changes(profile))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the tensors' memory, each piece of memory counted once."""
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(pieces.values())


def highest(changes: Iterable[int]) -> int:
    """The highest value of a running sum that starts at 0."""
    now = top = 0
    for change in changes:
        now += change
        top = max(top, now)
    return top


def _changes(profile: Any) -> list[int]:
    """The bytes of all allocations (positive) and frees (negative) on the CPU in the order of time."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    on_cpu = [event for event in events if event.device_type().name == "CPU"]
    return [event.nbytes() for event in sorted(on_cpu, key=lambda event: int(event.start_ns()))]
