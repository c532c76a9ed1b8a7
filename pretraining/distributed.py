"""Communication between the processes of one run; without a process group every function is the identity.

Every rank computes the loss of the whole (global) batch from gathered tensors, and `DistributedDataParallel` averages
the parameter gradients over the ranks. Together they are exact, because the backward passes of `gather` and
`sum_over_ranks` sum the gradients of all ranks: world size x the share of one rank, which the average divides again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from nnunetv2_kaf.errors import KAFError

# The first rank may preprocess a whole data set while the others wait for it.
_TIMEOUT = timedelta(hours=24)
# Nodes may start one after the other.
_PATIENCE = timedelta(minutes=30)


def is_distributed() -> bool:
    """Whether this process belongs to an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the first axis, with gradient.

    Args:
        tensor: (N, ...), the same shape and dtype on every rank.

    Returns:
        (world size * N, ...) in the order of the ranks. Backward: the gradient is summed over the ranks, and each keeps
        its own part.
    """
    if not is_distributed():
        return tensor
    out: Tensor = _Gather.apply(tensor)
    return out


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, with gradient (which is summed over all ranks as well).

    Args:
        tensor: Any shape, the same on every rank.
    """
    if not is_distributed():
        return tensor
    out: Tensor = _Sum.apply(tensor)
    return out


def any_rank(flag: bool, device: torch.device | str) -> bool:
    """Whether the flag is set on any rank.

    Args:
        flag: Value on this rank.
        device: Place where the ranks communicate: the GPU of this rank with nccl.
    """
    if not is_distributed():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_names(items: list[str]) -> list[str]:
    """The names of all ranks in one list."""
    if not is_distributed():
        return items
    everything: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(everything, items)
    return [item for part in everything for item in part]


def barrier() -> None:
    """Wait until every rank is here."""
    if not is_distributed():
        return
    # Without the device, nccl guesses it from the rank, which is wrong on every node but the first.
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


@contextmanager
def process_group(device: torch.device | str) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did and they are several.

    Args:
        device: Device of the run; `cuda` communicates by nccl, everything else by gloo.

    Yields:
        The device of this process: for `cuda` the GPU with the number LOCAL_RANK, otherwise `device`.

    Raises:
        KAFError: If the environment is incomplete or this node has fewer GPUs than processes.
    """
    device = torch.device(device)
    if _number("WORLD_SIZE", "1") < 2:
        yield device
        return
    if _number("RANK") >= _number("WORLD_SIZE"):
        raise KAFError(
            f"The environment variable RANK is {os.environ['RANK']}; expected a number below WORLD_SIZE, which is "
            f"{os.environ['WORLD_SIZE']}. Start several processes with torchrun, or unset WORLD_SIZE."
        )
    if device.type == "cuda":
        device = _local_gpu(_number("LOCAL_RANK"))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    _meet(backend)
    finished = False
    try:
        yield device
        finished = True
    finally:
        # After an error nccl could wait for ranks that are still at work; torchrun ends them and this process.
        if finished or backend == "gloo":
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Join the process group.

    Raises:
        KAFError: The other processes cannot be found: a WORLD_SIZE is left over, or they were not started.
    """
    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        store.set_timeout(_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (ValueError, RuntimeError, OSError) as error:
        raise KAFError(
            f"The environment variable WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes were not "
            f"found ({error}). Start several processes with torchrun, or unset WORLD_SIZE."
        ) from error


def _number(name: str, default: str | None = None) -> int:
    """An environment variable of torchrun."""
    value = os.environ.get(name, default)
    if value is None or not value.isdecimal():
        raise KAFError(
            f"The environment variable {name} is {value!r}; expected a whole number beside WORLD_SIZE. Start several "
            "processes with torchrun, or unset WORLD_SIZE."
        )
    return int(value)


def _local_gpu(index: int) -> torch.device:
    """The GPU of the process with this number on its node."""
    count = torch.cuda.device_count()
    if index >= count:
        raise KAFError(
            f"LOCAL_RANK is {index}, but this node has {count} visible GPU(s); expected one for each process. Lower "
            "--nproc-per-node of torchrun, check CUDA_VISIBLE_DEVICES, or use --device cpu."
        )
    return torch.device("cuda", index)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad
