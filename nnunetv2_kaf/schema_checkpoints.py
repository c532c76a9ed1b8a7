"""Schemas of checkpoints: of a pretraining, finished or to be continued, and of a training to be continued."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor

from nnunetv2_kaf.schema_check import Measurements, PathName, PlainDict, Record, plain
from nnunetv2_kaf.schema_plans import ArchitectureEntry, PlansEntry


def _fold(value: object) -> object:
    if value != "all" and not (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6):
        raise ValueError('a fold: a whole number from 0, or "all"')
    return value


Fold = Annotated[Any, BeforeValidator(_fold)]


class PretrainingCheckpoint(Record):
    """checkpoint_final.pth of a pretraining; `tensors.check_weights` looks at its weights."""

    network_weights: Any
    architecture: ArchitectureEntry
    num_input_channels: int = Field(ge=1, le=4096)
    dataset_name: PathName
    configuration: PathName
    fold: Fold
    plans: Annotated[PlansEntry, BeforeValidator(plain)]
    pretraining: Measurements
    versions: dict[str, str]


class ContinuedTraining(Record):
    """What `nnUNetTrainer.load_checkpoint` takes from a checkpoint."""

    network_weights: Any
    optimizer_state: dict[str, Any]
    grad_scaler_state: dict[str, Any] | None
    logging: dict[str, Any]
    current_epoch: int = Field(ge=0)
    init_args: dict[str, Any]


class RunIdentity(Record):
    """What a pretraining run is about; a run is continued as the same one only."""

    dataset: PathName
    plans: PathName
    configuration: PathName
    fold: str
    patch_size: list[int]
    spacing: list[float]
    batch_size: int
    cases: list[str]
    held_out: list[str] = Field(default_factory=list)
    init: str | None


class ParameterGroup(Record):
    """Parameters of an optimiser, by number, and their options."""

    params: list[int]


class OptimizerState(Record):
    """The state dict of an optimiser; `tensors.check_optimizer` compares it with the optimiser that takes it."""

    state: dict[int, dict[str, Any]]
    param_groups: list[ParameterGroup] = Field(min_length=1)


def _history(value: object) -> object:
    for record in value if isinstance(value, list) else [value]:
        numbers = isinstance(record, Mapping) and all(
            isinstance(k, str) and isinstance(v, (int, float)) and not isinstance(v, bool) for k, v in record.items()
        )
        if not numbers or not math.isfinite(record.get("epoch", math.nan)):  # type: ignore[union-attr]
            raise ValueError("a list of records of numbers, each with its epoch")
    return value


History = Annotated[list[dict[str, Any]], BeforeValidator(_history)]


class FinishedRun(Record):
    """What checkpoint_final.pth of a pretraining records about the run."""

    config: dict[str, Any]
    dataset: PathName
    plans: PathName
    configuration: PathName
    fold: str
    cases: list[str] = Field(default_factory=list)
    held_out: list[str] = Field(default_factory=list)
    history: History = Field(default_factory=list)


class RunCheckpoint(Record):
    """checkpoint_latest.pth of a pretraining: everything that is needed to go on."""

    config: dict[str, Any]
    identity: RunIdentity
    step: int = Field(ge=0)
    sums: Annotated[dict[str, float], BeforeValidator(partial(plain, finite=False))]
    history: History
    network: Any
    model: Any
    optimizer: OptimizerState
    scaler: PlainDict
    rng_cpu: Tensor
    rng_cuda: list[Tensor]
