"""Encoder plus heads: views and their keypoints -> embeddings. No loss inside."""

from __future__ import annotations

from typing import NamedTuple

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf import tokens as token_ops
from nnunetv2_kaf.coordinates import voxel_index
from nnunetv2_kaf.encoder import KAFEncoder
from nnunetv2_kaf.keypoints import Keypoints
from pretraining.config import PretrainConfig
from pretraining.objectives.heads import DescriptorHead, GlobalHead, Matcher, masked_mean, pool_grid


class Embeddings(NamedTuple):
    """What the losses see of 2B views: B first sides, then B second sides. `None` where a loss is off.

    Attributes:
        bottleneck: (2B, E) embedding of the pooled bottleneck.
        keypoints: (2B, E) embedding of the mean descriptor.
        descriptors: (2B, K, F) multi-scale keypoint descriptors.
        matching: (2B, K, F) descriptors after attention between the two views of a pair.
        dustbin: Scalar score of "no partner".
        valid: (2B, K) bool.
    """

    bottleneck: Tensor | None
    keypoints: Tensor | None
    descriptors: Tensor | None
    matching: Tensor | None
    dustbin: Tensor | None
    valid: Tensor


class PretrainingModel(nn.Module):
    """The encoder that is later fine-tuned, and the heads that are thrown away.

    Only the heads of losses that take part are built: a parameter without gradient would stop distributed training.

    Args:
        encoder: A `KAFEncoder`, or nnU-Net's own encoder (global losses on the bottleneck only).
        config: Which losses take part, and the sizes of the heads.
    """

    def __init__(self, encoder: nn.Module, config: PretrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        widths: list[int] = encoder.output_channels  # type: ignore[assignment]
        losses = config.components
        self.cells = config.pooling_grid
        pooled = widths[-1] * self.cells ** convert_conv_op_to_dim(encoder.conv_op)
        self.bottleneck_head = GlobalHead(pooled, widths[-1], config.projection_dim) if "bottleneck" in losses else None
        self.descriptor_head: DescriptorHead | None = None
        if isinstance(encoder, KAFEncoder) and losses.keys() - {"bottleneck"}:
            token_dims = [encoder.config.token_dim] * len(encoder.kaf_levels)
            self.descriptor_head = DescriptorHead(token_dims, config.descriptor_dim)
        self.keypoint_head = (
            GlobalHead(config.descriptor_dim, config.descriptor_dim, config.projection_dim)
            if "keypoints" in losses
            else None
        )
        self.matcher = (
            Matcher(config.descriptor_dim, config.transport_layers, num_heads=4) if "transport" in losses else None
        )

    def forward(self, views: Tensor, points: Keypoints) -> Embeddings:
        """Embed views and their keypoints.

        Args:
            views: (2B, C, *V), first sides before second sides.
            points: (2B, K, D) coordinates in view voxels, and validity.
        """
        skips, tokens = self._encode(views, points)
        bottleneck = keypoints = descriptors = matching = dustbin = None
        if self.bottleneck_head is not None:
            bottleneck = self.bottleneck_head(pool_grid(skips[-1], self.cells))
        if self.descriptor_head is not None:
            descriptors = self.descriptor_head(tokens)
        if self.keypoint_head is not None and descriptors is not None:
            keypoints = self.keypoint_head(masked_mean(descriptors, points.valid))
        if self.matcher is not None and descriptors is not None:
            matching = torch.cat(self.matcher(*descriptors.chunk(2), *points.valid.chunk(2)))
            # Not the parameter itself: distributed training looks for parameters behind the outputs.
            dustbin = self.matcher.dustbin.clone()
        return Embeddings(bottleneck, keypoints, descriptors, matching, dustbin, points.valid)

    @torch.no_grad()
    def describe(self, views: Tensor, points: Keypoints) -> tuple[Tensor, Tensor]:
        """What shows whether the encoder learns: descriptors (2B, K, F) and pooled bottlenecks (2B, C).

        Without a descriptor head, a point is described by the features of all encoder levels at its voxel.
        """
        skips, tokens = self._encode(views, points)
        pooled = pool_grid(skips[-1], self.cells)
        if self.bottleneck_head is not None:
            pooled = self.bottleneck_head(pooled)
        if self.descriptor_head is not None:
            return self.descriptor_head(tokens), pooled
        features = []
        for skip in skips:
            stride = [a // b for a, b in zip(views.shape[2:], skip.shape[2:], strict=True)]
            found = token_ops.gather(skip, voxel_index(points.coords, skip.shape[2:], stride))
            features.append(functional.normalize(found.float(), dim=2))
        return torch.cat(features, dim=2), pooled

    def _encode(self, views: Tensor, points: Keypoints) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of all encoder levels and, of a `KAFEncoder`, the tokens of its layers."""
        if not isinstance(self.encoder, KAFEncoder):
            return self.encoder(views), []
        output = self.encoder.forward_features(views, points)
        return output.skips, output.tokens
