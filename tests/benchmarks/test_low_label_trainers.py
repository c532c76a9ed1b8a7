from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from low_label import trainers


class Base:
    """Stands for nnU-Net's trainer."""

    def __init__(self, plans: Any, configuration: str, fold: int, dataset_json: Any, device: Any) -> None:
        self.fold, self.initial_lr, self.num_epochs = fold, 0.01, 1000
        self.current_epoch, self.saved, self.drawn = 0, [], []
        self.logger = SimpleNamespace(plot_progress_png=self.drawn.append)

        self.inference_allowed_mirroring_axes: tuple[int, ...] | None = None

    def initialize(self) -> None:
        self.weights = torch.randn(3)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, str]:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], self.initial_lr), "nnU-Net's schedule"

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[str, tuple[int, ...]]:
        self.inference_allowed_mirroring_axes = (0, 1)
        return "rotation", (0, 1)

    def on_train_epoch_start(self) -> None: ...

    def on_epoch_end(self) -> None:
        self.logger.plot_progress_png(self.current_epoch)
        self.current_epoch += 1

    def save_checkpoint(self, filename: str) -> None:
        self.saved.append(filename)


class Short(trainers.Study, Base):
    epochs, iterations, validation_iterations, seeds = 3, 5, 1, (7, 8)


def short(fold: int = 0, kind: type[Short] = Short) -> Any:
    return kind({}, "2d", fold, {}, torch.device("cpu"))


def batches(trainer: Any, epochs: int) -> list[tuple[float, float, float]]:
    out = []
    for _ in range(epochs):
        trainer.on_train_epoch_start()
        out.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
        trainer.on_epoch_end()
    return out


def test_weights_depend_on_the_draw_alone() -> None:
    first, again, other = short(), short(), short(fold=1)
    for trainer in (first, again, other):
        torch.rand(3)
        trainer.initialize()
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, other.weights)


def test_batches_are_those_of_the_epoch_also_after_a_restart() -> None:
    whole = batches(short(), 3)
    assert len(set(whole)) == 3
    again = short()
    batches(again, 1)
    np.random.rand(11)  # noqa: NPY002
    assert batches(again, 2) == whole[1:]
    assert batches(short(fold=1), 3) != whole


def test_only_length_and_the_named_attributes_change() -> None:
    class Changed(Short):
        attributes: ClassVar[dict[str, float]] = {"initial_lr": 0.5}
        warmup_epochs = 1

    plain, changed = short(), short(kind=Changed)
    assert (plain.num_epochs, plain.num_iterations_per_epoch, plain.num_val_iterations_per_epoch) == (3, 5, 1)
    assert plain.configure_optimizers()[1] == "nnU-Net's schedule"
    optimizer, schedule = changed.configure_optimizers()
    rates = []
    for epoch in range(2):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25, 0.5 * (1 - 1 / 3) ** 0.9])


@pytest.mark.parametrize(("mirrored", "axes"), [(True, (0, 1)), (False, None)])
def test_predictions_without_mirroring_are_trained_with_it(mirrored: bool, axes: tuple[int, ...] | None) -> None:
    class Plain(Short):
        mirror_predictions = mirrored

    trainer = short(kind=Plain)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size() == ("rotation", (0, 1))
    assert trainer.inference_allowed_mirroring_axes == axes


def test_best_checkpoints_are_not_kept_and_curves_drawn_once() -> None:
    trainer = short()
    batches(trainer, 3)
    assert trainer.drawn == [2]
    for name in ("latest", "best", "final"):
        trainer.save_checkpoint(f"f/checkpoint_{name}.pth")
    assert trainer.saved == ["f/checkpoint_latest.pth", "f/checkpoint_final.pth"]


def test_written_module_has_one_class_per_arm(tmp_path: Path) -> None:
    file = tmp_path / "study_trainers.py"
    arms = {"Study_a": ("plain", {"weight_decay": 0.1, "warmup_epochs": 2}), "Study_b": ("kaf", {})}
    trainers.write(file, arms, {"epochs": 4, "iterations": 2, "validation_iterations": 1, "seeds": (3,)})
    spec = importlib.util.spec_from_file_location("study_trainers", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    a, b = module.Study_a, module.Study_b
    assert (a.warmup_epochs, a.attributes, a.seeds, a.epochs) == (2, {"weight_decay": 0.1}, (3,), 4)
    assert [c.__name__ for c in a.__mro__[1:3]] == ["Study", "nnUNetTrainer"]
    assert [c.__name__ for c in b.__mro__[1:4]] == ["Study", "nnUNetTrainerKAF", "nnUNetTrainer"]
    assert b.warmup_epochs is None
