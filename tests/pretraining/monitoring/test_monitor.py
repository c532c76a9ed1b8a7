from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pretraining.config import PretrainConfig
from pretraining.monitoring.monitor import MONITORED, STREAM, Monitor, collapse_warning, collapsed, hold_out
from pretraining.pairs.loader import PairLoader
from pretraining.run import build_state
from pretraining.task import resolve_task

CPU = torch.device("cpu")


def patients(count: int) -> dict[str, tuple[str, ...]]:
    return {f"p{i}": (f"p{i}_a", f"p{i}_b") for i in range(count)}


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (4, 0), (5, 1), (20, 1), (60, 3), (1000, 8)])
def test_held_out_patients(count: int, expected: int) -> None:
    training, held_out = hold_out(patients(count), 0)
    assert len(held_out) == expected
    assert {**training, **held_out} == patients(count)
    assert not set(training) & set(held_out)
    assert hold_out(patients(count), 0) == (training, held_out)
    if count == 60:
        assert hold_out(patients(count), 1)[1] != held_out


def test_patients_of_further_sources_are_held_out_first() -> None:
    unlabelled = {f"folder-1/p{i}": (f"folder-1/p{i}",) for i in range(4)}
    for seed in range(20):
        _, held_out = hold_out({**patients(3), **unlabelled}, seed)
        assert len(held_out) == 1
        assert set(held_out) <= set(unlabelled)
    assert len(hold_out({**patients(60), "folder-1/p": ("folder-1/p",)}, 0)[1]) == 3


def test_a_global_loss_that_stays_at_collapse_for_two_epochs_is_named() -> None:
    start, stuck, learns = {"epoch": 0.0}, {"bottleneck": math.log(15), "local": 9.0}, {"bottleneck": 2.3}
    assert collapsed([start, stuck, {"bottleneck": 2.68}], 8) == {"bottleneck": 2.68}
    assert collapsed([start, stuck], 8) == {}, "one epoch is a start"
    assert collapsed([start, stuck, learns], 8) == collapsed([start, learns, stuck], 8) == {}
    assert collapsed([start, learns, stuck, stuck], 8) == {"bottleneck": math.log(15)}
    assert collapsed([start, {"keypoints": 0.0}, {"keypoints": 0.0}], 1) == {}, "one pair has no negatives"
    text = collapse_warning({"bottleneck": 2.7}, 8)
    assert all(
        part in text for part in ("bottleneck 2.700", "log(2B - 1) = 2.708", "B = 8", "--mirror 0", "--batch-size")
    )


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("network", ["kaf", "plain"])
def test_measures_the_same_pairs_every_time(
    tiny: Any, make_loader: Callable[..., PairLoader], configuration: str, network: str
) -> None:
    tiny.add_cases(4)
    config = PretrainConfig.from_preset("kaf" if network == "kaf" else "simclr", {"network": network})
    model = build_state(resolve_task("123", configuration, "nnUNetPlans", network), config, CPU).model
    monitor = Monitor(make_loader(configuration, stream=STREAM), CPU)
    before = torch.get_rng_state()
    model.train()
    values = monitor.evaluate(model, None)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert tuple(values) == MONITORED
    assert values == monitor.evaluate(model, None)
    assert 0 <= values["recall_at_1"] <= values["recall_at_5"] <= 1
    assert values["effective_rank"] >= 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    assert monitor.evaluate(model, None) != values


def test_without_any_match_recall_is_nan(tiny: Any, make_loader: Callable[..., PairLoader]) -> None:
    tiny.add("flat", np.zeros((1, 10, 28, 20), np.float32))
    model = build_state(resolve_task("123", "2d", "nnUNetPlans"), PretrainConfig(), CPU).model
    values = Monitor(make_loader("2d", stream=STREAM), CPU).evaluate(model, None)
    assert math.isnan(values["recall_at_1"])
    assert math.isfinite(values["uniformity"])
