"""Convolutions of maps that hold something at few voxels only, evaluated around those voxels.

A map of scattered tokens is zero almost everywhere, so nearly all work of a dense convolution on it is work on nothing.
Here a voxel's vector is multiplied with the whole kernel once and added to its neighbours: the result equals that of
`torch.nn.functional.conv2d` / `conv3d` with zero padding, in output and gradients, up to the order of summation.

Maps are rows (B, V, C), V = the voxels in row-major order: one voxel's vector lies in one piece of memory. Shapes depend
on K and on the map alone, never on the values, so that nothing here waits for the device or breaks a compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


# Adding one number to a map costs about as much as this many multiplications of a dense convolution.
_SCATTER_COST = 150.0


class Sites(NamedTuple):
    """The distinct voxels that a convolution of scattered tokens can reach, S slots per sample.

    Attributes:
        index: (B, S) flat voxel indices, 0 in slots that are not used.
        used: (B, S) bool.
        slot: (B, N) the slot of each of the N contributions that the sites were made from; contributions outside the
            map lead to a slot that is not used.
    """

    index: Tensor
    used: Tensor
    slot: Tensor


def to_map(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, V, C) -> (B, C, *S), a view."""
    return rows.transpose(1, 2).unflatten(2, tuple(shape))


def add_at(rows: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Add vectors to rows, in place; several on one row sum up.

    Args:
        rows: (B, V, C), contiguous.
        index: (B, N) of rows.
        values: (B, N, C).

    Returns:
        `rows`.
    """
    batch, num_rows, channels = rows.shape
    # one flat list of rows: adding along the first axis is several times faster than sample by sample
    sample = torch.arange(batch, device=index.device).unsqueeze(1)
    flat = (index + sample * num_rows).flatten()
    return rows.view(-1, channels).index_add_(0, flat, values.reshape(-1, channels)).view(rows.shape)


def neighbours(index: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Voxels that each kernel tap of each voxel writes to.

    Args:
        index: (B, N) flat voxel indices.
        shape: spatial shape S of the map.
        kernel: odd kernel sizes.

    Returns:
        target: (B, N, taps) flat indices, clamped into the map; inside: (B, N, taps) bool, False where clamped.
    """
    target = torch.zeros_like(index).unsqueeze(-1)
    inside = torch.ones_like(target, dtype=torch.bool)
    remaining = math.prod(shape)
    for n, k in zip(shape, kernel, strict=True):
        remaining //= n
        position = torch.div(index, remaining, rounding_mode="floor") % n
        # tap t of a convolution reads voxel i + t - k // 2, so a value at p reaches i = p - (t - k // 2)
        offset = k // 2 - torch.arange(k, device=index.device)
        voxel = position.unsqueeze(-1) + offset
        ok = (voxel >= 0) & (voxel < n)
        target = (target.unsqueeze(-1) * n + voxel.clamp(0, n - 1).unsqueeze(-2)).flatten(2)
        inside = (inside.unsqueeze(-1) & ok.unsqueeze(-2)).flatten(2)
    return target, inside


def contributions(values: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """What vectors add to their neighbours under a convolution.

    Args:
        values: (B, N, D).
        inside: (B, N, taps) from `neighbours`.
        weight: (C, D, *kernel).

    Returns:
        (B, N * taps, C), zero outside the map; single precision under autocast, because many are summed.
    """
    taps = weight.flatten(2).permute(1, 2, 0).flatten(1).to(values.dtype)
    out = (values @ taps).unflatten(-1, (-1, weight.shape[0]))
    out = out if out.dtype == torch.float64 else out.float()
    return out.mul_(inside.unsqueeze(-1)).flatten(1, 2)


def conv_at(values: Tensor, index: Tensor, shape: Sequence[int], weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """Zero-padded convolution of a map that holds `values` at `index` and zero elsewhere.

    Args:
        values: (B, N, D); those on one voxel sum up.
        index: (B, N) flat voxel indices.
        shape: spatial shape S of the map.
        weight: (C, D, *kernel), odd kernel sizes, as of `torch.nn.Conv2d` / `Conv3d`.
        onto: (B, V, C) rows to add the result to, in place; None = zeros.

    Returns:
        (B, V, C).
    """
    target, inside = neighbours(index, shape, weight.shape[2:])
    added = contributions(values, inside, weight)
    if onto is None:
        onto = added.new_zeros(index.shape[0], math.prod(shape), weight.shape[0])
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
    index = torch.full_like(ordered[:, :slots], num_voxels).scatter_(1, group, ordered)
    used = index < num_voxels
    return Sites(index * used, used, slot)


def normalize_sites(
    values: Tensor, used: Tensor, num_voxels: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Instance normalisation of a map that holds `values` at its sites and zero at all other voxels.

    Args:
        values: (B, S, C), zero in slots that are not used.
        used: (B, S) bool.
        num_voxels: V, sites and all others.
        weight: (C,) of the normalisation.
        bias: (C,) of the normalisation.
        eps: of the normalisation.

    Returns:
        (B, S, C) normalised values; (B, 1, C) the value that zero becomes, which all other voxels hold.
    """
    mean = values.sum(dim=1, keepdim=True) / num_voxels
    others = num_voxels - used.sum(dim=1).to(values.dtype).view(-1, 1, 1)
    squares = ((values - mean).square() * used.unsqueeze(-1)).sum(dim=1, keepdim=True)
    # the other voxels' zeros deviate from the mean by the mean
    variance = (squares + others * mean.square()) / num_voxels
    scale = weight.to(values.dtype) * torch.rsqrt(variance + eps)
    offset = bias.to(values.dtype) - mean * scale
    return values * scale + offset, offset


def conv_constant(vector: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor) -> Tensor:
    """Zero-padded convolution of a map that holds one vector everywhere.

    It is constant inside and differs at the borders only, so it is computed on a map of the kernel's size and repeated.

    Args:
        vector: (B, 1, D).
        shape: spatial shape S of the map.
        weight: (C, D, *kernel), odd kernel sizes.
        bias: (C,).

    Returns:
        (B, V, C), contiguous.
    """
    kernel = weight.shape[2:]
    small = [min(n, k) for n, k in zip(shape, kernel, strict=True)]
    conv = functional.conv3d if len(shape) == 3 else functional.conv2d
    constant = vector.transpose(1, 2).unflatten(2, [1] * len(shape)).expand(-1, -1, *small)
    out = conv(constant, weight.to(vector.dtype), bias.to(vector.dtype), padding=[k // 2 for k in kernel]).movedim(1, -1)
    out = out if out.dtype == torch.float64 else out.float()
    for axis, (n, k) in enumerate(zip(shape, kernel, strict=True), start=1):
        voxel = torch.arange(n, device=vector.device)
        border = k // 2
        if n > k:  # border voxels keep their distance to the border, all others are the middle one
            voxel = voxel.clamp(max=border) + (voxel - (n - 1 - border)).clamp(min=0)
        out = out.index_select(axis, voxel)
    return out.flatten(1, -2)


def is_cheaper(num_values: int, num_voxels: int, in_channels: int) -> bool:
    """Whether a convolution of few voxels is cheaper around them than over the whole map.

    Per kernel tap and output channel, the dense form multiplies `in_channels` numbers at every voxel. The sparse form
    does so for every value, and adds the product to the map. The cost of an addition is measured
    (`benchmarks/scaling.py --cost-grid`).

    Args:
        num_values: voxels that hold a value, per sample.
        num_voxels: V.
        in_channels: of the convolution.
    """
    return num_values * (in_channels + _SCATTER_COST) < num_voxels * in_channels
