from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pretraining.objectives.heads import (
    CrossBlock,
    DescriptorHead,
    GlobalHead,
    Matcher,
    _pool_by_products,
    masked_mean,
    pool_grid,
)

DOUBLE = torch.float64


@pytest.fixture
def matcher() -> Matcher:
    torch.manual_seed(0)
    return Matcher(8, 2).double()


def views(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs with points on both sides, on the second only, on the first only, on none."""
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(4, 5, 8, generator=g, dtype=DOUBLE), torch.randn(4, 6, 8, generator=g, dtype=DOUBLE)
    valid_first = torch.tensor([[1, 1, 0, 1, 0], [0] * 5, [1] * 5, [0] * 5], dtype=torch.bool)
    valid_second = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1], [0] * 6, [0] * 6], dtype=torch.bool)
    return first.to(dtype), second.to(dtype), valid_first, valid_second


def test_global_head_and_descriptor_head_shapes() -> None:
    assert GlobalHead(6, 4, 3)(torch.randn(4, 6)).shape == (4, 3)
    tokens = [torch.randn(2, 5, 4), torch.randn(2, 5, 7)]
    head = DescriptorHead([4, 7], 3)
    torch.testing.assert_close(head(tokens), head.projection(torch.cat(tokens, 2)))


def test_masked_mean() -> None:
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [torch.nan, 0.0]], [[torch.inf] * 2] * 3])
    valid = torch.tensor([[True, True, False], [False] * 3])
    assert masked_mean(values, valid).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_cross_block_equals_a_loop() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, 2.0).double()
    tokens, others, _, valid = views()
    out = block(tokens[:2], others[:2], valid[:2, None, None])
    for b in range(2):
        for i in range(5):
            query = block.query(block.attention_norm(tokens[b, i])).view(2, 4)
            heads = []
            for h in range(2):
                keys, values = [], []
                for j in range(6):
                    if valid[b, j]:
                        both = block.key_value(block.attention_norm(others[b, j])).view(2, 2, 4)
                        keys.append(both[0, h])
                        values.append(both[1, h])
                weights = torch.softmax(torch.stack([query[h] @ key / 2 for key in keys]), 0)
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            attended = tokens[b, i] + block.out(torch.cat(heads))
            torch.testing.assert_close(out[b, i], attended + block.mlp(attended))


def test_matcher_is_the_same_for_both_views(matcher: Matcher) -> None:
    first, second, valid_first, valid_second = views()
    a, b = matcher(first, second, valid_first, valid_second)
    d, c = matcher(second, first, valid_second, valid_first)
    assert a.shape == (4, 5, 8)
    assert b.shape == (4, 6, 8)
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(b, d)


def test_matcher_sees_the_other_view_and_its_own(matcher: Matcher) -> None:
    first, second, valid_first, valid_second = views()
    plain, _ = matcher(first, second, valid_first, valid_second)
    other, _ = matcher(first, second + torch.randn_like(second), valid_first, valid_second)
    assert not torch.allclose(plain[0, 0], other[0, 0])
    moved = first.clone()
    moved[0, 3] += torch.randn(8, dtype=DOUBLE)
    assert not torch.allclose(matcher(moved, second, valid_first, valid_second)[0][0, 0], plain[0, 0])


def test_matcher_padding_order_and_batch(matcher: Matcher) -> None:
    first, second, valid_first, valid_second = views()
    a, b = matcher(first, second, valid_first, valid_second)
    dirty = first.masked_fill(~valid_first[:, :, None], torch.nan)
    wide = functional.pad(second, (0, 0, 0, 3), value=torch.inf)
    c, d = matcher(dirty, wide, valid_first, functional.pad(valid_second, (0, 3)))
    torch.testing.assert_close(c, a)
    torch.testing.assert_close(d[:, :6], b)
    order, other = [3, 1, 4, 0, 2], [5, 0, 2, 1, 4, 3]
    e, f = matcher(first[:, order], second[:, other], valid_first[:, order], valid_second[:, other])
    torch.testing.assert_close(e, a[:, order])
    torch.testing.assert_close(f, b[:, other])
    alone, _ = matcher(first[:1], second[:1], valid_first[:1], valid_second[:1])
    torch.testing.assert_close(alone[0], a[0])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_view_without_points_gives_finite_values_and_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matcher = Matcher(8, 2).to(dtype)
    first, second, valid_first, valid_second = views(dtype)
    first = first.masked_fill(~valid_first[:, :, None], torch.nan).requires_grad_()
    second = second.masked_fill(~valid_second[:, :, None], torch.inf).requires_grad_()
    a, b = matcher(first, second, valid_first, valid_second)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    (a.square().sum() + b.square().sum()).backward()
    for tensor in (first, second, *matcher.projection.parameters(), *matcher.cross_blocks.parameters()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    assert first.grad is not None
    assert (first.grad[~valid_first] == 0).all()


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_every_parameter_gets_a_gradient(layers: int) -> None:
    torch.manual_seed(0)
    matcher = Matcher(8, layers)
    a, b = matcher(*views(torch.float32))
    (torch.bmm(a, b.transpose(1, 2)).square().sum() + matcher.dustbin).backward()
    for name, parameter in matcher.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert matcher.dustbin.shape == ()


def test_gradients(matcher: Matcher) -> None:
    first, second, valid_first, valid_second = views()
    assert torch.autograd.gradcheck(
        lambda x, y: matcher(x, y, valid_first, valid_second), (first.requires_grad_(), second.requires_grad_())
    )


def test_bfloat16() -> None:
    torch.manual_seed(0)
    matcher = Matcher(8, 2)
    case = views(torch.float32)
    exact = matcher(*case)
    with torch.autocast("cpu", torch.bfloat16):
        out = matcher(*case)
    for ours, theirs in zip(out, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=0.1, atol=0.1)
    half = matcher.bfloat16()(*views(torch.bfloat16))
    assert all(torch.isfinite(side).all() for side in half)


@pytest.mark.parametrize("features", [2, 3, 6, 12])
def test_heads_divide_any_width(features: int) -> None:
    x, valid = torch.randn(1, 3, features), torch.ones(1, 3, dtype=torch.bool)
    assert Matcher(features, 1)(x, x, valid, valid)[0].shape == (1, 3, features)


def test_no_points_at_all(matcher: Matcher) -> None:
    first, second, valid_first, valid_second = views()
    a, b = matcher(first[:, :0], second, valid_first[:, :0], valid_second)
    assert a.shape == (4, 0, 8)
    assert torch.isfinite(b).all()


def test_compiles_without_graph_breaks(matcher: Matcher) -> None:
    case = views()
    compiled = torch.compile(matcher, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case), matcher(*case))


@pytest.mark.parametrize("shape", [(7, 8), (1, 5), (4, 4), (5, 7, 2), (1, 3, 6)])
@pytest.mark.parametrize("cells", [1, 2, 3])
def test_pooling_by_products_is_torchs(shape: tuple[int, ...], cells: int) -> None:
    features = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    torch.testing.assert_close(
        _pool_by_products(features.float(), cells).flatten(1).double(), pool_grid(features, cells), atol=1e-6, rtol=1e-5
    )
