"""Options of one pretraining run: frozen, validated, JSON round trip; the CLI flags are generated from the fields."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.splits import PATIENT_PATTERN


def _option(
    default: Any,
    kind: type,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    changeable: bool = False,
    pattern: bool = False,
) -> Any:
    """Dataclass field whose metadata drive validation and `kaf-pretrain --help`.

    Args:
        default: Default value; `None` means "derived from the plan" and is then allowed.
        kind: `int`, `float` or `str`.
        text: Help text.
        low: Inclusive lower bound.
        high: Inclusive upper bound.
        choices: Allowed strings.
        changeable: May differ when a run is continued (it does not change the result).
        pattern: The value is a regular expression with one group.
    """
    metadata = {
        "kind": kind,
        "help": text,
        "low": low,
        "high": high,
        "choices": choices,
        "optional": default is None,
        "changeable": changeable,
        "pattern": pattern,
    }
    return field(default=default, metadata=metadata)


LARGEST_INT = 2**32 - 1
"""Upper bound of whole numbers that have no other: the largest seed that all generators take."""
COMPONENTS = ("bottleneck", "keypoints", "local", "transport")
"""Names of the losses; each has an option `weight_<name>`."""

_GLOBAL_ONLY = {"weight_keypoints": 0.0, "weight_local": 0.0, "weight_transport": 0.0}
_PAPER: dict[str, Any] = {
    "epochs": 51,
    "batch_size": 32,
    "optimizer": "sgd",
    "learning_rate": 0.002,
    "warmup": 0.0,
    "temperature": 0.1,
    "position_axes": "first",
    "pooling_grid": 1,
    "weight_local": 0.0,
    "weight_transport": 0.01,
    "sinkhorn_iterations": 100,
    "ambiguous": "unmatched",
    "across": 0.0,
    "mirror": 0.5,
    "rotation": 30.0,
    "scale_min": 0.7,
    "scale_max": 1.3,
    "elastic": 0.2,
    "gamma": 0.0,
    "contrast": 0.0,
    "brightness": 0.0,
    "noise": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "kaf": {},
    "paper": _PAPER,
    "simclr": {"positives": "simclr", **_GLOBAL_ONLY},
    "gcl": {"positives": "gcl", **_GLOBAL_ONLY},
    "pcl": {"positives": "pcl", **_GLOBAL_ONLY},
}
"""Values by which the presets differ from the defaults. `kaf`: the defaults. `paper`: the recipe of Yang et al.,
NeurIPS 2023, as published; its threshold is one per dataset, 0.1 for CHD (the default) and 0.35 for ACDC. The others
are the global objectives that it compares with, with the views of the defaults: SimCLR (Chen et al., ICML 2020), GCL
(Chaitanya et al., NeurIPS 2020), PCL (Zeng et al., MICCAI 2021)."""


@dataclass(frozen=True)
class PretrainConfig:
    """All options that determine the result of a pretraining run (besides data, plans, configuration and fold)."""

    epochs: int = _option(50, int, "number of epochs", low=1)
    iterations: int = _option(250, int, "optimiser steps per epoch", low=1)
    batch_size: int | None = _option(
        None,
        int,
        "pairs (of two views) that are contrasted with each other, over all processes; default: the plan's batch size "
        "per process, at least 2, at most 32",
        low=1,
        high=65536,
    )
    accumulate: int = _option(
        1, int, "batches per optimiser step; each batch is contrasted within itself", low=1, high=65536
    )
    seed: int = _option(0, int, "seed of the initial weights, the pairs and the augmentation", low=0)
    save_every: int = _option(1, int, "epochs between two saves of checkpoint_latest.pth", low=1, changeable=True)
    save_minutes: float = _option(
        10.0, float, "a running epoch is saved as well when this many minutes have passed", low=0, changeable=True
    )

    optimizer: str = _option("adamw", str, "optimiser", choices=("adamw", "sgd"))
    learning_rate: float = _option(
        1e-3, float, "peak learning rate; cosine to 0 (the paper: 0.002 with sgd)", low=1e-12
    )
    momentum: float = _option(0.9, float, "momentum (sgd), first moment (adamw)", low=0, high=0.9999)
    weight_decay: float = _option(1e-5, float, "weight decay", low=0)
    warmup: float = _option(0.05, float, "share of all steps with a linear warm-up of the learning rate", low=0, high=1)
    clip_norm: float = _option(12.0, float, "gradients are clipped to this norm", low=1e-12)

    network: str = _option(
        "kaf", str, "kaf: the keypoint-augmented encoder; plain: nnU-Net's own encoder", choices=("kaf", "plain")
    )
    temperature: float = _option(0.2, float, "temperature of the contrastive losses (the paper: 0.1)", low=1e-4)
    positives: str = _option(
        "pcl",
        str,
        "global positives are the two views of a pair (simclr), the views of the same partition of the volume (gcl), "
        "those at similar positions (pcl)",
        choices=("simclr", "gcl", "pcl"),
    )
    position_threshold: float = _option(
        0.1,
        float,
        "pcl: positives are at normalised positions closer than this (the paper: 0.1 for CHD, 0.35 for ACDC)",
        low=0,
        high=1,
    )
    partitions: int = _option(4, int, "gcl: partitions of the volume along every axis", low=1)
    position_axes: str = _option(
        "all",
        str,
        "pcl and gcl: axes along which the centres of two views are compared; all, since patches show a part of the "
        "plane only, or the first alone (2D: the slice), for patches as large as the slices (the paper)",
        choices=("all", "first"),
    )
    pooling_grid: int = _option(
        2, int, "cells per axis that the bottleneck is averaged over for its global loss (the paper: 1)", low=1, high=8
    )
    weight_bottleneck: float = _option(1.0, float, "weight of the global loss on the pooled bottleneck", low=0)
    weight_keypoints: float = _option(1.0, float, "weight of the global loss on the keypoint aggregate", low=0)
    weight_local: float = _option(1.0, float, "weight of the local contrastive loss on corresponding keypoints", low=0)
    weight_transport: float = _option(
        0.1, float, "weight of the local loss that matches keypoints by optimal transport", low=0
    )
    transport_matched: float = _option(0.45, float, "transport: weight of the matched keypoints", low=0)
    transport_unmatched: float = _option(1.0, float, "transport: weight of the unmatched keypoints", low=0)
    transport_layers: int = _option(
        2, int, "transport: layers of self and cross attention between two views", low=0, high=256
    )
    sinkhorn_iterations: int = _option(50, int, "transport: Sinkhorn iterations (the paper: 100)", low=1, high=100000)
    ambiguous: str = _option(
        "ignored",
        str,
        "keypoints that may show the same structure without being matched: ignored by the local losses, or unmatched "
        "like all others (the paper)",
        choices=("ignored", "unmatched"),
    )
    projection_dim: int = _option(128, int, "size of the global embeddings", low=2, high=65536)
    descriptor_dim: int = _option(256, int, "size of the keypoint descriptors", low=2)

    slice_distance: float = _option(
        0.05, float, "2D: the neighbouring slice is within this share of the slices (at least 1)", low=0, high=1
    )
    across: float = _option(
        0.25,
        float,
        "probability that the second view comes from another image (time, phase) of the same patient, if there is one",
        low=0,
        high=1,
    )
    patient_pattern: str = _option(
        PATIENT_PATTERN,
        str,
        "regular expression whose first group is the patient in a case identifier (the whole identifier where it does "
        "not match): patient001_frame01 is patient001",
        pattern=True,
    )
    shift: float = _option(
        0.25, float, "largest shift between the two crops of a pair, as a share of the patch", low=0, high=0.9
    )
    radius_mm: float | None = _option(
        None, float, "keypoints closer than this correspond (known transform); default: 2 finest voxels", low=0
    )
    search_radius_mm: float | None = _option(
        None,
        float,
        "keypoints of neighbouring slices or other phases are compared within this distance; default: 8 finest voxels",
        low=0,
    )

    mirror: float = _option(0.0, float, "probability of a mirror per axis (the paper: 0.5)", low=0, high=1)
    spatial: float = _option(0.67, float, "probability of rotation, scale and elastic deformation", low=0, high=1)
    rotation: float = _option(15.0, float, "largest rotation in degrees (the paper: 30)", low=0, high=180)
    scale_min: float = _option(0.8, float, "smallest zoom, source mm per view mm (the paper: 0.7)", low=0.1, high=10)
    scale_max: float = _option(1.25, float, "largest zoom, source mm per view mm (the paper: 1.3)", low=0.1, high=10)
    elastic: float = _option(
        0.1, float, "largest elastic displacement as a share of the control spacing", low=0, high=0.4
    )
    gamma: float = _option(0.4, float, "gamma is drawn from exp(+-this)", low=0, high=3)
    contrast: float = _option(0.25, float, "contrast is drawn from 1 +- this", low=0, high=0.95)
    brightness: float = _option(0.25, float, "offset is drawn from +- this x the view's std", low=0)
    noise: float = _option(0.15, float, "std of the noise is drawn from 0 to this x the view's std", low=0)

    def __post_init__(self) -> None:
        """Validate every field.

        Raises:
            KAFError: Naming the option, the value found and what is expected.
        """
        for item in fields(self):
            _check(item.name, getattr(self, item.name), item.metadata)
        if self.scale_min > self.scale_max:
            raise KAFError(
                f"--scale-min is {self.scale_min} and --scale-max is {self.scale_max}; expected scale-min <= scale-max."
            )
        if not self.components:
            raise KAFError("All loss weights are 0: there is nothing to learn. Set at least one --weight-... above 0.")
        needs_keypoints = [flag(f"weight_{name}") for name in self.components if name != "bottleneck"]
        if self.network == "plain" and needs_keypoints:
            raise KAFError(
                f"--network plain has no keypoint layers, but {', '.join(needs_keypoints)} is above 0. Use --preset "
                "simclr, gcl or pcl, or set these weights to 0."
            )

    @property
    def components(self) -> dict[str, float]:
        """Weights of the losses that take part, by name."""
        weights = {name: float(getattr(self, f"weight_{name}")) for name in COMPONENTS}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @classmethod
    def from_preset(cls, preset: str, overrides: Mapping[str, Any]) -> PretrainConfig:
        """The options of a preset with some of them replaced.

        Raises:
            KAFError: For an unknown preset and invalid values.
        """
        if preset not in PRESETS:
            raise KAFError(f"--preset is {preset!r}; expected one of {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[preset], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dict of JSON primitives."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainConfig:
        """Inverse of `to_dict`.

        Raises:
            KAFError: For unknown keys and invalid values.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise KAFError(f"Unknown pretraining option(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
        return cls(**values)

    def differences(self, other: PretrainConfig) -> list[str]:
        """Describe the options that differ from `other` and change the result, one `name: ours != theirs` each."""
        return [
            f"{item.name}: {getattr(self, item.name)} != {getattr(other, item.name)}"
            for item in fields(self)
            if not item.metadata["changeable"] and getattr(self, item.name) != getattr(other, item.name)
        ]


def flag(name: str) -> str:
    """The command-line flag of an option: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise a KAFError if `value` does not satisfy the field's metadata."""
    if value is None and metadata["optional"]:
        return
    kind: type = metadata["kind"]
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise KAFError(f"{flag(name)} is {value!r}; expected a value of type {kind.__name__}.")
    if metadata["pattern"] and isinstance(value, str):
        _check_pattern(name, value)
    choices, low, high = metadata["choices"], metadata["low"], metadata["high"]
    high = LARGEST_INT if high is None and kind is int else high
    if choices is not None and value not in choices:
        raise KAFError(f"{flag(name)} is {value!r}; expected one of {', '.join(choices)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise KAFError(f"{flag(name)} is {value}; expected a finite number.")
    if (low is not None and value < low) or (high is not None and value > high):
        raise KAFError(
            f"{flag(name)} is {value}; expected a value from {low} to {'infinity' if high is None else high}."
        )


def _check_pattern(name: str, value: str) -> None:
    """Raise a KAFError if `value` is not a regular expression with a group."""
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise KAFError(f"{flag(name)} is {value!r}, which is not a regular expression ({error}).") from error
    if groups < 1:
        raise KAFError(f"{flag(name)} is {value!r}; expected a group in parentheses, as in '(.*)_frame[0-9]+'.")
