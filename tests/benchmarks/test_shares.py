from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import networks
import pytest
import shares
import torch
from synthetic import Layout
from torch import nn

from nnunetv2_kaf.config import KAFConfig

CPU = torch.device("cpu")
CASE = networks.Case(Layout((4, 32, 24), (6.0, 1.5, 1.5), (32, 24), 2, (4, 8, 8), ((1, 1), (2, 2), (2, 2))), 2, 2)


@pytest.fixture(autouse=True)
def _small_paper_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = KAFConfig.paper(token_dim=32, num_blocks=1, diffusion_channels=8)
    for name in ("paper_sparse", "paper_dense"):
        monkeypatch.setitem(networks.ARMS, name, (config, name.removeprefix("paper_")))


def training_step(arm: str) -> networks.TrainingStep:
    batch, loss = networks.make_batch(CASE, 2, 0, CPU), networks.make_loss(CASE, compiled=False)
    return networks.TrainingStep(networks.build(CASE, arm, 0, CPU), loss, batch, compiled=False)


def parts(step: networks.TrainingStep) -> dict[str, dict[str, float]]:
    found = shares.shares(step, step.eager, CPU, steps=2)
    assert found.pop("profiled_step_seconds") > 0
    return found


@pytest.mark.parametrize("arm", ["kaf", "kaf_checkpointing", "paper_sparse", "paper_dense"])
def test_shares_sum_to_one_and_none_is_missing(arm: str) -> None:
    found = parts(training_step(arm))
    values = {(part, kind): value for part, kinds in found.items() for kind, value in kinds.items()}
    assert sum(values.values()) == pytest.approx(1, abs=1e-3)
    assert values.pop(("detection", "backward")) == 0
    assert all(value > 0 for value in values.values())


def test_the_plain_network_is_all_backbone() -> None:
    found = parts(training_step("plain"))
    assert sum(found.pop("backbone").values()) == pytest.approx(1, abs=1e-3)
    assert {value for kinds in found.values() for value in kinds.values()} == {0.0}


PAUSE = 0.5
"""Seconds that a slowed backward pass takes longer."""


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return gradient


class _Slow(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        out: torch.Tensor = _SlowBackward.apply(self.inner(*args, **options))
        return out


@pytest.mark.parametrize(("name", "part"), [("position", "attention"), ("diffusion", "fusion")])
def test_backward_time_goes_to_the_part_that_ran_forward(name: str, part: str) -> None:
    step = training_step("kaf")
    layer: Any = next(iter(step.eager.encoder.layers.values()))  # type: ignore[union-attr,operator]
    # The positions need no gradient: hooks of the module would not see its backward pass.
    setattr(layer, name, _Slow(getattr(layer, name)))
    found = shares.shares(step, step.eager, CPU, steps=1)
    # in seconds, since the share falls when other work slows the rest of the step
    assert found[part]["backward"] * found["profiled_step_seconds"] > 0.99 * PAUSE


def test_labels_are_taken_off_again() -> None:
    step = training_step("kaf")
    with pytest.raises(RuntimeError, match="inside"), shares.labelled(step.eager):
        raise RuntimeError("inside")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in step.eager.modules())


def event(name: str, start: float, end: float, parent: Any = None, number: int = -1, device: str = "CPU") -> Any:
    span = SimpleNamespace(start=start, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name,
        time_range=span,
        cpu_parent=parent,
        sequence_nr=number,
        device_type=SimpleNamespace(name=device),
        device_time_total=2 * (end - start),
    )


def test_a_profile_by_hand() -> None:
    step = event("benchmark::step", 0, 100)
    forward = event("benchmark::forward", 0, 40, step)
    detection = event("benchmark::detection", 0, 5, forward)
    layer = event("benchmark::fusion", 10, 30, forward)
    attention = event("benchmark::attention", 15, 25, layer)
    backward = event("autograd::engine::evaluate_function: MulBackward0", 50, 62, step, 7)
    events = [
        step,
        forward,
        detection,
        layer,
        attention,
        # Shows the number of the next node, but makes none.
        event("aten::arange", 11, 12, layer, 7),
        event("aten::mul", 16, 18, attention, 7),
        event("aten::add", 26, 27, layer, 8),
        event("aten::conv2d", 31, 33, forward, 9),
        event("autograd::engine::evaluate_function: ConvBackward0", 42, 47, step, 9),
        event("autograd::engine::evaluate_function: AddBackward0", 47, 50, step, 8),
        backward,
        # Work within a node of the backward pass is part of it.
        event("aten::mul", 51, 60, backward, 7),
        event("benchmark::attention", 52, 54, backward),
        event("autograd::engine::evaluate_function: AccumulateGrad", 62, 66, step),
        event("benchmark::step", 0, 100, None, device="CUDA"),
    ]
    found, total = shares.attribute(events, cuda=False)
    assert total == 100
    assert found == {
        "detection": {"forward": 5, "backward": 0},
        "attention": {"forward": 10, "backward": 12},
        "fusion": {"forward": 10, "backward": 3},
        "backbone": {"forward": 15, "backward": 9, "other": 36},
    }
    # On CUDA kernel time counts, and the thread of the backward pass is not inside the step.
    found, total = shares.attribute(events, cuda=True)
    assert total == 200 + 48
    assert found["backbone"] == {"forward": 30, "backward": 18, "other": 120}
