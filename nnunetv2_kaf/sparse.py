"""Convolutions of maps that hold something at few voxels only, evaluated around those voxels.

A map of scattered tokens is zero almost everywhere, so nearly all work of a dense convolution on it is work on nothing.
Here a voxel's vector is multiplied with the whole kernel once and added to its neighbours: the result equals that of
`torch.nn.functional.conv2d` / `conv3d` with zero padding, in output and gradients, up to the order of summation.

Maps are (B, C, V), V = the voxels in row-major order, so that a feature map is one by `flatten(2)`: rearranging a whole
map costs more than everything that is done around the keypoints. Shapes depend on K and on the map alone, never on the
values, so that nothing here waits for the device or breaks a compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Adding one number to a map costs about as much as this many multiplications of a dense convolution.
_SCATTER_COST = 90.0


class Sites(NamedTuple):
    """The distinct voxels that a convolution of scattered tokens can reach, S slots per sample.

    Attributes:
        voxel: (B, S) flat indices, 0 in slots that are not used.
        used: (B, S) bool.
        slot: (B, N) the slot of each of the N contributions that the sites were made from; contributions outside the
            map lead to a slot that is not used.
    """

    voxel: Tensor
    used: Tensor
    slot: Tensor


def add_at(flat: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A map with vectors added at some of its voxels; several at one voxel sum up.

    Args:
        flat: (B, C, V).
        index: (B, N) of voxels.
        values: (B, C, N).

    Returns:
        (B, C, V).
    """
    return flat.scatter_add(2, index.unsqueeze(1).expand(-1, flat.shape[1], -1), values.to(flat.dtype))


def neighbours(index: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Voxels that each kernel tap of each voxel writes to.

    Args:
        index: (B, N) flat voxel indices.
        shape: Spatial shape S of the map.
        kernel: Odd kernel sizes.

    Returns:
        target: (B, taps, N) flat indices, clamped into the map; inside: (B, taps, N) bool, False where clamped.
    """
    target = torch.zeros_like(index).unsqueeze(1)
    inside = torch.ones_like(target, dtype=torch.bool)
    remaining = math.prod(shape)
    for n, k in zip(shape, kernel, strict=True):
        remaining //= n
        position = torch.div(index, remaining, rounding_mode="floor") % n
        # tap t of a convolution reads voxel i + t - k // 2, so a value at p reaches i = p - (t - k // 2)
        offset = k // 2 - torch.arange(k, device=index.device)
        voxel = position.unsqueeze(1) + offset.unsqueeze(-1)
        ok = (voxel >= 0) & (voxel < n)
        target = (target.unsqueeze(2) * n + voxel.clamp(0, n - 1).unsqueeze(1)).flatten(1, 2)
        inside = (inside.unsqueeze(2) & ok.unsqueeze(1)).flatten(1, 2)
    return target, inside


def contributions(values: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """What vectors add to their neighbours under a convolution.

    Args:
        values: (B, D, N).
        inside: (B, taps, N) from `neighbours`.
        weight: (C, D, *kernel).

    Returns:
        (B, C, taps * N), zero outside the map; single precision under autocast, because many are summed.
    """
    taps = weight.flatten(2).transpose(1, 2).flatten(0, 1).to(values.dtype)
    out = torch.bmm(taps.expand(values.shape[0], -1, -1), values)
    out = out if out.dtype == torch.float64 else out.float()
    return out.view(out.shape[0], weight.shape[0], *inside.shape[1:]).mul_(inside.unsqueeze(1)).flatten(2)


def conv_at(values: Tensor, index: Tensor, shape: Sequence[int], weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """Zero-padded convolution of a map that holds `values` at `index` and zero elsewhere.

    Args:
        values: (B, D, N); those at one voxel sum up.
        index: (B, N) flat voxel indices.
        shape: Spatial shape S of the map.
        weight: (C, D, *kernel), odd kernel sizes, as of `torch.nn.Conv2d` / `Conv3d`.
        onto: (B, C, V) to add the result to; None = zeros.

    Returns:
        (B, C, V).
    """
    target, inside = neighbours(index, shape, weight.shape[2:])
    added = contributions(values, inside, weight)
    if onto is None:
        onto = added.new_zeros(index.shape[0], weight.shape[0], math.prod(shape))
    return add_at(onto, target.flatten(1), added)


def unique_sites(target: Tensor, inside: Tensor, num_voxels: int) -> Sites:
    """The distinct voxels among those that contributions go to, by one sort.

    Args:
        target: (B, N) flat voxel indices.
        inside: (B, N) bool, False for contributions that do not count.
        num_voxels: V.

    Returns:
        Sites with S = min(N, V + 1) slots: one more than voxels, for what does not count.
    """
    slots = min(target.shape[1], num_voxels + 1)
    ordered, order = torch.where(inside, target, num_voxels).sort(dim=1)
    starts = functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
    group = starts.long().cumsum(dim=1)
    slot = torch.empty_like(group).scatter_(1, order, group)
    # every contribution of a group writes the same voxel
    voxel = torch.full_like(ordered[:, :slots], num_voxels).scatter_(1, group, ordered)
    used = voxel < num_voxels
    return Sites(voxel * used, used, slot)


def normalize_sites(
    values: Tensor, used: Tensor, num_voxels: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Instance normalisation of a map that holds `values` at its sites and zero at all other voxels.

    Args:
        values: (B, C, S), zero in slots that are not used.
        used: (B, S) bool.
        num_voxels: V, sites and all others.
        weight: (C,) of the normalisation.
        bias: (C,) of the normalisation.
        eps: Added to the variance by the normalisation.

    Returns:
        (B, C, S) normalised values; (B, C, 1) the value that zero becomes, which all other voxels hold.
    """
    mean = values.sum(dim=2, keepdim=True) / num_voxels
    others = num_voxels - used.sum(dim=1).to(values.dtype).view(-1, 1, 1)
    squares = ((values - mean).square() * used.unsqueeze(1)).sum(dim=2, keepdim=True)
    # the other voxels' zeros deviate from the mean by the mean
    variance = (squares + others * mean.square()) / num_voxels
    scale = weight.to(values.dtype).unsqueeze(-1) * torch.rsqrt(variance + eps)
    offset = bias.to(values.dtype).unsqueeze(-1) - mean * scale
    return values * scale + offset, offset


def conv_constant(vector: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor) -> Tensor:
    """Zero-padded convolution of a map that holds one vector everywhere.

    It is constant inside and differs at the borders only, so it is computed on a map of the kernel's size and repeated.

    Args:
        vector: (B, D, 1).
        shape: Spatial shape S of the map.
        weight: (C, D, *kernel), odd kernel sizes.
        bias: (C,).

    Returns:
        (B, C, V); single precision under autocast.
    """
    kernel = weight.shape[2:]
    small = [min(n, k) for n, k in zip(shape, kernel, strict=True)]
    conv = functional.conv3d if len(shape) == 3 else functional.conv2d
    constant = vector.view(*vector.shape[:2], *[1] * len(shape)).expand(-1, -1, *small)
    out = conv(constant, weight.to(vector.dtype), bias.to(vector.dtype), padding=[k // 2 for k in kernel])
    out = out if out.dtype == torch.float64 else out.float()
    for axis, (n, k) in enumerate(zip(shape, kernel, strict=True), start=2):
        voxel = torch.arange(n, device=vector.device)
        border = k // 2
        if n > k:  # border voxels keep their distance to the border, all others are the middle one
            voxel = voxel.clamp(max=border) + (voxel - (n - 1 - border)).clamp(min=0)
        out = out.index_select(axis, voxel)
    return out.flatten(2)


def is_cheaper(num_values: int, num_voxels: int, in_channels: int) -> bool:
    """Whether a convolution of few voxels is cheaper around them than over the whole map.

    Per kernel tap and output channel, the dense form multiplies `in_channels` numbers at every voxel. The sparse form
    does so for every value, and adds the product to the map. The cost of an addition is measured
    (`benchmarks/scaling.py --cost-grid`).

    Args:
        num_values: Voxels that hold a value, per sample.
        num_voxels: V.
        in_channels: Input channels of the convolution.
    """
    return num_values * (in_channels + _SCATTER_COST) < num_voxels * in_channels
