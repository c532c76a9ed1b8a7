"""`kaf-pretrain --init`: start the convolutional part of the encoder from weights that were trained elsewhere.

Three kinds of files are read: nnssl checkpoints (`network_weights` and `nnssl_adaptation_plan`), checkpoints of
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
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256
from nnunetv2_kaf.fitting import CONVOLUTIONAL, Fit, concatenated_stages, fit
from nnunetv2_kaf.weights import LoadReport, count_by_module, first_convolution
from pretraining.exchange.sources import Source, located, read_weights

logger = logging.getLogger(__name__)


def initialize_encoder(network: nn.Module, path: str | Path, channels: int, adapt: bool = False) -> LoadReport:
    """Start the convolutional part of an encoder (stem and stages) from a checkpoint, completely or not at all.

    One-channel weights are adapted to several channels (`repeat_input_channels`), and weights of an encoder without
    keypoint layers to `concat` fusion (`pad_input_channels`): the encoder then computes the same features as the one in
    the file. There is one exception: in a residual backbone, a `concat` fusion changes which blocks project their skip.
    A new projection starts as the identity on the features (`identity_projection`), one that is not needed any more is
    not used. A keypoint layer is taken if the file has all of its tensors in equal shapes; otherwise it stays at its
    fresh initialisation.

    Args:
        network: A `KAFUNet`, or nnU-Net's `PlainConvUNet` or `ResidualEncoderUNet`, freshly initialised, not wrapped.
        path: An nnssl checkpoint, a checkpoint of an nnU-Net training, or one of our pretraining checkpoints.
        channels: Input channels of `network`.
        adapt: Also take weights of other kernel sizes, and of an encoder with another number of stages or convolutions;
            the report says which were adapted, which were not used, and what stays fresh.

    Returns:
        What was taken, adapted and left at its initialisation; it is also logged.

    Raises:
        KAFError: The file cannot be read safely, is of an unknown kind, or holds another architecture: the differences
            are named and `network` is unchanged.
    """
    path = located(path)
    source = read_weights(path)
    target = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("encoder.")}
    found = fit(source.weights, target, first_convolution(network), concatenated_stages(network), adapt)
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


def _misfit(path: str | Path, source: Source, target: Mapping[str, Tensor], found: Fit, channels: int) -> str:
    """The message for an encoder of another architecture."""
    theirs, ours = describe(source.weights), {**describe(target), "input channels": channels}
    differences = [f"{key}: file {theirs[key]}, here {ours[key]}" for key in ours if theirs[key] != ours[key]]
    listed = "; ".join(found.misfits[:5]) + (f"; and {len(found.misfits) - 5} more" if len(found.misfits) > 5 else "")
    return (
        f"--init {path} ({source.kind}) does not fit this network. They differ in: {'; '.join(differences) or 'names'}"
        f". Tensors: {listed}. Use plans with the same architecture (e.g. -p nnUNetResEncUNetLPlans for a ResEnc-L "
        "checkpoint), adapt what can be adapted with --init-adapt (other kernel sizes, more or fewer stages), or leave "
        "out --init. Only one-channel weights can be adapted to another number of input channels."
    )


def describe(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The architecture of an encoder, read off the names and shapes of its tensors.

    Returns:
        Backbone, input channels, and per stage: features, kernel sizes and number of convolutions.
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
