from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from pretraining.config import PretrainConfig
from pretraining.loop import Trainer, amp_dtype, learning_rate
from pretraining.pairs.batch import Batch
from pretraining.pairs.loader import PairLoader
from pretraining.run import build_state
from pretraining.task import resolve_task

CPU = torch.device("cpu")
Make = Callable[..., PairLoader]


def setup(
    make: Make, configuration: str, tmp_path: Path, preset: str = "kaf", compiled: bool = False, **changes: Any
) -> tuple[Trainer, PairLoader]:
    config = PretrainConfig.from_preset(preset, {"epochs": 1, "iterations": 3, "sinkhorn_iterations": 5, **changes})
    task = resolve_task("123", configuration, "nnUNetPlans", config.network)
    state = build_state(task, config, CPU)
    trainer = Trainer(state, config, task.patch_size, CPU, tmp_path / "bad.json", compiled)
    return trainer, make(configuration, **config.to_dict())


def repeat(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = PretrainConfig(epochs=10, iterations=10, warmup=0.1, learning_rate=0.5)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:2] == [pytest.approx(0.05), pytest.approx(0.1)]
    assert rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("kaf", {}),
        ("kaf", {"weight_keypoints": 0.0}),
        ("kaf", {"weight_local": 0.0, "weight_transport": 0.0}),
        ("kaf", {"transport_layers": 0}),
        ("simclr", {}),
        ("gcl", {"network": "plain"}),
    ],
)
def test_every_parameter_gets_a_gradient(
    tiny: Any, make_loader: Make, configuration: str, preset: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    tiny.add_cases(5)
    trainer, loader = setup(make_loader, configuration, tmp_path, preset, **changes)
    metrics = trainer.compute(loader.batch(0))
    assert set(metrics) == {*trainer.config.components, "total", "matched"}
    assert metrics["matched"] > 0
    metrics["total"].backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in trainer.state.model.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in trainer.state.network.decoder.seg_layers.parameters())


def test_without_its_loss_only_the_bottleneck_stays_untrained(tiny: Any, make_loader: Make, tmp_path: Path) -> None:
    tiny.add_cases(5)
    trainer, loader = setup(make_loader, "2d", tmp_path, weight_bottleneck=0.0)
    trainer.compute(loader.batch(0))["total"].backward()  # type: ignore[no-untyped-call]
    untrained = {name for name, p in trainer.state.model.named_parameters() if p.grad is None}
    assert untrained == {
        name
        for name, _ in trainer.state.model.named_parameters()
        if name.startswith("encoder.stages.2.") or name == "encoder.layers.1.diffusion.spread.weight"
    }


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_images_without_keypoints_give_a_finite_step_with_all_gradients(
    tiny: Any, make_loader: Make, configuration: str, tmp_path: Path
) -> None:
    tiny.add("flat", np.full((1, 10, 28, 20), 0.0, np.float32))
    trainer, loader = setup(make_loader, configuration, tmp_path)
    values = trainer.step(repeat(loader.batch(0)))
    assert values["local"] == values["transport"] == values["matched"] == 0
    assert all(math.isfinite(v) for v in values.values())
    assert [name for name, p in trainer.state.model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_loss_falls_on_one_batch(tiny: Any, make_loader: Make, optimizer: str, tmp_path: Path) -> None:
    tiny.add_cases(4)
    rate = 3e-3 if optimizer == "adamw" else 0.03
    trainer, loader = setup(
        make_loader, "2d", tmp_path, optimizer=optimizer, learning_rate=rate, epochs=40, positives="simclr"
    )
    batches = repeat(loader.batch(0))
    losses = [trainer.step(batches) for _ in range(40)]
    assert losses[-1]["total"] < 0.8 * losses[0]["total"]
    for name in trainer.config.components:
        assert losses[-1][name] < losses[0][name], name


def test_accumulation_averages_the_gradients_of_its_batches(tiny: Any, make_loader: Make, tmp_path: Path) -> None:
    tiny.add_cases(5)
    batches = list(make_loader("2d").batches(0, 2))
    gradients = []
    for accumulate in (1, 1, 2):
        trainer, _ = setup(make_loader, "2d", tmp_path, accumulate=accumulate, clip_norm=1e9, learning_rate=1e-12)
        values = trainer.step(iter(batches[len(gradients) :] if accumulate == 1 else batches))
        gradients.append([p.grad.clone() for p in trainer.state.model.parameters() if p.grad is not None])
        assert trainer.state.step == 1
        assert math.isfinite(values["total"])
    for one, two, both in zip(*gradients, strict=True):
        assert torch.allclose((one + two) / 2, both, atol=1e-5)


def test_an_interrupted_epoch_goes_on_where_it_stopped(tiny: Any, make_loader: Make, tmp_path: Path) -> None:
    tiny.add_cases(5)
    whole, loader = setup(make_loader, "2d", tmp_path, iterations=4)
    expected = whole.epoch(loader.batches(0, 4), lambda: False)
    trainer, loader = setup(make_loader, "2d", tmp_path, iterations=4)
    asked = iter([False, True])
    assert trainer.epoch(loader.batches(0, 4), lambda: next(asked)) is None
    assert trainer.state.step == 2
    assert trainer.epoch(loader.batches(2, 4), lambda: False) == expected
    assert trainer.state.sums == {}


def test_compiled_model_gives_the_same_losses(
    tiny: Any, make_loader: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.add_cases(5)
    original, graphs = torch.compile, []

    def without_code_generation(module: Any, **_: Any) -> Any:
        graphs.append(module)
        return original(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", without_code_generation)
    batch = make_loader("2d").batch(0)
    plain = setup(make_loader, "2d", tmp_path)[0].compute(batch)
    compiled = setup(make_loader, "2d", tmp_path, compiled=True)[0].compute(batch)
    assert len(graphs) == 1
    for name, value in plain.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(tiny: Any, make_loader: Make, tmp_path: Path) -> None:
    tiny.add_cases(3)
    trainer, loader = setup(make_loader, "2d", tmp_path)
    batch = loader.batch(0)
    views = batch.rendered(loader.patch_size).clone()
    views[0, 0, 3, 3] = torch.inf
    with pytest.raises(KAFError, match=batch.cases[0]):
        trainer.step(repeat(replace(batch, views=views)))
    record = json.loads((tmp_path / "bad.json").read_text())
    assert record["step"] == 0
    assert record["cases"] == sorted(set(batch.cases))


def test_exploding_gradients_stop_too(tiny: Any, make_loader: Make, tmp_path: Path) -> None:
    tiny.add_cases(3)
    trainer, loader = setup(make_loader, "2d", tmp_path)
    parameter = next(trainer.state.model.parameters())
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    before = parameter.detach().clone()
    with pytest.raises(KAFError, match="gradient"):
        trainer.step(repeat(loader.batch(0)))
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_the_time_left_of_the_run_on_a_terminal_only(
    tiny: Any, make_loader: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    class Stderr(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stderr = Stderr()
    monkeypatch.setattr("sys.stderr", stderr)
    tiny.add_cases(4)
    trainer, loader = setup(make_loader, "2d", tmp_path, epochs=2, iterations=2)
    trainer.epoch(repeat(loader.batch(0)), lambda: False)
    shown = stderr.getvalue()
    assert ("epoch 1/2" in shown and "/4 [" in shown) if terminal else shown == ""


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_bfloat16_only_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch, has_it: bool, expected: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert amp_dtype(torch.device("cuda")) == expected
    assert amp_dtype(torch.device("cpu")) is None
