"""The one engine that brings the weights of a file into an encoder: by name, and by rules that are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from nnunetv2_kaf.channels import identity_projection, pad_input_channels, repeat_input_channels, resize_kernel
from nnunetv2_kaf.errors import KAFError

CONVOLUTIONAL = ("encoder.stem.", "encoder.stages.")
LAYERS = "encoder.layers."


class Fit(NamedTuple):
    """How the weights of a file meet an encoder.

    Attributes:
        values: Tensors to copy, by name, in the shape of the encoder's.
        adapted: The rule that made a tensor fit, by name, or why one of the file is not used.
        left: Names that stay at their initialisation.
        misfits: What does not fit, one line each.
    """

    values: dict[str, Tensor]
    adapted: dict[str, str]
    left: list[str]
    misfits: list[str]


def fit(
    weights: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    first: list[str],
    concatenated: tuple[str, ...],
    adapt: bool = False,
) -> Fit:
    """Bring the weights of a file into the shapes of an encoder.

    Args:
        weights: Weights of the file.
        target: State dict of the encoder.
        first: Names of the weights that see the input.
        concatenated: Prefixes of the stages whose input is doubled by a `concat` fusion.
        adapt: Also take weights of other kernel sizes (`resize_kernel`), and of an encoder with more or fewer stages or
            convolutions: what the file does not have stays as it is, what the encoder does not have is not used.
    """
    result = Fit({}, {}, [], [])
    for name, tensor in target.items():
        if name.startswith(LAYERS):
            continue
        try:
            value, rule = _fit_tensor(name, tensor, weights, name in first, name.startswith(concatenated), adapt)
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
        elif adapt:
            result.adapted[name] = "not used: this encoder has fewer stages or convolutions"
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
    name: str, tensor: Tensor, weights: Mapping[str, Tensor], is_first: bool, concatenated: bool, adapt: bool
) -> tuple[Tensor | None, str]:
    """Value for one tensor and the rule that made it fit; None = it stays as it is.

    Raises:
        KAFError: The file has no tensor that fits.
    """
    value = weights.get(name)
    if value is None:
        if not (concatenated and _is_new_skip(name, weights)):
            if adapt:
                return None, ""
            raise KAFError("not in the file")
        if tensor.ndim == 1:
            return None, ""
        return identity_projection(tensor), "identity on the features, 0 on the fusion (the file skips unprojected)"
    if value.shape == tensor.shape:
        return value, ""
    rule = ""
    if adapt and value.ndim == tensor.ndim > 2 and value.shape[2:] != tensor.shape[2:]:
        rule = f"kernel {list(value.shape[2:])} summed or padded to {list(tensor.shape[2:])}"
        value = resize_kernel(value, tensor.shape[2:])
        if value.shape == tensor.shape:
            return value, rule
    same = value.ndim == tensor.ndim > 1 and value.shape[0] == tensor.shape[0] and value.shape[2:] == tensor.shape[2:]
    if same and is_first:
        channels = tensor.shape[1]
        repeated = f"1 input channel repeated for {channels}, divided by {channels}"
        return repeat_input_channels(value, channels), ", ".join(filter(None, (rule, repeated)))
    if same and concatenated and 2 * value.shape[1] == tensor.shape[1]:
        padded = "weights on the features, 0 on the fusion"
        return pad_input_channels(value, tensor.shape[1]), ", ".join(filter(None, (rule, padded)))
    raise KAFError(f"shape {tuple(value.shape)} in the file, {tuple(tensor.shape)} here")


def _is_new_skip(name: str, others: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to the projected skip of a residual block that skips unprojected in the other network.

    A block projects its skip if it changes the number of channels, so a doubled input adds or removes a projection.
    """
    block, is_skip, _ = name.partition(".skip.")
    return bool(is_skip) and not any(other.startswith(f"{block}.skip.") for other in others)
