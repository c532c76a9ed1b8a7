"""Convolutions around few voxels equal the dense ones: outputs and all gradients."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf import sparse
from nnunetv2_kaf.fusion import Diffusion

# 2D and 3D, borders everywhere, maps of one voxel or thinner than a kernel, kernels that spare an axis or reach further
MAPS = [
    ((6, 7), (3, 3)),
    ((1, 40), (3, 3)),
    ((2, 3), (3, 3)),
    ((9, 8), (5, 5)),
    ((1, 1), (3, 3)),
    ((6, 7, 8), (3, 3, 3)),
    ((5, 9, 7), (1, 3, 3)),
    ((2, 1, 2), (3, 3, 3)),
    ((1, 1, 1), (3, 3, 3)),
]
VALID = ["some", "all", "none", "none of one sample"]
TOKEN_DIM, HIDDEN, CHANNELS = 4, 5, 3


def make(shape: tuple[int, ...], count: int, valid: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with collisions, two on the first and two on the last voxel; of two samples."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, count, TOKEN_DIM, generator=generator, dtype=dtype)
    index = torch.randint(0, math.prod(shape), (2, count), generator=generator)
    index[:, :2], index[:, -2:] = 0, math.prod(shape) - 1
    mask = torch.rand(2, count, generator=generator) > 0.3 if valid == "some" else torch.full((2, count), True)
    if valid.startswith("none"):
        mask[0 if valid == "none of one sample" else slice(None)] = False
    return tokens, index, mask


def build(shape: tuple[int, ...], kernel: tuple[int, ...], hidden: int | None, dtype: torch.dtype) -> Diffusion:
    torch.manual_seed(1)
    module = Diffusion(TOKEN_DIM, CHANNELS, hidden, kernel).to(dtype)
    for p in module.parameters():
        nn.init.normal_(p)
    return module


def results(module: Diffusion, tokens: Tensor, index: Tensor, valid: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Output, gradient of the tokens, gradients of all parameters."""
    module.zero_grad(set_to_none=True)
    tokens = tokens.clone().requires_grad_()
    out = module(tokens, index, valid, shape)
    out.backward(torch.arange(out.numel(), dtype=torch.float64).sin().view_as(out).to(out.dtype))
    return [out.detach(), tokens.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(("shape", "kernel"), MAPS)
@pytest.mark.parametrize("hidden", [None, HIDDEN])
@pytest.mark.parametrize("count", [4, 60])
@pytest.mark.parametrize("valid", VALID)
def test_sparse_equals_dense(
    shape: tuple[int, ...], kernel: tuple[int, ...], hidden: int | None, count: int, valid: str
) -> None:
    module = build(shape, kernel, hidden, torch.float64)
    inputs = make(shape, count, valid, torch.float64)
    module.evaluation = "dense"
    dense = results(module, *inputs, shape)
    for module.evaluation in ("sparse", "auto"):
        for ours, theirs in zip(results(module, *inputs, shape), dense, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if valid == "none":
        assert not dense[0].any()


@pytest.mark.parametrize(("shape", "kernel"), [((24, 20), (3, 3)), ((12, 14, 10), (3, 3, 3))])
@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_sparse_equals_dense_in_single_precision(
    shape: tuple[int, ...], kernel: tuple[int, ...], hidden: int | None
) -> None:
    module = build(shape, kernel, hidden, torch.float32)
    inputs = make(shape, 30, "some", torch.float32)
    module.evaluation = "dense"
    dense = results(module, *inputs, shape)
    module.evaluation = "sparse"
    for i, (ours, theirs) in enumerate(zip(results(module, *inputs, shape), dense, strict=True)):
        limit = 1e-5 if i == 0 else 3e-4
        assert (ours - theirs).abs().max() <= limit * theirs.abs().max().clamp_min(1.0)


@pytest.mark.parametrize(("shape", "kernel"), [((24, 20), (3, 3)), ((12, 14, 10), (3, 3, 3))])
@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_bfloat16_autocast_is_within_its_tolerance(
    shape: tuple[int, ...], kernel: tuple[int, ...], hidden: int | None
) -> None:
    module = build(shape, kernel, hidden, torch.float32)
    inputs = make(shape, 30, "some", torch.float32)
    module.evaluation = "dense"
    exact = results(module, *inputs, shape)
    halves = []
    for module.evaluation in ("dense", "sparse"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            halves.append(results(module, *inputs, shape))
    for ours, theirs, truth in zip(halves[1], halves[0], exact, strict=True):
        # bfloat16 keeps 8 bits, 0.4 % a rounding, and a ReLU may flip: about as far off as the dense form in bfloat16
        error, usual = (ours.float() - truth).norm(), (theirs.float() - truth).norm()
        assert error <= max(0.01 * truth.norm(), 1.5 * usual)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_samples_do_not_meet(hidden: int | None) -> None:
    shape = (6, 7)
    module = build(shape, (3, 3), hidden, torch.float64)
    module.evaluation = "sparse"
    tokens, index, valid = make(shape, 10, "some", torch.float64)
    together = module(tokens, index, valid, shape)
    for b in range(2):
        torch.testing.assert_close(module(tokens[b : b + 1], index[b : b + 1], valid[b : b + 1], shape)[0], together[b])


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_order_padding_and_content_of_invalid_tokens_do_not_matter(hidden: int | None) -> None:
    shape = (4, 6, 5)
    module = build(shape, (3, 3, 3), hidden, torch.float64)
    module.evaluation = "sparse"
    tokens, index, valid = make(shape, 8, "some", torch.float64)
    expected = module(tokens, index, valid, shape)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module(tokens[:, order], index[:, order], valid[:, order], shape), expected)
    spoiled = torch.where(valid.unsqueeze(-1), tokens, 1e6)
    torch.testing.assert_close(module(spoiled, index, valid, shape), expected)
    padded = [torch.cat([t, t[:, :4]], dim=1) for t in (tokens, index)]
    mask = torch.cat([valid, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(module(*padded, mask, shape), expected)


@pytest.mark.parametrize(("shape", "kernel"), [((3, 4), (3, 3)), ((2, 3, 2), (3, 3, 3))])
def test_gradcheck(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    module = build(shape, kernel, 2, torch.float64)
    module.evaluation = "sparse"
    tokens, index, valid = make(shape, 5, "some", torch.float64)
    assert torch.autograd.gradcheck(lambda t: module(t, index, valid, shape), (tokens.requires_grad_(),))


@pytest.mark.parametrize(("shape", "kernel"), MAPS)
def test_a_constant_map_is_convolved_as_the_dense_one(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    weight, bias = torch.randn(3, 4, *kernel, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    vector = torch.randn(2, 4, 1, dtype=torch.float64)
    conv = functional.conv3d if len(shape) == 3 else functional.conv2d
    full = vector.view(2, 4, *[1] * len(shape)).expand(2, 4, *shape)
    dense = conv(full, weight, bias, padding=[k // 2 for k in kernel])
    torch.testing.assert_close(sparse.conv_constant(vector, shape, weight, bias), dense.flatten(2))


def test_sites_are_the_distinct_voxels() -> None:
    target = torch.tensor([[7, 3, 7, 0, 9, 3], [1, 1, 1, 1, 1, 1]])
    inside = torch.tensor([[True, True, True, False, True, True], [False] * 6])
    sites = sparse.unique_sites(target, inside, num_voxels=10)
    assert sorted(sites.voxel[0][sites.used[0]].tolist()) == [3, 7, 9]
    assert not sites.used[1].any()
    for b, n in itertools.product(range(2), range(6)):
        slot = sites.slot[b, n]
        assert sites.used[b, slot] == inside[b, n]
        if inside[b, n]:
            assert sites.voxel[b, slot] == target[b, n]


def test_the_cheaper_form_is_chosen() -> None:
    # 256 keypoints: nothing on a volume of 64^3, most of a map of 6^3
    assert sparse.is_cheaper(256, 64**3, 256)
    assert not sparse.is_cheaper(256, 6**3, 256)
    # the second convolution of the paper's form runs on up to 27 times as many voxels
    assert sparse.is_cheaper(27 * 256, 64**3, 64)
    assert not sparse.is_cheaper(27 * 256, 20**3, 64)
