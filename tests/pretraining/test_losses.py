from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from pretraining.losses import PretrainingLoss, local_contrastive, position_positives, supervised_contrastive


def unit(v: Tensor) -> list[float]:
    values: list[float] = (v / v.norm()).tolist()
    return values


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive_supcon(z: Tensor, positives: Tensor, tau: float) -> float:
    points = [unit(v) for v in z]
    losses = []
    for i, a in enumerate(points):
        others = [j for j in range(len(points)) if j != i]
        mine = [j for j in others if positives[i, j]]
        if not mine:
            continue
        denominator = sum(math.exp(dot(a, points[j]) / tau) for j in others)
        losses.append(-sum(math.log(math.exp(dot(a, points[p]) / tau) / denominator) for p in mine) / len(mine))
    return sum(losses) / len(losses) if losses else 0.0


def naive_local(a: Tensor, b: Tensor, va: Tensor, vb: Tensor, matches: Tensor, tau: float) -> float:
    per_pair = []
    for n in range(len(a)):
        one, two = [unit(v) for v in a[n]], [unit(v) for v in b[n]]
        losses = []
        for i, j in enumerate(matches[n].tolist()):
            if j < 0:
                continue
            for mine, other, x, y, vm, vo in ((one, two, i, j, va[n], vb[n]), (two, one, j, i, vb[n], va[n])):
                total = sum(math.exp(dot(mine[x], other[k]) / tau) for k in range(len(other)) if vo[k])
                total += sum(math.exp(dot(mine[x], mine[k]) / tau) for k in range(len(mine)) if vm[k] and k != x)
                losses.append(-math.log(math.exp(dot(mine[x], other[y]) / tau) / total))
        if losses:
            per_pair.append(sum(losses) / len(losses))
    return sum(per_pair) / len(per_pair) if per_pair else 0.0


@pytest.mark.parametrize("count", [2, 7, 12])
@pytest.mark.parametrize("tau", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_supervised_contrastive_equals_naive(count: int, tau: float, density: float) -> None:
    g = torch.Generator().manual_seed(count)
    z = torch.randn(count, 5, generator=g, dtype=torch.float64)
    positives = torch.rand(count, count, generator=g) < density
    expected = naive_supcon(z, positives, tau)
    assert float(supervised_contrastive(z, positives, tau)) == pytest.approx(expected, abs=1e-9)


def local_case(pairs: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(pairs, 6, 4, generator=g, dtype=dtype), torch.randn(pairs, 8, 4, generator=g, dtype=dtype)
    va, vb = torch.rand(pairs, 6, generator=g) > 0.2, torch.rand(pairs, 8, generator=g) > 0.2
    matches = torch.stack([torch.randperm(8, generator=g)[:6] for _ in range(pairs)])
    keep = va & vb.gather(1, matches) & (torch.rand(pairs, 6, generator=g) > 0.3)
    keep[0] = False
    return a, b, va, vb, torch.where(keep, matches, -1)


@pytest.mark.parametrize("pairs", [1, 2, 5])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_local_contrastive_equals_naive(pairs: int, tau: float) -> None:
    case = local_case(pairs, pairs)
    assert float(local_contrastive(*case, tau)) == pytest.approx(naive_local(*case, tau), abs=1e-9)


def test_hand_computed_values() -> None:
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    positives = position_positives(torch.tensor([[0.0], [0.9], [0.0], [0.9]]), 0.0)
    # anchor 0 has the positive 2, orthogonal, and a parallel negative: log(e^1 + 2) - 0 at tau = 1
    assert float(supervised_contrastive(z, positives, 1.0)) == pytest.approx(math.log(math.e + 2))
    one = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    ok = torch.ones(1, 2, dtype=torch.bool)
    # each anchor: positive 1, two orthogonal negatives
    assert float(local_contrastive(one, one, ok, ok, torch.tensor([[0, 1]]), 1.0)) == pytest.approx(
        math.log(math.e + 2) - 1
    )


def test_collapse_values() -> None:
    ok = torch.ones(10, 10, dtype=torch.bool)
    assert float(supervised_contrastive(torch.ones(10, 3), ok, 0.1)) == pytest.approx(math.log(9), rel=1e-5)
    points, valid = torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    valid[:, 4] = False
    loss = local_contrastive(points, points, valid, valid, torch.tensor([[0, 1, 2, 3, -1]] * 2), 0.1)
    assert float(loss) == pytest.approx(math.log(4 + 4 - 1), rel=1e-5)


def test_supervised_contrastive_ignores_order_and_scale() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 4, generator=g)
    positives = position_positives(torch.rand(8, 1, generator=g), 0.2)
    order = torch.randperm(8, generator=g)
    plain = supervised_contrastive(z, positives)
    assert torch.allclose(supervised_contrastive(5 * z[order], positives[order][:, order]), plain)


def test_local_contrastive_ignores_order_padding_and_direction() -> None:
    a, b, va, vb, matches = local_case(3, 9)
    plain = local_contrastive(a, b, va, vb, matches)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(local_contrastive(a[:, order], b, va[:, order], vb, matches[:, order]), plain)
    junk = torch.full((3, 2, 4), torch.nan, dtype=a.dtype)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    padded = local_contrastive(
        torch.cat([a, junk], 1).requires_grad_(),
        torch.cat([b, junk], 1),
        torch.cat([va, mask], 1),
        torch.cat([vb, mask], 1),
        torch.cat([matches, torch.full((3, 2), -1)], 1),
    )
    assert torch.allclose(padded, plain)
    backward = torch.full((3, 8), -1)
    for n, row in enumerate(matches.tolist()):
        for i, j in enumerate(row):
            if j >= 0:
                backward[n, j] = i
    assert torch.allclose(local_contrastive(b, a, vb, va, backward), plain)


def test_no_positive_gives_zero_with_a_graph() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    loss = supervised_contrastive(z, torch.zeros(4, 4, dtype=torch.bool))
    points, valid = torch.randn(2, 5, 3, requires_grad=True), torch.zeros(2, 5, dtype=torch.bool)
    local = local_contrastive(points, points, valid, valid, torch.full((2, 5), -1))
    empty = local_contrastive(points[:, :0], points[:, :0], valid[:, :0], valid[:, :0], torch.full((2, 0), -1))
    assert loss.item() == local.item() == empty.item() == 0
    (loss + local + empty).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert (z.grad == 0).all()
    assert points.grad is not None
    assert (points.grad == 0).all()


def test_gradients() -> None:
    z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    positives = position_positives(torch.tensor([[0.1], [0.2], [0.9], [0.1], [0.3], [0.8]]), 0.15)
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, positives, 0.5), (z,))
    a, b, va, vb, matches = local_case(2, 1)
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: local_contrastive(x, y, va, vb, matches, 0.5), (a, b))


def test_position_positives() -> None:
    positions = torch.tensor([[0.10], [0.50], [0.55], [0.58]])
    expected = [[0, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]]
    assert position_positives(positions, 0.1).int().tolist() == expected
    # in 3D all axes must be close
    assert position_positives(torch.tensor([[0.1, 0.1], [0.1, 0.9], [0.1, 0.1], [0.1, 0.1]]), 0.2).int().tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 1, 1, 0],
    ]


def test_shape_errors() -> None:
    with pytest.raises(KAFError, match="positives"):
        supervised_contrastive(torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(KAFError, match="temperature"):
        supervised_contrastive(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), 0.0)
    with pytest.raises(KAFError, match="first sides"):
        position_positives(torch.zeros(3, 1), 0.1)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(KAFError, match="matches"):
        local_contrastive(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), mask, mask, torch.zeros(1, 3).long())


def test_components_are_weighted_and_bf16_is_finite() -> None:
    g = torch.Generator().manual_seed(0)
    module = PretrainingLoss(
        temperature=0.1, position_threshold=0.1, weight_bottleneck=1.0, weight_keypoints=2.0, weight_local=3.0
    )
    one, two = (torch.randn(4, 8, generator=g).bfloat16() for _ in range(2))
    descriptors = torch.randn(4, 5, 8, generator=g).bfloat16()
    valid = torch.ones(4, 5, dtype=torch.bool)
    out = module(one, two, descriptors, valid, torch.arange(5).repeat(2, 1), torch.rand(4, 1, generator=g))
    assert out.total.dtype == torch.float32
    assert torch.isfinite(out.total)
    assert torch.allclose(out.total, out.bottleneck + 2 * out.keypoints + 3 * out.local)
