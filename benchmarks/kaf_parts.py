"""The parts of a KAF network one by one, each as a step that can be timed, with the work it cannot avoid.

The floors count, in float32, batch 1:

- flops: of the products in linear layers, attention and convolutions; three times the forward pass where there is a
  backward pass (output, gradient of the input, gradient of the weights).
- bytes: inputs and outputs of the step once each (forward: features in, result out; backward: gradient in, gradient
  out); a map between two convolutions or normalisations five times (written and read; then its gradient written and
  read, and itself read again); weights three times (read twice, gradient written).

Pointwise operations, tokens and indices are left out. A convolution that saves multiplications (Winograd) can come
below its floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from limits import FLOAT, Work
from torch import Tensor, nn

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.fusion import Diffusion, KAFLayer
from nnunetv2_kaf.keypoints import KeypointDetector, Keypoints

CHANNELS = 32
"""Of the level with full resolution in nnU-Net's plans."""
PARTS = {
    "detection": "detection",
    "kaf": "KAF layer",
    "paper_sparse": "paper's layer, sparse",
    "paper_dense": "paper's layer, dense",
    "stage": "plain nnU-Net stage",
}


@dataclass(frozen=True)
class Part:
    """A step to be timed.

    Attributes:
        step: Does it once.
        alive: Tensors that are there before and after the step.
        work: What it cannot avoid.
    """

    step: Callable[[], object]
    alive: list[Tensor]
    work: Work


class Inputs:
    """What all parts of one size share.

    Args:
        shape: Shape of the patch.
        num_keypoints: K.
        seed: Seed of the image, the features and the points.
        device: Device of the tensors.
    """

    def __init__(self, shape: Sequence[int], num_keypoints: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.num_keypoints, self.seed, self.device = tuple(shape), num_keypoints, seed, device
        self.voxels = math.prod(shape)
        self.image = torch.randn(1, 1, *shape, generator=generator).to(device)
        self.features = torch.randn(1, CHANNELS, *shape, generator=generator).to(device).requires_grad_()
        # all valid and spread evenly, so that few neighbourhoods overlap: the most work for the sparse evaluation
        index = torch.randperm(self.voxels, generator=generator)[:num_keypoints]
        coords = torch.stack(torch.unravel_index(index, self.shape), dim=-1).float().unsqueeze(0).to(device)
        self.keypoints = Keypoints(coords, torch.ones(1, num_keypoints, dtype=torch.bool, device=device))


def build(name: str, inputs: Inputs) -> Part:
    """Build one of `PARTS`; layers have the weights of their initialisation, none of them zero."""
    if name == "detection":
        config = KAFConfig(num_keypoints=inputs.num_keypoints)
        detector = KeypointDetector(config, (1.0,) * len(inputs.shape)).to(inputs.device)
        alive = [inputs.image, *detector.buffers()]
        return Part(lambda: detector(inputs.image), alive, detection_work(detector, inputs.voxels))
    with torch.random.fork_rng([]):
        torch.manual_seed(inputs.seed)
        module = _stage() if name == "stage" else _layer(name, inputs)
    module = module.to(inputs.device)
    if isinstance(module, KAFLayer):
        layer, shape = module, inputs.shape
        return _trained(
            module, lambda: layer(inputs.features, inputs.keypoints, shape)[0], inputs, layer_work(layer, inputs)
        )
    return _trained(module, lambda: module(inputs.features), inputs, stage_work(module, inputs.voxels))


def _layer(name: str, inputs: Inputs) -> KAFLayer:
    kernel, ones = (3,) * len(inputs.shape), (1,) * len(inputs.shape)
    config = (KAFConfig if name == "kaf" else KAFConfig.paper)(num_keypoints=inputs.num_keypoints)
    layer = KAFLayer(config, CHANNELS, kernel, ones, [1.0] * len(inputs.shape))
    for parameter in layer.diffusion.last.parameters():
        nn.init.normal_(parameter, std=0.01)
    layer.diffusion.evaluation = "auto" if name == "kaf" else name.removeprefix("paper_")
    return layer


def _stage() -> nn.Module:
    """Two blocks of convolution, normalisation and nonlinearity, as in nnU-Net's plans."""
    norm = {"eps": 1e-5, "affine": True}
    stage: nn.Module = StackedConvBlocks(
        2, nn.Conv3d, CHANNELS, CHANNELS, 3, 1, True, nn.InstanceNorm3d, norm, None, None, nn.LeakyReLU,
        {"inplace": True},
    )  # fmt: skip
    return stage


def _trained(module: nn.Module, forward: Callable[[], Tensor], inputs: Inputs, work: Work) -> Part:
    """Forward and backward pass; gradients are freed at the end of the step."""
    gradient = torch.ones_like(forward().detach())

    def step() -> None:
        forward().backward(gradient)  # type: ignore[no-untyped-call]
        module.zero_grad(set_to_none=True)
        inputs.features.grad = None

    alive = [*module.parameters(), *module.buffers(), inputs.features, gradient, *inputs.keypoints]
    return Part(step, alive, work)


def detection_work(detector: KeypointDetector, voxels: int) -> Work:
    """Separable blur: one multiplication and addition per kernel value; the image is read once."""
    taps = sum(buffer.numel() for buffer in detector.buffers())
    return Work(FLOAT * voxels, 2.0 * taps * voxels)


def stage_work(stage: nn.Module, voxels: int) -> Work:
    """Two convolutions C -> C; between input and output lie three maps, before and after the first normalisation."""
    values = CHANNELS * voxels
    products = sum(module.weight.numel() for module in stage.modules() if isinstance(module, nn.Conv3d))
    return Work(FLOAT * (4.0 * values + 5 * 3 * values + 3 * _weights(stage)), 3 * 2.0 * products * voxels)


def layer_work(layer: KAFLayer, inputs: Inputs) -> Work:
    """Projection, position encoding, blocks and diffusion of one layer."""
    fused = CHANNELS * (1 if layer.fusion == "add" else 2)
    diffusion = diffusion_work(layer.diffusion, inputs.num_keypoints, inputs.voxels)
    products = sum(linear_products(module) for module in layer.modules())
    keypoints = inputs.num_keypoints
    # queries with keys and weights with values: K * K * D each
    attention = len(layer.blocks) * 4.0 * keypoints**2 * layer.project.out_features
    flops = 3 * (2.0 * keypoints * products + attention) + diffusion.flops
    values = 2.0 * (CHANNELS + fused) * inputs.voxels + 3 * _weights(layer)
    return Work(FLOAT * values + diffusion.bytes, flops)


def diffusion_work(diffusion: Diffusion, keypoints: int, voxels: int) -> Work:
    """Convolutions of the diffusion, and the maps between them that a dense evaluation makes.

    Around the keypoints, the first convolution runs at K voxels and the second at those it reached, at most all.
    Weights and output are left to the caller. "auto" counts the cheaper of the two evaluations.
    """
    first = diffusion.spread.weight
    taps = first[0, 0].numel()
    hidden = first.shape[0] if diffusion.refine is not None else 0
    second = diffusion.refine.weight.numel() if diffusion.refine is not None else 0
    sites = min(keypoints * taps, voxels)
    sparse = Work(0.0, 6.0 * (keypoints * first.numel() + sites * second))
    # the scattered map, and the hidden one before and after the normalisation
    maps = first.shape[1] + 2 * hidden
    dense = Work(5.0 * FLOAT * maps * voxels, 6.0 * voxels * (first.numel() + second))
    if diffusion.evaluation == "auto":
        return min(sparse, dense, key=lambda work: work.flops)
    return sparse if diffusion.evaluation == "sparse" else dense


def linear_products(module: nn.Module) -> int:
    """Multiplications of a linear layer per token."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
