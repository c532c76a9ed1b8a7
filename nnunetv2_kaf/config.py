"""`KAFConfig`: everything that defines the keypoint-augmented fusion layers, in one frozen record.

The record is written into the `kaf` block of nnU-Net's plans (`architecture.arch_kwargs.kaf`) and saved with every
model, complete, so that a later change of a default never changes an old model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nnunetv2_kaf.errors import KAFError

FUSIONS = ("add", "concat")
# A patch gets at most one keypoint per so many voxels, about the density of the paper's (350 on a slice of 50,000
# pixels). On small slices 256 of them would cost more than the UNet.
VOXELS_PER_KEYPOINT = 128
# Beyond any use; a number above comes from a damaged file, and would take all memory.
LARGEST = {"num_keypoints": 65536, "token_dim": 4096, "num_blocks": 256, "num_heads": 256}
# Plans put no layer at full resolution, the most expensive one: short trainings found no gain from it.
FINEST_LEVEL = 1


@dataclass(frozen=True)
class KAFConfig:
    """The keypoint-augmented fusion layers of a `KAFUNet`.

    The defaults are the cheap form; `KAFConfig.paper()` gives the widths and depths of the paper (Yang et al., NeurIPS
    2023, section 3.1), whose feature map is the same operator with two convolutions and a normalisation in between.

    Attributes:
        num_keypoints: K, keypoints per sample; fewer detections are padded and masked, more are cut to the strongest.
        levels: Encoder levels that carry a layer (0 = full resolution); None = every level but the bottleneck, as in
            the paper. Plans name them, see `planned`.
        token_dim: D, width of the keypoint tokens.
        num_blocks: self-attention blocks per level.
        num_heads: Attention heads; must divide `token_dim`.
        mlp_ratio: Width of the blocks' residual MLP, in multiples of D.
        position_hidden: Hidden widths of the position encoding's MLP.
        fusion: "add" (zero-initialised residual) or "concat" (the paper's).
        diffusion_channels: None = one convolution D -> C of the scattered tokens; a number H = the paper's
            conv D -> H, instance norm, ReLU, conv H -> C.
        detection_channels: Input channels that keypoints are detected in; the image channels, never a cascade's
            one-hot segmentation.
        detection_scales: Standard deviations of the Gaussian scale space, in multiples of the finest voxel spacing;
            at least three, ascending.
        detection_threshold: Smallest difference-of-Gaussians response of a keypoint, in multiples of the standard
            deviation of its channel in the patch.
        activation_checkpointing: Compute the activations of each stage of encoder and decoder a second time in the
            backward pass instead of keeping them: less memory, more time, the same result (Chen et al., 2016).

    Raises:
        KAFError: A value is out of range; the message names the option.
    """

    num_keypoints: int = 256
    levels: tuple[int, ...] | None = None
    token_dim: int = 96
    num_blocks: int = 2
    num_heads: int = 4
    mlp_ratio: float = 2.0
    position_hidden: tuple[int, ...] = (64,)
    fusion: str = "add"
    diffusion_channels: int | None = None
    detection_channels: tuple[int, ...] = (0,)
    detection_scales: tuple[float, ...] = (0.8, 1.27, 2.02, 3.2)
    detection_threshold: float = 0.03
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name, most in LARGEST.items():
            value = getattr(self, name)
            _require(_is_int(value) and 1 <= value <= most, name, value, f"a whole number from 1 to {most}")
        _require(self.token_dim % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of {self.token_dim}")
        _require(0 < self.mlp_ratio <= 64, "mlp_ratio", self.mlp_ratio, "a number above 0, at most 64")
        _require(self.fusion in FUSIONS, "fusion", self.fusion, f"one of {FUSIONS}")
        if self.levels is not None:
            ok = all(_is_int(i) and i >= 0 for i in self.levels) and len(set(self.levels)) == len(self.levels)
            _require(ok and len(self.levels) > 0, "levels", self.levels, "distinct encoder levels from 0 up, or null")
        if self.diffusion_channels is not None:
            ok = _is_int(self.diffusion_channels) and 1 <= self.diffusion_channels <= 4096
            _require(ok, "diffusion_channels", self.diffusion_channels, "a whole number from 1 to 4096, or null")
        _require(
            len(self.position_hidden) <= 16 and all(_is_int(i) and 1 <= i <= 4096 for i in self.position_hidden),
            "position_hidden",
            self.position_hidden,
            "at most 16 widths from 1 to 4096",
        )
        _require(
            len(self.detection_channels) > 0 and all(_is_int(i) and i >= 0 for i in self.detection_channels),
            "detection_channels",
            self.detection_channels,
            "at least one channel index from 0 up",
        )
        scales = self.detection_scales
        ascending = all(a < b for a, b in pairwise(scales))
        _require(
            3 <= len(scales) <= 16 and scales[0] > 0 and ascending and scales[-1] <= 64,
            "detection_scales",
            scales,
            "three to 16 numbers, ascending, above 0, at most 64",
        )
        checkpointing = self.activation_checkpointing
        _require(isinstance(checkpointing, bool), "activation_checkpointing", checkpointing, "true or false")
        threshold = self.detection_threshold
        _require(0 <= threshold < math.inf, "detection_threshold", threshold, "a finite number, 0 or more")

    @classmethod
    def paper(cls, **overrides: Any) -> KAFConfig:
        """The paper's layer: D = 256, 9 blocks, conv 256 -> 64 -> C, concatenation (NeurIPS 2023, section 3.1)."""
        paper: dict[str, Any] = {
            "token_dim": 256,
            "num_blocks": 9,
            "position_hidden": (32, 64, 128, 256),
            "fusion": "concat",
            "diffusion_channels": 64,
        }
        return cls(**{**paper, **overrides})

    @classmethod
    def paper_code(cls, **overrides: Any) -> KAFConfig:
        """The layer of the paper's code, which runs each of its 9 blocks twice on the same points: 18 blocks."""
        return cls.paper(**{"num_blocks": 18, **overrides})

    def planned(self, patch_size: Sequence[int], n_stages: int, finest_level: int = FINEST_LEVEL) -> KAFConfig:
        """These layers as plans have them: one keypoint per 128 voxels at most, and the levels by their numbers.

        Args:
            patch_size: Patch size of the configuration, in voxels.
            n_stages: Stages of the encoder, the bottleneck among them.
            finest_level: Finest level with a layer, where this record names none; an encoder of two stages has level 0
                only.
        """
        most = max(1, int(math.prod(patch_size)) // VOXELS_PER_KEYPOINT)
        levels = self.levels
        if levels is None and n_stages >= 2:
            levels = tuple(range(min(finest_level, n_stages - 2), n_stages - 1))
        return dataclasses.replace(self, num_keypoints=min(self.num_keypoints, most), levels=levels)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types (tuples become lists); the inverse of `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> KAFConfig:
        """Read a `kaf` block.

        Args:
            block: JSON types; fields that are absent take today's default.

        Raises:
            KAFError: A key is unknown or a value is out of range.
        """
        if not isinstance(block, Mapping):
            raise KAFError(
                f"the plans' kaf block (architecture.arch_kwargs.kaf): found {block!r}, expected a dict of options. "
                "Plan again with nnUNetPlannerKAF."
            )
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in set(block) - set(known))
        if unknown:
            raise KAFError(
                f"unknown key(s) {unknown} in the plans' kaf block (architecture.arch_kwargs.kaf); known keys are "
                f"{known}. Fix the spelling, or install the nnunetv2-kaf version that wrote these plans."
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in block.items()}
        try:
            return cls(**values)
        except (TypeError, LookupError) as error:
            raise KAFError(f"the plans' kaf block holds a value of the wrong type: {dict(block)} ({error})") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(ok: bool, option: str, found: object, expected: str) -> None:
    if not ok:
        raise KAFError(
            f"kaf option {option}: found {found!r}, expected {expected}. Correct it in the plans' kaf block."
        )
