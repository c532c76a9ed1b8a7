import pytest
import torch
from torch import nn

from nnunetv2_kaf.schedule import WarmupPolyLRScheduler


def test_warm_up_then_nnunets_decay() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    schedule = WarmupPolyLRScheduler(optimizer, 0.01, 100, 5)
    rates = []
    for epoch in range(100):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    decay = [0.01 * (1 - epoch / 100) ** 0.9 for epoch in range(100)]
    assert rates[5:] == pytest.approx(decay[5:])
    assert rates[:5] == pytest.approx([decay[e] * (e + 1) / 6 for e in range(5)])
    assert rates[:6] == sorted(rates[:6])
    schedule.step(7)  # as after --c
    assert optimizer.param_groups[0]["lr"] == pytest.approx(decay[7])
