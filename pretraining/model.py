"""Encoder plus heads: views -> embeddings. No loss inside."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from nnunetv2_kaf.encoder import KAFEncoder
from nnunetv2_kaf.keypoints import Keypoints
from pretraining.heads import DescriptorHead, GlobalHead, masked_mean


class Embeddings(NamedTuple):
    """What the losses see of N views.

    Attributes:
        bottleneck: (N, E) embedding of the pooled bottleneck.
        keypoints: (N, E) embedding of the mean descriptor.
        descriptors: (N, K, F) multi-scale keypoint descriptors.
        points: detected keypoints, coordinates in view voxels.
    """

    bottleneck: Tensor
    keypoints: Tensor
    descriptors: Tensor
    points: Keypoints


class PretrainingModel(nn.Module):
    """The encoder that is later fine-tuned, and the heads that are thrown away."""

    def __init__(self, encoder: KAFEncoder, projection_dim: int, descriptor_dim: int) -> None:
        """Build the heads for an encoder."""
        super().__init__()
        self.encoder = encoder
        width = encoder.output_channels[-1]
        self.bottleneck_head = GlobalHead(width, projection_dim)
        self.descriptor_head = DescriptorHead([encoder.config.token_dim] * len(encoder.kaf_levels), descriptor_dim)
        self.keypoint_head = GlobalHead(descriptor_dim, projection_dim)

    def forward(self, views: Tensor) -> Embeddings:
        """Embed views (N, C, *V)."""
        output = self.encoder.forward_features(views)
        bottleneck = self.bottleneck_head(output.skips[-1].flatten(2).mean(2))
        descriptors = self.descriptor_head(output.tokens)
        aggregate = self.keypoint_head(masked_mean(descriptors, output.keypoints.valid))
        return Embeddings(bottleneck, aggregate, descriptors, output.keypoints)
