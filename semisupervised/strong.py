"""The strong view: nnU-Net's intensity augmentation, stronger and more often, on a whole batch on its device.

Parameters are drawn on their own and applied by pure functions, so every view can be replayed. Nothing here moves a
voxel: the teacher's labels of the weak view hold for the strong one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_kaf.errors import KAFError

BRIGHTNESS, CONTRAST, GAMMA, INVERT, BLUR, ZOOM, NOISE = range(7)
"""Columns of the parameters."""
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)
"""Parameters that change nothing."""
BLUR_RADIUS = 4
_LIMITS = {
    "brightness": (0.0, 100.0),
    "contrast": (0.0, 100.0),
    "gamma": (0.01, 100.0),
    "blur": (0.1, BLUR_RADIUS / 2),
    "low_resolution": (0.05, 1.0),
    "noise": (0.0, 100.0),
}
"""Lowest and highest value of each range; beyond its highest a blur would be cut off."""


@dataclass(frozen=True)
class StrongAugmentation:
    """Probabilities and uniform ranges; nnU-Net's own values in brackets.

    Attributes:
        p_brightness: Probability per channel of a multiplication [0.15].
        brightness: Range of the factor [0.75 to 1.25].
        p_contrast: Probability per channel of a change of contrast about the mean [0.15].
        contrast: Range of the factor [0.75 to 1.25].
        p_gamma: Probability per channel of a gamma correction that keeps mean and standard deviation [0.4].
        gamma: Range of the exponent [0.7 to 1.5].
        p_invert: Share of the gamma corrections that are done on the inverted image [0.25].
        p_blur: Probability per channel of a Gaussian blur [0.1].
        blur: Range of its standard deviation in voxels [0.5 to 1].
        p_low_resolution: Probability per channel of a lower resolution [0.125].
        low_resolution: Range of the factor [0.5 to 1].
        p_noise: Probability per channel of Gaussian noise [0.1].
        noise: Range of its variance, in units of the normalised image [0 to 0.1].

    Raises:
        KAFError: A probability is not from 0 to 1, or a range is empty or goes beyond what can be computed.
    """

    p_brightness: float = 0.5
    brightness: tuple[float, float] = (0.6, 1.4)
    p_contrast: float = 0.5
    contrast: tuple[float, float] = (0.5, 1.5)
    p_gamma: float = 0.5
    gamma: tuple[float, float] = (0.5, 2.0)
    p_invert: float = 0.25
    p_blur: float = 0.4
    blur: tuple[float, float] = (0.5, 1.5)
    p_low_resolution: float = 0.25
    low_resolution: tuple[float, float] = (0.5, 1.0)
    p_noise: float = 0.3
    noise: tuple[float, float] = (0.0, 0.15)

    def __post_init__(self) -> None:
        """Check all values."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name.startswith("p_"):
                valid, expected = _is_number(value) and 0 <= value <= 1, "a probability, from 0 to 1"
            else:
                lowest, highest = _LIMITS[option.name]
                pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(v) for v in value)
                valid = pair and lowest <= value[0] <= value[1] <= highest
                expected = f"two numbers from {lowest:g} to {highest:g}, the smaller one first"
            if not valid:
                raise KAFError(f"StrongAugmentation.{option.name}: found {value!r}, expected {expected}. Correct it.")

    def draw(self, generator: np.random.Generator, channels: int) -> Tensor:
        """Draw the parameters of one patch.

        Args:
            generator: Source of all draws; the same number of them whatever they say.
            channels: C.

        Returns:
            (C, 7) float32, columns as named in this module.
        """
        names = ("brightness", "contrast", "gamma", "invert", "blur", "low_resolution", "noise")
        chance = generator.random((channels, len(names)))
        value = generator.random((channels, len(names)))
        out = np.tile(np.array(NEUTRAL), (channels, 1))
        for column, name in enumerate(names):
            if column == INVERT:
                out[:, INVERT] = chance[:, INVERT] < self.p_invert
                continue
            low, high = getattr(self, name)
            if name == "noise":
                drawn = np.sqrt(low + value[:, column] * (high - low))
            elif low < 1 < high and name != "blur":  # as often below 1 as above it, as nnU-Net draws
                side = np.where(value[:, column] < 0.5, low, high)
                drawn = 1 + (side - 1) * np.abs(2 * value[:, column] - 1)
            else:
                drawn = low + value[:, column] * (high - low)
            active = chance[:, column] < getattr(self, f"p_{name}")
            out[active, column] = drawn[active]
        return torch.from_numpy(out.astype(np.float32))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def strong_view(image: Tensor, parameters: Tensor, seeds: Tensor, flat_axis: bool = False) -> Tensor:
    """Change the intensities of a batch.

    Args:
        image: (B, C, *S) on any device; not changed.
        parameters: (B, C, 7) in main memory, of `StrongAugmentation.draw`.
        seeds: (B,) whole numbers in main memory, for the noise.
        flat_axis: Keep the resolution of the first spatial axis (slices that nnU-Net augments one by one).

    Returns:
        (B, C, *S), a new tensor.
    """
    columns = parameters.to(image.device, non_blocking=True)[(..., *(None,) * (image.ndim - 2))]
    spatial = tuple(range(2, image.ndim))
    out = _contrast(image, columns[:, :, CONTRAST], spatial) * columns[:, :, BRIGHTNESS]
    out = _gamma(out, columns[:, :, GAMMA], columns[:, :, INVERT], spatial)
    flat = out.flatten(0, 1)
    sigma = parameters[..., BLUR].flatten()
    blurred = torch.nonzero(sigma > 0).flatten()
    if len(blurred):
        index = blurred.to(image.device, non_blocking=True)
        flat = flat.index_copy(0, index, _blur(flat[index], sigma[blurred]))
    for i, zoom in enumerate(parameters[..., ZOOM].flatten().tolist()):
        if zoom < 1:
            flat[i] = _low_resolution(flat[i], zoom, flat_axis)
    out = flat.view_as(image)
    _add_noise(out, parameters[..., NOISE], seeds)
    return out


def _contrast(image: Tensor, factor: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Contrast about the mean, within the range of each channel."""
    mean = image.mean(spatial, keepdim=True)
    low, high = image.amin(spatial, keepdim=True), image.amax(spatial, keepdim=True)
    return ((image - mean) * factor + mean).clamp(low, high)


def _gamma(image: Tensor, gamma: Tensor, invert: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Gamma correction of the range of each channel that keeps its mean and standard deviation."""
    sign = 1 - 2 * invert
    image = image * sign
    low, high = image.amin(spatial, keepdim=True), image.amax(spatial, keepdim=True)
    extent = (high - low).clamp_min(1e-7)
    changed = ((image - low) / extent).clamp(0, 1).pow(gamma) * extent + low
    deviation, mean = torch.std_mean(image, spatial, keepdim=True)
    new_deviation, new_mean = torch.std_mean(changed, spatial, keepdim=True)
    changed = (changed - new_mean) / new_deviation.clamp_min(1e-7) * deviation + mean
    return torch.where(gamma == 1, image, changed) * sign


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of every image with its own standard deviation.

    Args:
        image: (N, *S).
        sigma: (N,) in voxels, in main memory.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(image.device, image.dtype, non_blocking=True)
    for axis in range(1, image.ndim):
        lines = image.movedim(axis, -1)
        shape = lines.shape
        padded = functional.pad(
            lines.reshape(1, shape[0], -1, shape[-1]), (BLUR_RADIUS, BLUR_RADIUS, 0, 0), "replicate"
        )
        smooth = functional.conv2d(padded, kernel[:, None, None], groups=shape[0])
        image = smooth.reshape(shape).movedim(-1, axis)
    return image


def _low_resolution(image: Tensor, zoom: float, flat_axis: bool) -> Tensor:
    """One channel (*S) at a lower resolution, back at its size."""
    size = [max(1, round(n * zoom)) for n in image.shape]
    if flat_axis:
        size[0] = image.shape[0]
    small = functional.interpolate(image[None, None], size=size, mode="nearest-exact")
    mode = "bilinear" if image.ndim == 2 else "trilinear"
    return functional.interpolate(small, size=image.shape, mode=mode)[0, 0]


def _add_noise(image: Tensor, deviation: Tensor, seeds: Tensor) -> None:
    """Add Gaussian noise in place; that of a patch depends on its seed alone."""
    device = image.device if image.device.type == "cuda" else torch.device("cpu")
    for i in torch.nonzero((deviation > 0).any(1)).flatten().tolist():
        generator = torch.Generator(device).manual_seed(int(seeds[i]))
        noise = torch.randn(image.shape[1:], generator=generator, device=device).to(image.device)
        scale = deviation[i].to(image.device, non_blocking=True)
        image[i] += noise * scale[(..., *(None,) * (image.ndim - 2))]
