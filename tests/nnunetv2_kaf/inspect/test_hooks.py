from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_kaf import inspect
from nnunetv2_kaf.attention import SelfBlock, attention_mask
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect import Inspection, attention_of, spread_out

Build = Callable[..., nn.Module]
SMALL = KAFConfig(num_keypoints=12, token_dim=16, num_blocks=2, position_hidden=(8,))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("fusion", ["add", "concat"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_equal_with_and_without(
    ndim: int, fusion: str, checkpointing: bool, build_kaf: Build, random_image: Any, randomize: Any
) -> None:
    config = replace(SMALL, fusion=fusion, activation_checkpointing=checkpointing)
    network = randomize(build_kaf(ndim, config, deep_supervision=True))
    image = random_image(ndim)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        network.zero_grad()
        outputs = network(image)
        sum(output.square().sum() for output in outputs).backward()
        return [o.detach() for o in outputs], [p.grad.clone() for p in network.parameters()]  # type: ignore[union-attr]

    before = run()
    with Inspection(network) as seen:
        during = run()
    after = run()
    assert sorted(seen.levels) == [0, 1]
    for other in (during, after):
        assert all(torch.equal(a, b) for a, b in zip(before[0], other[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before[1], other[1], strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_seen_is_what_the_pass_did(ndim: int, build_kaf: Build, random_image: Any, randomize: Any) -> None:
    network = randomize(build_kaf(ndim, SMALL))
    image = random_image(ndim)
    with Inspection(network) as seen, torch.no_grad():
        network(torch.zeros_like(image))
        network(image)  # the last pass counts
        encoded = network.encoder.forward_features(image)  # type: ignore[operator, union-attr]
    valid = encoded.keypoints.valid
    assert torch.equal(seen.keypoints.coords, encoded.keypoints.coords)
    for tokens, found in zip(encoded.tokens, seen.levels.values(), strict=True):
        assert found.attention.shape == (2, 2, 4, 12, 12)
        torch.testing.assert_close(found.attention.sum(-1), valid[:, None, None].expand(-1, 2, 4, -1).float())
        assert not found.attention.masked_select(~valid[:, None, None, None]).any()
        assert torch.equal(found.tokens, tokens)
        shape = tuple(n // s for n, s in zip(image.shape[2:], found.stride, strict=True))
        assert found.features.shape == found.added.shape == (2, *shape)
        assert found.added.gt(0).any()


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_what_the_fusion_adds(fusion: str, build_kaf: Build, random_image: Any, randomize: Any) -> None:
    network = randomize(build_kaf(2, replace(SMALL, fusion=fusion)))
    calls: list[tuple[Tensor, Tensor]] = []
    layer = network.encoder.layers["1"]  # type: ignore[index, union-attr]
    layer.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output[0])))
    with Inspection(network) as seen, torch.no_grad():
        network(random_image(2))
    ((features, fused),) = calls
    added = fused - features if fusion == "add" else fused[:, features.shape[1] :]
    torch.testing.assert_close(seen.levels[1].features, features.norm(dim=1))
    torch.testing.assert_close(seen.levels[1].added, added.norm(dim=1))
    assert seen.levels[1].added.gt(0).any()


@pytest.mark.parametrize("invalid", [0, 5])
def test_attention_is_the_one_that_pytorch_applies(invalid: int) -> None:
    torch.manual_seed(0)
    block = SelfBlock(16, 4, 2.0)
    tokens, valid = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    if invalid:
        valid[:, -invalid:] = False
    mask = attention_mask(valid)
    qkv = block.qkv(block.attention_norm(tokens))
    value = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)[2]
    attended = block.out((attention_of(qkv, 4, mask) @ value).transpose(1, 2).flatten(2))
    expected = tokens + attended
    torch.testing.assert_close(expected + block.mlp(expected), block(tokens, mask))


def test_a_plain_network_is_refused_in_words(build_plain: Build) -> None:
    with pytest.raises(KAFError, match="PlainConvUNet has no keypoint layers"):
        Inspection(build_plain(2))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_blob_is_found_at_its_scale(ndim: int, build_kaf: Build) -> None:
    """The wider a Gaussian blob, the coarser the scale of the keypoint at its centre (Lindeberg 1998)."""
    network = build_kaf(ndim, replace(SMALL, num_keypoints=1))
    encoder = inspect.kaf_encoder(network)
    spacing = inspect.layer_spacing(encoder)
    shape = (32, 48) if ndim == 2 else (16, 32, 32)
    axes = [(torch.arange(n) - n // 2) * s for n, s in zip(shape, spacing, strict=True)]
    distance = sum(g.square() for g in torch.meshgrid(*axes, indexing="ij"))
    found = []
    for width in (0.8, 4.0):
        image = torch.exp(-distance / (2 * width**2))[None, None]
        keypoints = encoder.detector(image)
        assert keypoints.coords[0, 0].tolist() == [n // 2 for n in shape]
        found.append(float(inspect.scales_mm(encoder, image, keypoints)[0, 0]))
    steps = [s * min(spacing) for s in SMALL.detection_scales]
    assert found[0] == pytest.approx(steps[0])
    assert found[1] == pytest.approx(steps[-2])


def test_spread_out_starts_with_the_strongest_and_counts_in_mm() -> None:
    coords = torch.tensor([[5.0, 5.0], [5.0, 6.0], [6.0, 5.0], [0.0, 0.0], [5.0, 15.0]])
    valid = torch.tensor([True, True, True, False, True])
    assert spread_out(coords, valid, (20.0, 1.0), 3) == [0, 2, 4]
    assert spread_out(coords, valid, (1.0, 1.0), 2) == [0, 4]
    assert spread_out(coords, valid, (1.0, 1.0), 9) == [0, 4, 1, 2]
    assert spread_out(coords, torch.zeros(5, dtype=torch.bool), (1.0, 1.0), 3) == []
