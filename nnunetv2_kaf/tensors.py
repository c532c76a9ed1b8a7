"""Are these tensors weights that a network can have? Asked when a file is read, and before one is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.schema_check import brief

LARGEST_WEIGHT = 1e6
"""Weights start below 1 and hardly leave this range; beyond, the next step overflows: the training has diverged."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTERS = ("num_batches_tracked",)
# statistics of the data, which may be large where images are not normalised
_STATISTICS = ("running_mean", "running_var")


def check_weights(weights: object, where: str, fix: str) -> dict[str, Tensor]:
    """Check the state dict of a file.

    Args:
        weights: Tensors by name.
        where: File and place, for the message.
        fix: What to do, a sentence.

    Raises:
        KAFError: It is no dict of tensors by name, or a tensor is none of weights: of another type, without memory of
            its own, with NaN, infinite or absurd values. The tensor is named.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise KAFError(f"{where}: found {brief(weights)}, expected tensors by name. {fix}")
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise KAFError(f"{where}: found the name {brief(name)}, expected text. {fix}")
        if wrong := _wrong_kind(name, tensor):
            raise KAFError(f"{where}.{name}: found {wrong}, expected a dense tensor of floating-point weights. {fix}")
    bad = diverged(weights)
    if bad:
        raise KAFError(
            f"{where}: found NaN, infinite or absurd values (beyond {LARGEST_WEIGHT:g}) in {len(bad)} tensor(s), the "
            f"first is {bad[0]}; expected finite weights. The training that made it has diverged. {fix}"
        )
    return dict(weights)


def check_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, where: str, fix: str) -> None:
    """Check that the saved state of an optimiser belongs to the same parameters.

    Args:
        saved: Its state dict, in the form of `schema_checkpoints.OptimizerState`.
        optimizer: Which is to take it.
        where: File and place, for the message.
        fix: What to do, a sentence.

    Raises:
        KAFError: The groups, the number or the shapes of the parameters differ, or a value is not finite.
    """
    ours, theirs = optimizer.state_dict()["param_groups"], saved["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
    if sizes[0] != sizes[1] or any(set(a) != set(b) for a, b in zip(theirs, ours, strict=True)):
        raise KAFError(
            f"{where}: found an optimiser of {sizes[0]} parameters with the options {sorted(map(str, theirs[0]))}, "
            f"expected one of {sizes[1]} with {sorted(ours[0])}. {fix}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in theirs for i in group["params"]]
    if numbers != [i for group in ours for i in group["params"]] or not saved["state"].keys() <= set(numbers):
        raise KAFError(f"{where}: found moments of unknown parameters, expected those of {sizes[1]}. {fix}")
    for index, state in saved["state"].items():
        for name, value in state.items():
            shape = tuple(parameters[index].shape)
            fits = isinstance(value, Tensor) and not _wrong_kind(name, value) and tuple(value.shape) in (shape, ())
            if value is not None and not (fits or (type(value) in (int, float) and name == "step")):
                raise KAFError(f"{where}: state.{index}.{name}: found {brief(value)}, expected shape {shape}. {fix}")
        if bad := diverged({k: v for k, v in state.items() if k != "step"}, float("inf")):
            raise KAFError(f"{where}: state.{index}.{bad[0]}: found NaN or infinite values, expected finite. {fix}")


def diverged(weights: Mapping[str, Any], most: float = LARGEST_WEIGHT) -> list[str]:
    """Names of the tensors with values that are NaN, infinite or beyond `most`; others than tensors pass."""
    known: dict[tuple[int, torch.Size], bool] = {}
    names = []
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tensor.shape)  # a parameter with several names is looked at once
        if key not in known:
            largest = tensor.detach().abs().amax().float()  # NaN stays NaN
            limit = float("inf") if name.endswith(_STATISTICS) else most
            known[key] = not bool(torch.isfinite(largest)) or float(largest) > limit
        if known[key]:
            names.append(name)
    return names


def _wrong_kind(name: str, tensor: object) -> str:
    """What is wrong with the type or the memory of a tensor; nothing if it can be weights."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
        return brief(tensor)
    if tensor.dtype not in _FLOATS and not name.endswith(_COUNTERS):
        return brief(tensor)
    # a view that repeats its memory can claim any size
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{brief(tensor)} with a memory of {tensor.untyped_storage().nbytes()} bytes"
    return ""
