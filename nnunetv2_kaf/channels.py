"""Rules by which a convolution's weights fit a network with other input channels or another kernel size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError


def repeat_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Make a one-channel first convolution an N-channel one: its weights repeated and divided by N.

    The response to N equal channels is the response of the one-channel convolution to one of them, so that channels of
    unit variance keep the scale of the activations that the weights were trained with.

    Args:
        weight: (F, 1, *kernel), or (F, N, *kernel), which is returned as it is.
        channels: N.

    Returns:
        (F, N, *kernel).

    Raises:
        KAFError: The weights have another number of channels, neither 1 nor N; which channel is which is unknown then.
    """
    if weight.shape[1] == channels:
        return weight
    if weight.shape[1] != 1:
        raise KAFError(
            f"input channels: found weights for {weight.shape[1]}, expected 1 (repeated for all channels) or {channels}"
        )
    return weight.repeat(1, channels, *[1] * (weight.ndim - 2)) / channels


def pad_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Append input channels of weight zero: the convolution after a `concat` fusion starts by ignoring the fusion.

    Args:
        weight: (F, C, *kernel).
        channels: Input channels to fill up to, at least C.

    Returns:
        (F, channels, *kernel).

    Raises:
        KAFError: `channels` is below C.
    """
    missing = channels - weight.shape[1]
    if missing < 0:
        raise KAFError(f"input channels: found weights for {weight.shape[1]}, expected at most {channels}")
    return torch.cat((weight, weight.new_zeros(weight.shape[0], missing, *weight.shape[2:])), dim=1)


def identity_projection(weight: Tensor) -> Tensor:
    """Weights that hand on the first F input channels, for a projection that the pretrained network does not have.

    A residual block whose input and output have equally many channels skips without a projection; after a `concat`
    fusion it needs one. The block's own normalisation follows, so the skip is kept up to its scale and mean.

    Args:
        weight: (F, C, 1, ...) of the projection, C at least F; only its shape, type and device are used.

    Returns:
        (F, C, 1, ...): the identity on the first F channels, zero on the others.
    """
    eye = torch.eye(weight.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    return eye.reshape(weight.shape)


def resize_kernel(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """Give a convolution another kernel size, axis by axis, around its centre.

    A larger kernel is padded with zeros: the function is the same. A smaller one takes the weights that lie outside
    onto its border: on a signal that does not change along this axis the response is the same.

    Args:
        weight: (F, C, *old), odd sizes.
        kernel: New sizes, odd, one per axis.

    Returns:
        (F, C, *kernel).

    Raises:
        KAFError: The number of axes differs, or a size is even and changes: it has no centre.
    """
    if len(kernel) != weight.ndim - 2:
        raise KAFError(f"kernel of {weight.ndim - 2} axes in the file, {len(kernel)} here")
    for axis, size in enumerate(kernel, start=2):
        old = weight.shape[axis]
        if old == size:
            continue
        if old % 2 == 0 or size % 2 == 0:
            raise KAFError(
                f"kernel {list(weight.shape[2:])} in the file, {list(kernel)} here: an even size has no centre"
            )
        margin = abs(old - size) // 2
        if size > old:
            zeros = weight.new_zeros([margin if a == axis else n for a, n in enumerate(weight.shape)])
            weight = torch.cat((zeros, weight, zeros), dim=axis)
            continue
        inner = weight.narrow(axis, margin, size).clone()
        inner.narrow(axis, 0, 1).add_(weight.narrow(axis, 0, margin).sum(axis, keepdim=True))
        inner.narrow(axis, size - 1, 1).add_(weight.narrow(axis, old - margin, margin).sum(axis, keepdim=True))
        weight = inner
    return weight
