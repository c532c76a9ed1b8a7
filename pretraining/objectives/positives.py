"""Which views of a batch are positives of each other in the global losses."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError


def simclr_positives(count: int, device: torch.device | None = None) -> Tensor:
    """Build the positive mask of the two views of a pair: Chen et al., SimCLR, ICML 2020.

    Args:
        count: Number of views N; i and i + N/2 are the two sides of a pair.
        device: Device of the mask.

    Returns:
        (N, N) bool, symmetric, False on the diagonal.

    Raises:
        KAFError: If N is odd.
    """
    if count % 2:
        raise KAFError(f"Expected first sides before second sides, an even number of views; found {count}.")
    index = torch.arange(count, device=device)
    return index.unsqueeze(1) == (index + count // 2) % max(count, 1)


def partition_positives(positions: Tensor, partitions: int) -> Tensor:
    """Build the positive mask from equal parts of the volume.

    Chaitanya et al., Contrastive learning of global and local features for medical image segmentation with limited
    annotations, NeurIPS 2020 (GCL, loss G^D): volumes are cut into S parts; slices of the same part are positives,
    within and across volumes. In 3D the patch centres must be in the same part along every axis. The two sides of a
    pair are always positive, also on the two sides of a cut.

    Args:
        positions: (N, A) float in [0, 1]; first sides, then second sides.
        partitions: S, parts along each axis.

    Returns:
        (N, N) bool, symmetric, False on the diagonal.

    Raises:
        KAFError: If the shape is wrong, N is odd or S is not positive.
    """
    partners = _partners(positions)
    if partitions < 1:
        raise KAFError(f"The number of partitions is {partitions}; expected at least 1.")
    parts = (positions * partitions).floor().clamp(0, partitions - 1)
    return _without_diagonal((parts.unsqueeze(1) == parts.unsqueeze(0)).all(2) | partners)


def position_positives(positions: Tensor, threshold: float) -> Tensor:
    """Build the positive mask from positions along the volume.

    Zeng et al., Positional Contrastive Learning, MICCAI 2021: slices are positives if their normalised positions
    differ by less than a threshold, within and across volumes. In 3D every axis of the patch centre must be closer than
    the threshold. The two sides of a pair are always positive.

    Args:
        positions: (N, A) float in [0, 1]; first sides, then second sides.
        threshold: Largest difference, exclusive.

    Returns:
        (N, N) bool, symmetric, False on the diagonal.

    Raises:
        KAFError: If the shape is wrong or N is odd.
    """
    partners = _partners(positions)
    near = ((positions.unsqueeze(1) - positions.unsqueeze(0)).abs() < threshold).all(2)
    return _without_diagonal(near | partners)


def _partners(positions: Tensor) -> Tensor:
    """`simclr_positives` of views with these positions."""
    if positions.ndim != 2 or positions.shape[0] % 2:
        raise KAFError(f"Expected positions (2B, A), first sides before second sides; found {tuple(positions.shape)}.")
    return simclr_positives(positions.shape[0], positions.device)


def _without_diagonal(mask: Tensor) -> Tensor:
    return mask & ~torch.eye(mask.shape[0], dtype=torch.bool, device=mask.device)
