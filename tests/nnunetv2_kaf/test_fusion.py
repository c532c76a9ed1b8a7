import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf import tokens as token_ops
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.coordinates import normalize_mm
from nnunetv2_kaf.fusion import Diffusion, KAFLayer
from nnunetv2_kaf.keypoints import Keypoints

SHAPES = {2: (24, 40), 3: (8, 16, 24)}
STRIDES = {2: (2, 4), 3: (1, 2, 4)}
SPACINGS = {2: (1.5, 1.0), 3: (4.0, 1.0, 1.2)}
CONFIG = KAFConfig(num_keypoints=12, token_dim=16, num_blocks=2, position_hidden=(8,))
FORMS = [(fusion, hidden) for fusion in ("add", "concat") for hidden in (None, 5)]
Keypointer = Callable[..., Keypoints]
Randomizer = Callable[[nn.Module], nn.Module]


def level_shape(ndim: int) -> tuple[int, ...]:
    return tuple(n // s for n, s in zip(SHAPES[ndim], STRIDES[ndim], strict=True))


def make(ndim: int, fusion: str = "add", hidden: int | None = None) -> tuple[KAFLayer, Tensor]:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, fusion=fusion, diffusion_channels=hidden)
    layer = KAFLayer(config, 6, [3] * ndim, STRIDES[ndim], SPACINGS[ndim])
    return layer, torch.randn(2, 6, *level_shape(ndim))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("fusion", "hidden"), FORMS)
def test_equals_the_naive_layer(
    ndim: int, fusion: str, hidden: int | None, make_keypoints: Keypointer, randomize: Randomizer
) -> None:
    """Gather by loop, unmasked attention over the valid points alone, dense scatter and convolutions."""
    layer, features = make(ndim, fusion, hidden)
    randomize(layer)
    points = make_keypoints(ndim)
    fused, tokens = layer(features, points, SHAPES[ndim])
    for b in range(2):
        kept = points.coords[b][points.valid[b]]
        voxels = (kept / torch.tensor(STRIDES[ndim])).floor().long()
        vectors = torch.stack([features[b][(slice(None), *v.tolist())] for v in voxels])
        t = layer.project(vectors) + layer.position(normalize_mm(kept, SHAPES[ndim], SPACINGS[ndim]))
        everyone = torch.ones(1, 1, 1, len(kept), dtype=torch.bool)
        t = t.unsqueeze(0)
        for block in layer.blocks:
            t = block(t, everyone)
        t = layer.norm(t)
        torch.testing.assert_close(tokens[b][points.valid[b]], t[0])
        index = torch.zeros(len(kept), dtype=torch.long)
        for d, n in enumerate(features.shape[2:]):
            index = index * n + voxels[:, d]
        dense = token_ops.scatter(t, index[None], torch.ones(1, len(kept), dtype=torch.bool), features.shape[2:])
        conv = functional.conv3d if ndim == 3 else functional.conv2d
        diffused = conv(dense, layer.diffusion.spread.weight, padding=1)
        if hidden is not None:
            diffused = layer.diffusion.refine(layer.diffusion.norm(diffused).relu())
        expected = features[b] + diffused[0] if fusion == "add" else torch.cat([features[b], diffused[0]])
        torch.testing.assert_close(fused[b], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("hidden", [None, 5])
def test_add_starts_as_the_identity(ndim: int, hidden: int | None, make_keypoints: Keypointer) -> None:
    layer, features = make(ndim, "add", hidden)
    assert torch.equal(layer(features, make_keypoints(ndim), SHAPES[ndim])[0], features)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("fusion", "hidden"), FORMS)
def test_no_valid_keypoint_changes_nothing(
    ndim: int, fusion: str, hidden: int | None, make_keypoints: Keypointer, randomize: Randomizer
) -> None:
    layer, features = make(ndim, fusion, hidden)
    randomize(layer)
    points = make_keypoints(ndim, invalid=12)
    fused, tokens = layer(features, points, SHAPES[ndim])
    assert torch.equal(fused[:, :6], features)
    assert not fused[:, 6:].any()
    assert not tokens.any()


@pytest.mark.parametrize(("fusion", "hidden"), FORMS)
def test_permutation_padding_and_batch_mates(
    fusion: str, hidden: int | None, make_keypoints: Keypointer, randomize: Randomizer
) -> None:
    layer, features = make(3, fusion, hidden)
    randomize(layer).double()
    features = features.double()
    points = make_keypoints(3)
    fused, tokens = layer(features, points, SHAPES[3])
    order = torch.randperm(12)
    shuffled = Keypoints(*(t[:, order] for t in points))
    again, permuted = layer(features, shuffled, SHAPES[3])
    torch.testing.assert_close(again, fused)
    torch.testing.assert_close(permuted, tokens[:, order])
    padded = Keypoints(*(torch.cat([t, torch.zeros_like(t[:, :5])], dim=1) for t in points))
    torch.testing.assert_close(layer(features, padded, SHAPES[3])[0], fused)
    alone = layer(features[1:], Keypoints(*(t[1:] for t in points)), SHAPES[3])[0]
    torch.testing.assert_close(alone[0], fused[1])


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("fusion", "hidden"), FORMS)
def test_every_parameter_gets_a_gradient(
    ndim: int, fusion: str, hidden: int | None, make_keypoints: Keypointer
) -> None:
    layer, features = make(ndim, fusion, hidden)
    layer(features, make_keypoints(ndim), SHAPES[ndim])[0].square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("fusion", "hidden"), [("add", None), ("concat", 3)])
def test_gradcheck(fusion: str, hidden: int | None, randomize: Randomizer) -> None:
    config = KAFConfig(
        num_keypoints=4, token_dim=4, num_heads=2, num_blocks=1, position_hidden=(3,), fusion=fusion,
        diffusion_channels=hidden,
    )  # fmt: skip
    layer = randomize(KAFLayer(config, 2, (3, 3), (1, 1), (2.0, 1.0))).double()
    coords = torch.tensor([[[0.0, 0], [0, 0], [2, 3], [0, 0]]])
    valid = torch.tensor([[True, True, True, False]])
    points = Keypoints(coords, valid)
    features = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: layer(f, points, (3, 4)), (features,))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("fusion", "hidden"), FORMS)
def test_bfloat16_autocast_is_close_to_float32(
    ndim: int, fusion: str, hidden: int | None, make_keypoints: Keypointer, randomize: Randomizer
) -> None:
    layer, features = make(ndim, fusion, hidden)
    randomize(layer)
    points = make_keypoints(ndim)
    exact, _ = layer(features, points, SHAPES[ndim])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, _ = layer(features, points, SHAPES[ndim])
    assert torch.isfinite(fused).all()
    assert (fused - exact).norm() / exact.norm() < 0.05


def test_anisotropic_kernel_does_not_reach_the_next_slice() -> None:
    diffusion = Diffusion(4, 3, None, (1, 3, 3))
    valid = torch.ones(1, 1, dtype=torch.bool)
    out = diffusion(torch.ones(1, 1, 4), torch.tensor([[2 * 35 + 3 * 7 + 3]]), valid, (5, 5, 7))
    assert out[:, :, 2].any()
    assert not out[:, :, [0, 1, 3, 4]].any()
