"""See inside a `KAFUNet`: keypoints and their scales, attention, and what the fusion adds, as arrays.

    with inspect.Inspection(network) as seen:
        logits = network(image)
    seen.levels[1].attention  # (B, blocks, heads, K, K)

Everything is read by hooks: the forward pass runs as it would without them, its outputs and gradients are bit for bit
the same. Attention is computed a second time from the queries and keys that the pass itself produced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nnunetv2_kaf.attention import SelfBlock
from nnunetv2_kaf.coordinates import to_mm
from nnunetv2_kaf.encoder import KAFEncoder
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.fusion import KAFLayer
from nnunetv2_kaf.keypoints import Keypoints


@dataclass(frozen=True)
class Level:
    """What one keypoint-augmented fusion layer did in a forward pass.

    Attributes:
        level: Its number in the encoder, 0 = full resolution.
        stride: D strides of the level relative to the input.
        attention: (B, blocks, heads, K, K) float32; [..., i, j] is the share that keypoint i takes from keypoint j.
            Rows of valid keypoints sum to 1 over the valid ones, all else is 0.
        tokens: (B, K, D), after all blocks; 0 for invalid keypoints.
        features: (B, *S_l) float32, length of the feature vector at every voxel, before the fusion.
        added: (B, *S_l) float32, length of the vector that the fusion adds (`add`) or appends (`concat`).
    """

    level: int
    stride: tuple[int, ...]
    attention: Tensor
    tokens: Tensor
    features: Tensor
    added: Tensor


class Inspection:
    """Context manager that records the last forward pass of a network.

    Args:
        network: A `KAFUNet` or its encoder. Of one inside `torch.compile` call `unwrapped(network)`: compiled code runs
            no hooks that were registered after its compilation.

    Attributes:
        keypoints: Points of the last forward pass.
        levels: `Level` by number of the encoder level.

    Raises:
        KAFError: The network has no keypoint layers.
    """

    keypoints: Keypoints

    def __init__(self, network: nn.Module) -> None:
        self.encoder = kaf_encoder(network)
        self.levels: dict[int, Level] = {}
        self._handles: list[RemovableHandle] = []
        self._attention: list[Tensor] = []
        self._mask: Tensor | None = None

    def __enter__(self) -> Inspection:
        """Register the hooks."""
        layer: Any
        for name, layer in self.encoder.layers.items():
            level = int(name)

            def see(module: KAFLayer, inputs: Any, output: Any, level: int = level) -> None:
                self._see_layer(level, module, inputs, output)

            self._keep(layer.register_forward_hook(see))
            for block in layer.blocks:
                self._keep(block.register_forward_pre_hook(self._see_mask))

                def see_qkv(module: nn.Module, inputs: Any, output: Tensor, block: SelfBlock = block) -> None:
                    self._see_qkv(block, output)

                self._keep(block.qkv.register_forward_hook(see_qkv))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def _see_mask(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._mask = inputs[1]

    @torch.no_grad()
    def _see_qkv(self, block: SelfBlock, qkv: Tensor) -> None:
        assert self._mask is not None
        self._attention.append(attention_of(qkv, block.num_heads, self._mask))

    @torch.no_grad()
    def _see_layer(self, level: int, layer: KAFLayer, inputs: Any, output: Any) -> None:
        features, keypoints, _ = inputs
        fused, tokens = (tensor.detach() for tensor in output)
        added = fused - features if layer.fusion == "add" else fused[:, features.shape[1] :]
        valid = keypoints.valid[:, None, None, :, None] & keypoints.valid[:, None, None, None, :]
        attention = torch.stack(self._attention, dim=1) * valid
        self._attention = []
        if level == self.encoder.kaf_levels[0]:
            self.levels = {}
            self.keypoints = keypoints
        self.levels[level] = Level(level, layer.stride, attention, tokens.float(), _length(features), _length(added))


def attention_of(qkv: Tensor, num_heads: int, mask: Tensor) -> Tensor:
    """The attention weights that `torch.nn.functional.scaled_dot_product_attention` applies and does not return.

    Args:
        qkv: (B, K, 3 D) queries, keys and values of all heads.
        num_heads: H, divides D.
        mask: Broadcasts to (B, H, K, K), bool, True where attention is allowed.

    Returns:
        (B, H, K, K) float32; rows sum to 1.
    """
    parts: Tensor = qkv.float().unflatten(-1, (3, num_heads, -1))  # type: ignore[no-untyped-call]
    query, key, _ = parts.permute(2, 0, 3, 1, 4).unbind(0)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


def scales_mm(encoder: KAFEncoder, image: Tensor, keypoints: Keypoints) -> Tensor:
    """(B, K) standard deviation, in mm, of the finer one of the two blurs that a keypoint is an extremum between."""
    spacing = layer_spacing(encoder)
    steps = torch.tensor(encoder.config.detection_scales, device=image.device) * min(spacing)
    return steps[encoder.detector.scales(image, keypoints)]


def layer_spacing(encoder: KAFEncoder) -> tuple[float, ...]:
    """Voxel spacing of the network's input in mm, array order."""
    layer: Any = next(iter(encoder.layers.values()))
    return tuple(float(s) for s in layer.spacing)


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and `torch.compile`."""
    inner: nn.Module = getattr(network, "module", network)
    found: nn.Module = getattr(inner, "_orig_mod", inner)
    return found


def kaf_encoder(network: nn.Module) -> KAFEncoder:
    """The encoder with keypoint layers of a network.

    Raises:
        KAFError: It has none.
    """
    network = unwrapped(network)
    encoder = network if isinstance(network, KAFEncoder) else getattr(network, "encoder", None)
    if not isinstance(encoder, KAFEncoder):
        raise KAFError(
            f"{type(network).__name__} has no keypoint layers, so there are no keypoints and no attention to see. Give "
            "a KAFUNet: a model of nnUNetTrainerKAF, or a pretraining with --network kaf."
        )
    return encoder


def spread_out(coords: Tensor, valid: Tensor, spacing: Sequence[float], count: int) -> list[int]:
    """Choose keypoints that lie far from each other: the first (strongest), then always the farthest of all chosen.

    Args:
        coords: (K, D) voxels, strongest first.
        valid: (K,) bool.
        spacing: D mm per voxel.
        count: How many at most.

    Returns:
        Indices of at most `count` valid keypoints.
    """
    usable = valid.nonzero().flatten().tolist()
    if not usable:
        return []
    points = to_mm(coords[usable].double(), spacing)
    chosen = [0]
    distance = (points - points[0]).norm(dim=1)
    while len(chosen) < min(count, len(usable)):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return [usable[i] for i in chosen]


def _length(vectors: Tensor) -> Tensor:
    """(B, C, *S) -> (B, *S)."""
    out: Tensor = torch.linalg.vector_norm(vectors.detach().float(), dim=1)
    return out
