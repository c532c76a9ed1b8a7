"""``kaf-pretrain --init``: start the convolutional part of the encoder from weights that were trained elsewhere.

Three kinds of files are read: nnssl checkpoints (``network_weights`` and ``nnssl_adaptation_plan``), checkpoints of
nnU-Net trainings, and our own pretraining checkpoints. The networks share the names of dynamic-network-architectures,
so tensors fit by name. Taking only some of them would leave an encoder that is neither pretrained nor fresh, therefore
either every convolutional tensor is determined by the file or nothing is changed.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_kaf.channels import identity_projection, pad_input_channels, repeat_input_channels
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256
from nnunetv2_kaf.weights import LoadReport, count_by_module, first_convolution
from pretraining.exchange.sources import CONVOLUTIONAL, LAYERS, Source, read_weights

logger = logging.getLogger(__name__)


class Fit(NamedTuple):
    """How the weights of a file meet an encoder.

    Attributes:
        values: tensors to copy, by name, in the shape of the encoder's.
        adapted: the rule that made a tensor fit, by name, or why one of the file is not used.
        left: names that stay at their initialisation.
        misfits: what does not fit, one line each.
    """

    values: dict[str, Tensor]
    adapted: dict[str, str]
    left: list[str]
    misfits: list[str]


def initialize_encoder(network: nn.Module, path: str | Path, channels: int) -> LoadReport:
    """Start the convolutional part of an encoder (stem and stages) from a checkpoint, completely or not at all.

    One-channel weights are adapted to several channels (`repeat_input_channels`), and weights of an encoder without
    keypoint layers to `concat` fusion (`pad_input_channels`): the encoder then computes the same features as the one in
    the file. There is one exception: in a residual backbone, a `concat` fusion changes which blocks project their skip.
    A new projection starts as the identity on the features (`identity_projection`), one that is not needed any more is
    not used. A keypoint layer is taken if the file has all of its tensors in equal shapes; otherwise it stays at its
    fresh initialisation.

    Args:
        network: a `KAFUNet`, or nnU-Net's `PlainConvUNet` or `ResidualEncoderUNet`, freshly initialised, not wrapped.
        path: an nnssl checkpoint, a checkpoint of an nnU-Net training, or one of our pretraining checkpoints.
        channels: input channels of ``network``.

    Returns:
        What was taken, adapted and left at its initialisation; it is also logged.

    Raises:
        KAFError: the file cannot be read safely, is of an unknown kind, or holds another architecture: the differences
            are named and ``network`` is unchanged.
    """
    source = read_weights(path)
    target = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("encoder.")}
    found = fit(source.weights, target, first_convolution(network), concatenated_stages(network))
    if found.misfits:
        raise KAFError(_misfit(path, source, target, found, channels))
    with torch.no_grad():
        for name, value in found.values.items():
            target[name].copy_(value)
    report = LoadReport(
        source=str(path),
        sha256=file_sha256(path),
        tensors=count_by_module(found.values),
        note=f"--init with {source.kind}",
        adapted=found.adapted,
        left=count_by_module(found.left),
    )
    logger.info(
        "--init: %d tensors %s taken from %s (%s); adapted: %s; left at their initialisation: %s",
        len(found.values),
        report.tensors,
        path,
        source.kind,
        dict(Counter(found.adapted.values())) or "none",
        report.left or "none",
    )
    return report


def fit(
    weights: Mapping[str, Tensor], target: Mapping[str, Tensor], first: list[str], concatenated: tuple[str, ...]
) -> Fit:
    """Bring the weights of a file into the shapes of an encoder.

    Args:
        weights: of the file.
        target: state dict of the encoder.
        first: names of the weights that see the input.
        concatenated: prefixes of the stages whose input is doubled by a `concat` fusion.
    """
    result = Fit({}, {}, [], [])
    for name, tensor in target.items():
        if name.startswith(LAYERS):
            continue
        try:
            value, rule = _fit_tensor(name, tensor, weights, name in first, name.startswith(concatenated))
        except KAFError as error:
            result.misfits.append(f"{name}: {error}")
            continue
        if value is None:
            result.left.append(name)
        else:
            result.values[name] = value
        if rule:
            result.adapted[name] = rule
    for level in sorted({name.split(".")[2] for name in target if name.startswith(LAYERS)}, key=int):
        names = [name for name in target if name.startswith(f"{LAYERS}{level}.")]
        if all(name in weights and weights[name].shape == target[name].shape for name in names):
            result.values.update({name: weights[name] for name in names})
        else:
            result.left.extend(names)
    for name in [name for name in weights if name.startswith(CONVOLUTIONAL) and name not in target]:
        if name.startswith(concatenated) and _is_new_skip(name, target):
            result.adapted[name] = "not used: here the features and the fusion skip unprojected"
        else:
            result.misfits.append(f"{name}: only in the file")
    return result


def concatenated_stages(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the stages whose input a `concat` fusion doubles; none for other networks."""
    encoder: Any = network.get_submodule("encoder")
    config = getattr(encoder, "config", None)
    if config is None or config.fusion != "concat":
        return ()
    return tuple(f"encoder.stages.{level + 1}." for level in encoder.kaf_levels)


def _fit_tensor(
    name: str, tensor: Tensor, weights: Mapping[str, Tensor], is_first: bool, concatenated: bool
) -> tuple[Tensor | None, str]:
    """Value for one tensor and the rule that made it fit; None = it stays as it is.

    Raises:
        KAFError: the file has no tensor that fits.
    """
    value = weights.get(name)
    if value is None:
        if not (concatenated and _is_new_skip(name, weights)):
            raise KAFError("not in the file")
        if tensor.ndim == 1:
            return None, ""
        return identity_projection(tensor), "identity on the features, 0 on the fusion (the file skips unprojected)"
    if value.shape == tensor.shape:
        return value, ""
    same = value.ndim == tensor.ndim > 1 and value.shape[0] == tensor.shape[0] and value.shape[2:] == tensor.shape[2:]
    if same and is_first:
        channels = tensor.shape[1]
        return repeat_input_channels(value, channels), f"1 input channel repeated for {channels}, divided by {channels}"
    if same and concatenated and 2 * value.shape[1] == tensor.shape[1]:
        return pad_input_channels(value, tensor.shape[1]), "weights on the features, 0 on the fusion"
    raise KAFError(f"shape {tuple(value.shape)} in the file, {tuple(tensor.shape)} here")


def _is_new_skip(name: str, others: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to the projected skip of a residual block that skips unprojected in the other network.

    A block projects its skip if it changes the number of channels, so a doubled input adds or removes a projection.
    """
    block, is_skip, _ = name.partition(".skip.")
    return bool(is_skip) and not any(other.startswith(f"{block}.skip.") for other in others)


def _misfit(path: str | Path, source: Source, target: Mapping[str, Tensor], found: Fit, channels: int) -> str:
    """The message for an encoder of another architecture."""
    theirs, ours = describe(source.weights), {**describe(target), "input channels": channels}
    differences = [f"{key}: file {theirs[key]}, here {ours[key]}" for key in ours if theirs[key] != ours[key]]
    listed = "; ".join(found.misfits[:5]) + (f"; and {len(found.misfits) - 5} more" if len(found.misfits) > 5 else "")
    return (
        f"--init {path} ({source.kind}) does not fit this network. They differ in: {'; '.join(differences) or 'names'}"
        f". Tensors: {listed}. Use plans with the same architecture (e.g. -p nnUNetResEncUNetLPlans for a ResEnc-L "
        "checkpoint), or leave out --init. Only one-channel weights can be adapted to another number of input channels."
    )


def describe(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The architecture of an encoder, read off the names and shapes of its tensors.

    Returns:
        backbone, input channels, and per stage: features, kernel sizes and number of convolutions.
    """
    convolutions = {
        k: v
        for k, v in weights.items()
        if k.startswith(CONVOLUTIONAL) and k.endswith(".conv.weight") and ".skip." not in k and v.ndim > 2
    }
    stages: dict[int, list[Tensor]] = {}
    for name, tensor in convolutions.items():
        if match := re.match(r"encoder\.stages\.(\d+)\.", name):
            stages.setdefault(int(match[1]), []).append(tensor)
    ordered = [stages[level] for level in sorted(stages)]
    first = next((v for k, v in convolutions.items() if k.startswith("encoder.stem.")), None)
    first = ordered[0][0] if first is None and ordered else first
    return {
        "backbone": "residual" if any(".blocks." in name for name in convolutions) else "plain",
        "stages": len(ordered),
        "features": [int(stage[-1].shape[0]) for stage in ordered],
        "kernel sizes": [list(max((tuple(t.shape[2:]) for t in stage), key=math.prod)) for stage in ordered],
        "convolutions": [len(stage) for stage in ordered],
        "input channels": None if first is None else int(first.shape[1]),
    }
