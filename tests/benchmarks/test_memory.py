from __future__ import annotations

import memory
import pytest
import torch

CPU = torch.device("cpu")
MIB = 2**20


def buffer(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_the_peak_is_that_of_tensors_alive_at_once() -> None:
    def work() -> None:
        first, second = buffer(1), buffer(2)
        del first
        third = buffer(4)  # 2 + 4: the highest
        del second
        fourth = buffer(1)
        del third, fourth

    assert memory.peak_bytes(work, [], CPU) == 6 * MIB


def test_what_is_alive_before_counts_once() -> None:
    held = buffer(3)
    assert memory.peak_bytes(lambda: buffer(2), [held, held[:5], held.view(3, -1)], CPU) == 5 * MIB


def test_temporary_memory_of_operators_counts() -> None:
    x = torch.ones(MIB // 4)
    # In double precision the tensor exists within the call only.
    assert memory.peak_bytes(lambda: float(x.double().sum()), [x], CPU) >= 3 * MIB


def test_saved_activations_count() -> None:
    weight = torch.ones(MIB // 4, requires_grad=True)

    def step() -> None:
        # Each exp keeps its result, 1 MiB, for the backward pass.
        weight.exp().exp().exp().sum().backward()

    with_graph = memory.peak_bytes(step, [weight], CPU)
    weight.grad = None
    with torch.no_grad():
        without = memory.peak_bytes(lambda: weight.exp().exp().exp().sum(), [weight], CPU)
    assert with_graph >= 5 * MIB
    assert without == pytest.approx(3 * MIB, abs=1024)
