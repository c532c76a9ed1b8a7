import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nnunetv2_kaf import tokens as ops

SHAPES = [(5, 7), (4, 3, 6), (1, 9), (1, 1, 1)]


def make(
    shape: tuple[int, ...], count: int = 6, channels: int = 4, seed: int = 0, **options: Any
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, count, channels, generator=generator, **options)
    index = torch.randint(0, math.prod(shape), (2, count), generator=generator)
    index[:, 1] = index[:, 0]  # a collision
    valid = torch.rand(2, count, generator=generator) > 0.3
    valid[:, :2] = True
    return tokens, index, valid


def naive_scatter(tokens: Tensor, index: Tensor, valid: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = torch.zeros(tokens.shape[0], tokens.shape[2], math.prod(shape), dtype=tokens.dtype)
    for b, voxel in itertools.product(range(tokens.shape[0]), range(math.prod(shape))):
        here = [tokens[b, k] for k in range(tokens.shape[1]) if valid[b, k] and index[b, k] == voxel]
        if here:
            out[b, :, voxel] = torch.stack(here).mean(0)
    return out.view(*out.shape[:2], *shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_gather_equals_a_loop(shape: tuple[int, ...]) -> None:
    features = torch.randn(2, 4, *shape)
    _, index, _ = make(shape)
    out = ops.gather(features, index)
    for b, k in itertools.product(range(2), range(index.shape[1])):
        assert torch.equal(out[b, k], features[b].flatten(1)[:, index[b, k]])


@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_is_the_mean_of_the_tokens_on_a_voxel(shape: tuple[int, ...]) -> None:
    tokens, index, valid = make(shape)
    torch.testing.assert_close(ops.scatter(tokens, index, valid, shape), naive_scatter(tokens, index, valid, shape))


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 6)])
def test_gather_after_scatter_gives_the_tokens_back_where_none_collide(shape: tuple[int, ...]) -> None:
    tokens, _, _ = make(shape)
    index = torch.stack([torch.randperm(math.prod(shape))[:6] for _ in range(2)])
    valid = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(ops.gather(ops.scatter(tokens, index, valid, shape), index), tokens)


def test_order_and_invalid_tokens_do_not_matter() -> None:
    shape = (6, 8)
    tokens, index, valid = make(shape, dtype=torch.float64)

    def run(*arguments: Tensor) -> Tensor:
        return ops.scatter(*arguments, shape)

    expected = run(tokens, index, valid)
    order = torch.randperm(6)
    torch.testing.assert_close(run(tokens[:, order], index[:, order], valid[:, order]), expected)
    spoiled = torch.where(valid.unsqueeze(-1), tokens, 1e6)
    torch.testing.assert_close(run(spoiled, index, valid), expected)
    padded = [torch.cat([t, t[:, :4]], dim=1) for t in (tokens, index)]
    mask = torch.cat([valid, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(run(padded[0], padded[1], mask), expected)


def test_all_tokens_invalid_writes_nothing() -> None:
    tokens, index, valid = make((6, 8))
    none = torch.zeros_like(valid)
    assert not ops.scatter(tokens, index, none, (6, 8)).any()


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 2)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    tokens, index, valid = make(shape, count=5, channels=2, dtype=torch.float64)
    tokens.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.scatter(t, index, valid, shape), (tokens,))
