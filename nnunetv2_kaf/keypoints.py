"""Keypoint detection: image (B, C, *S) -> coordinates (B, K, D) and a validity mask (B, K).

Difference-of-Gaussians extrema in scale space (Lowe, IJCV 2004; Lindeberg, IJCV 1998), dimension generic, in pure torch
with fixed shapes, so that the same points are found in pretraining, training and prediction, and `torch.compile` sees
no data-dependent size.

Rule for several channels: each detection channel is measured in units of its own standard deviation in the patch, and a
voxel's response is the largest one over the channels. The channels are the image channels; the one-hot segmentation
channels that a cascade appends are never among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.coordinates import voxel_index
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.precision import autocast

# Responses below this fraction of the largest intensity are rounding of the blur, not structure.
_ROUNDING = 1e-4


class Keypoints(NamedTuple):
    """Keypoints of a batch, strongest first.

    Attributes:
        coords: (B, K, D) float32, input voxels, array order, voxel centres at integers (see `coordinates`).
        valid: (B, K) bool; invalid points have coordinate 0 and take part in nothing.
    """

    coords: Tensor
    valid: Tensor


def gaussian_kernel(sigma: float) -> Tensor:
    """Sampled Gaussian of `sigma` voxels, normalised, radius ceil(3 sigma); the identity for a sigma under 0.1."""
    radius = math.ceil(3 * sigma) if sigma >= 0.1 else 0
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (x / max(sigma, 1e-6)) ** 2)
    return (weights / weights.sum()).float()


def _blur_axis(x: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Convolve (N, 1, *S) along one spatial axis; the border voxel is repeated outward."""
    ndim = x.ndim - 2
    radius = (kernel.numel() - 1) // 2
    padding = [0, 0] * ndim
    padding[2 * (ndim - 1 - axis)] = padding[2 * (ndim - 1 - axis) + 1] = radius
    shape = [1] * (ndim + 2)
    shape[axis + 2] = kernel.numel()
    conv = functional.conv3d if ndim == 3 else functional.conv2d
    return conv(functional.pad(x, padding, mode="replicate"), kernel.to(x.dtype).view(shape))


def _neighbourhood_max(x: Tensor, axis: int) -> Tensor:
    """Maximum of each value and its two neighbours along one axis; one call per axis gives a 3^D window."""
    n = x.shape[axis]
    before = torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, n - 1)), dim=axis)
    after = torch.cat((x.narrow(axis, 1, n - 1), x.narrow(axis, n - 1, 1)), dim=axis)
    return torch.maximum(torch.maximum(x, before), after)


class KeypointDetector(nn.Module):
    """The strongest K scale-space extrema of an image.

    No parameters, no gradient, deterministic. The scales are fixed in millimetres: along an axis of coarse spacing the
    Gaussian spans correspondingly fewer voxels, so a 10 mm slice axis is not blurred like a 1.5 mm one.

    Args:
        config: Number of keypoints, channels, scales and threshold.
        spacing: D voxel spacings in mm, array order.

    Examples:
        A bright spot of 2 mm on a slice of 1 mm x 2 mm voxels is one keypoint; the other places stay empty:

        >>> import torch
        >>> from nnunetv2_kaf import KAFConfig, KeypointDetector
        >>> y, x = torch.meshgrid(torch.arange(32.0), torch.arange(24.0), indexing="ij")
        >>> spot = torch.exp(-((y - 20) ** 2 + (2 * (x - 8)) ** 2) / (2 * 2.0**2))
        >>> detector = KeypointDetector(KAFConfig(num_keypoints=4, detection_threshold=0.5), spacing=(1.0, 2.0))
        >>> keypoints = detector(spot[None, None])
        >>> keypoints.coords[keypoints.valid].tolist()
        [[20.0, 8.0]]
        >>> keypoints.valid.tolist()
        [[True, False, False, False]]
    """

    def __init__(self, config: KAFConfig, spacing: Sequence[float]) -> None:
        super().__init__()
        self.num_keypoints = config.num_keypoints
        self.channels = list(config.detection_channels)
        self.threshold = config.detection_threshold
        self.num_scales = len(config.detection_scales)
        self.ndim = len(spacing)
        previous = 0.0
        for i, scale in enumerate(config.detection_scales):
            # each scale is blurred from the one before it: variances add
            sigma_mm = math.sqrt(scale**2 - previous**2) * min(spacing)
            previous = scale
            for axis, mm in enumerate(spacing):
                self.register_buffer(f"kernel_{i}_{axis}", gaussian_kernel(sigma_mm / mm), persistent=False)

    def forward(self, image: Tensor) -> Keypoints:
        """Detect the keypoints of a batch.

        Args:
            image: (B, C, *S), any floating type; blurred in float32, on CUDA in float64.

        Returns:
            Keypoints of B samples; a sample's points depend on that sample alone.

        Raises:
            KAFError: The image has too few channels or voxels, or the wrong number of axes.
        """
        return self.detect(image)[0]

    @torch.no_grad()
    def detect(self, image: Tensor) -> tuple[Keypoints, Tensor]:
        """Detect the keypoints of a batch and say how strong they are.

        Args:
            image: As in `forward`.

        Returns:
            The keypoints, and their difference-of-Gaussians response (B, K) float32 in standard deviations of the
            channel; 0 where invalid.

        Raises:
            KAFError: As in `forward`.
        """
        self._check(image)
        batch, shape = image.shape[0], image.shape[2:]
        # Extrema are small differences of blurred images: autocast would blur in half precision, and on CUDA a
        # convolution of single precision uses TF32, which has as few digits.
        precision = torch.float64 if image.device.type == "cuda" else torch.float32
        with autocast(image.device.type):
            # no indexing with a list: it would be copied to the device
            channels = torch.stack([image[:, c] for c in self.channels], dim=1).to(precision)
            score = self._scores(channels).flatten(1)
        score, index = torch.topk(score, self.num_keypoints, dim=1)
        valid = score > 0
        axes = []
        for n in reversed(shape):
            axes.append(index % n)
            index = torch.div(index, n, rounding_mode="floor")
        coords = torch.stack(axes[::-1], dim=-1).float() * valid.unsqueeze(-1)
        return Keypoints(coords.reshape(batch, self.num_keypoints, len(shape)), valid), score

    @torch.no_grad()
    def scales(self, image: Tensor, keypoints: Keypoints) -> Tensor:
        """At which scale each keypoint was found, for pictures; `forward` needs no scales.

        Args:
            image: (B, C, *S), in which the keypoints were detected.
            keypoints: Points of the same batch.

        Returns:
            (B, K) long: index of the finer one of the two blurs whose difference is an extremum; 0 for invalid points.
        """
        precision = torch.float64 if image.device.type == "cuda" else torch.float32
        with autocast(image.device.type):
            channels = torch.stack([image[:, c] for c in self.channels], dim=1).to(precision)
            extrema = self._extrema(channels).flatten(2)
        index = voxel_index(keypoints.coords, image.shape[2:], [1] * self.ndim)
        found = extrema.gather(2, index.unsqueeze(1).expand(-1, extrema.shape[1], -1))
        return found.argmax(dim=1) * keypoints.valid

    def _scores(self, channels: Tensor) -> Tensor:
        """(B, C, *S) -> (B, *S): response where a voxel is an extremum in space and scale, else 0."""
        return self._extrema(channels).amax(dim=1)

    def _extrema(self, channels: Tensor) -> Tensor:
        """(B, C, *S) -> (B, scales - 1, *S): response where a voxel is an extremum in space and scale, else 0."""
        spatial = list(range(2, channels.ndim))
        deviation = channels.std(dim=spatial, keepdim=True, correction=0).float()
        floor = channels.abs().amax(dim=spatial, keepdim=True).float() * _ROUNDING
        response = self._difference_of_gaussians(channels)
        lowest = torch.maximum(self.threshold * deviation, floor).unsqueeze(2)
        response = torch.where(response > lowest, response, 0.0)
        response = response / deviation.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)
        response = response.amax(dim=1)
        neighbourhood = response
        for axis in range(1, response.ndim):  # the first one is the scale
            neighbourhood = _neighbourhood_max(neighbourhood, axis)
        extremum = (response > 0) & (response >= neighbourhood)
        return torch.where(extremum, response, 0.0)

    def _difference_of_gaussians(self, channels: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, scales - 1, *S), absolute values."""
        blurred = channels.flatten(0, 1).unsqueeze(1)
        levels = []
        for i in range(self.num_scales):
            for axis in range(self.ndim):
                blurred = _blur_axis(blurred, self.get_buffer(f"kernel_{i}_{axis}"), axis)
            levels.append(blurred)
        stack = torch.cat(levels, dim=1)
        difference = (stack[:, 1:] - stack[:, :-1]).abs().float()
        return difference.view(*channels.shape[:2], *difference.shape[1:])

    def _check(self, image: Tensor) -> None:
        if image.ndim != self.ndim + 2:
            raise KAFError(f"keypoint detection expects (B, C) and {self.ndim} axes, got shape {tuple(image.shape)}")
        if image.shape[1] <= max(self.channels):
            raise KAFError(
                f"kaf option detection_channels: found {self.channels}, but the input has {image.shape[1]} channel(s)"
            )
        voxels = math.prod(image.shape[2:])
        if voxels < self.num_keypoints:
            raise KAFError(
                f"kaf option num_keypoints: found {self.num_keypoints}, more than the {voxels} voxels of an input of "
                f"shape {tuple(image.shape[2:])}. Lower num_keypoints in the plans' kaf block."
            )
