from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from pretraining.config import PretrainConfig
from pretraining.objectives import pairwise
from pretraining.objectives.losses import PretrainingLoss, local_contrastive, supervised_contrastive
from pretraining.objectives.model import Embeddings
from pretraining.objectives.positives import partition_positives, position_positives, simclr_positives
from pretraining.objectives.transport import transport_loss
from pretraining.pairs.batch import Places


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


def naive_local(a: Tensor, b: Tensor, va: Tensor, vb: Tensor, matches: Tensor, tau: float) -> list[float | None]:
    per_pair: list[float | None] = []
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
        per_pair.append(sum(losses) / len(losses) if losses else None)
    return per_pair


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
@pytest.mark.parametrize("limit", [2**24, 2 * (36 + 64 + 48)])
def test_local_contrastive_equals_naive(pairs: int, tau: float, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "MAX_ELEMENTS", limit)
    case = local_case(pairs, pairs)
    per_pair, counted = local_contrastive(*case, tau)
    expected = naive_local(*case, tau)
    assert per_pair.tolist() == pytest.approx([x or 0.0 for x in expected], abs=1e-9)
    assert counted.tolist() == [x is not None for x in expected]


def test_local_contrastive_ignores_matches_with_padding() -> None:
    a, b, va, vb, matches = local_case(3, 2)
    free = torch.tensor([j for j in range(8) if j not in matches[2].tolist()][:1])
    vb[2, free] = False
    point = int((matches[2] < 0).nonzero()[0])
    more = matches.clone()
    more[2, point] = free
    assert torch.equal(local_contrastive(a, b, va, vb, more)[0], local_contrastive(a, b, va, vb, matches)[0])


def test_hand_computed_values() -> None:
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    positives = position_positives(torch.tensor([[0.0], [0.9], [0.0], [0.9]]), 0.0)
    # anchor 0 has the positive 2, orthogonal, and a parallel negative: log(e^1 + 2) - 0 at tau = 1
    assert float(supervised_contrastive(z, positives, 1.0)) == pytest.approx(math.log(math.e + 2))
    one = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    ok = torch.ones(1, 2, dtype=torch.bool)
    # each anchor: positive 1, two orthogonal negatives
    assert float(local_contrastive(one, one, ok, ok, torch.tensor([[0, 1]]), 1.0)[0]) == pytest.approx(
        math.log(math.e + 2) - 1
    )


def test_collapse_values() -> None:
    ok = torch.ones(10, 10, dtype=torch.bool)
    assert float(supervised_contrastive(torch.ones(10, 3), ok, 0.1)) == pytest.approx(math.log(9), rel=1e-5)
    points, valid = torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    valid[:, 4] = False
    loss, _ = local_contrastive(points, points, valid, valid, torch.tensor([[0, 1, 2, 3, -1]] * 2), 0.1)
    assert loss.tolist() == pytest.approx([math.log(4 + 4 - 1)] * 2, rel=1e-5)


def test_supervised_contrastive_ignores_order_and_scale() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 4, generator=g)
    positives = position_positives(torch.rand(8, 1, generator=g), 0.2)
    order = torch.randperm(8, generator=g)
    plain = supervised_contrastive(z, positives)
    assert torch.allclose(supervised_contrastive(5 * z[order], positives[order][:, order]), plain)


def test_local_contrastive_ignores_order_padding_and_direction() -> None:
    a, b, va, vb, matches = local_case(3, 9)
    plain, _ = local_contrastive(a, b, va, vb, matches)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(local_contrastive(a[:, order], b, va[:, order], vb, matches[:, order])[0], plain)
    junk = torch.full((3, 2, 4), torch.nan, dtype=a.dtype)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    padded_a = torch.cat([a, junk], 1).requires_grad_()
    padded, _ = local_contrastive(
        padded_a,
        torch.cat([b, junk], 1),
        torch.cat([va, mask], 1),
        torch.cat([vb, mask], 1),
        torch.cat([matches, torch.full((3, 2), -1)], 1),
    )
    assert torch.allclose(padded, plain)
    (gradient,) = torch.autograd.grad(padded.sum(), padded_a)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 6:] == 0).all()
    backward = torch.full((3, 8), -1)
    for n, row in enumerate(matches.tolist()):
        for i, j in enumerate(row):
            if j >= 0:
                backward[n, j] = i
    assert torch.allclose(local_contrastive(b, a, vb, va, backward)[0], plain)


def test_no_positive_gives_zero_with_a_graph() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    loss = supervised_contrastive(z, torch.zeros(4, 4, dtype=torch.bool))
    points, valid = torch.randn(2, 5, 3, requires_grad=True), torch.zeros(2, 5, dtype=torch.bool)
    local, counted = local_contrastive(points, points, valid, valid, torch.full((2, 5), -1))
    empty, none = local_contrastive(points[:, :0], points, valid[:, :0], valid, torch.full((2, 0), -1))
    other, nobody = local_contrastive(points, points[:, :0], valid, valid[:, :0], torch.full((2, 5), -1))
    assert not (counted | none | nobody).any()
    assert loss.item() == 0
    assert torch.stack([local, empty, other]).tolist() == [[0.0, 0.0]] * 3
    (loss + (local + empty + other).sum()).backward()  # type: ignore[no-untyped-call]
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
    assert torch.autograd.gradcheck(lambda x, y: local_contrastive(x, y, va, vb, matches, 0.5)[0], (a, b))


def test_shape_errors() -> None:
    with pytest.raises(KAFError, match="positives"):
        supervised_contrastive(torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(KAFError, match="temperature"):
        supervised_contrastive(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), 0.0)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(KAFError, match="matches"):
        local_contrastive(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), mask, mask, torch.zeros(1, 3).long())


def batch(dtype: torch.dtype = torch.float64) -> tuple[Embeddings, Tensor, Tensor]:
    """Embeddings of three pairs, one of them without a match; padding holds NaN."""
    g = torch.Generator().manual_seed(0)
    a, b, va, vb, matches = local_case(3, 5)
    junk, mask = torch.full((3, 2, 4), torch.nan, dtype=a.dtype), torch.zeros(3, 2, dtype=torch.bool)
    points, valid = torch.cat([torch.cat([a, junk], 1), b]), torch.cat([torch.cat([va, mask], 1), vb])
    one, two = (torch.randn(6, 8, generator=g) for _ in range(2))
    values = (one, two, points, 2 * points, torch.tensor(0.3))
    leaves = [value.to(dtype).requires_grad_() for value in values]
    return Embeddings(*leaves, valid), torch.nn.functional.pad(matches, (0, 2), value=-1), torch.rand(6, 2, generator=g)


@pytest.mark.parametrize("positives", ["simclr", "gcl", "pcl"])
def test_components_are_those_of_the_functions_and_weighted(positives: str) -> None:
    config = PretrainConfig(positives=positives, weight_keypoints=2.0, weight_local=3.0, position_threshold=0.4)
    embeddings, matches, positions = batch()
    losses = PretrainingLoss(config)(embeddings, matches, positions)
    assert list(losses) == ["bottleneck", "keypoints", "local", "transport", "total"]
    mask = {
        "simclr": simclr_positives(6),
        "gcl": partition_positives(positions, 4),
        "pcl": position_positives(positions, 0.4),
    }[positives]
    assert embeddings.bottleneck is not None
    assert embeddings.keypoints is not None
    assert embeddings.descriptors is not None
    assert embeddings.matching is not None
    assert embeddings.dustbin is not None
    sides = embeddings.valid.chunk(2)
    local, counted = local_contrastive(*embeddings.descriptors.chunk(2), *sides, matches, config.temperature)
    transport, several = transport_loss(
        *embeddings.matching.chunk(2),
        *sides,
        matches,
        embeddings.dustbin,
        iterations=50,
        matched_weight=0.45,
        unmatched_weight=1.0,
    )
    assert counted.tolist() == [False, True, True]
    expected = {
        "bottleneck": supervised_contrastive(embeddings.bottleneck, mask, config.temperature),
        "keypoints": supervised_contrastive(embeddings.keypoints, mask, config.temperature),
        "local": local[1:].mean(),
        "transport": transport[several].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    total = expected["bottleneck"] + 2 * expected["keypoints"] + 3 * expected["local"] + 0.1 * expected["transport"]
    torch.testing.assert_close(losses["total"], total)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_embeddings_are_compared_in_float32(autocast: bool) -> None:
    embeddings, matches, positions = batch(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = PretrainingLoss(PretrainConfig())(embeddings, matches, positions)
        losses["total"].backward()
    exact, _, _ = batch(torch.bfloat16)
    double = Embeddings(*(value.double() for value in exact[:5]), exact.valid)
    for name, value in PretrainingLoss(PretrainConfig())(double, matches, positions).items():
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4)
    for leaf in embeddings[:5]:
        assert leaf is not None
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.abs().sum() > 0


def test_losses_without_weight_need_no_embedding() -> None:
    embeddings, matches, positions = batch()
    alone = embeddings._replace(keypoints=None, descriptors=None, matching=None, dustbin=None)
    losses = PretrainingLoss(PretrainConfig.from_preset("gcl", {}))(alone, matches, positions)
    assert list(losses) == ["bottleneck", "total"]
    local = PretrainConfig(weight_bottleneck=0.0, weight_keypoints=0.0, weight_transport=0.0, weight_local=2.0)
    losses = PretrainingLoss(local)(embeddings._replace(bottleneck=None), matches, positions)
    assert list(losses) == ["local", "total"]
    assert losses["total"] == 2 * losses["local"]
    with pytest.raises(KAFError, match="gives no keypoints"):
        PretrainingLoss(PretrainConfig())(alone, matches, positions)


def test_a_batch_without_any_keypoint_has_finite_losses_and_gradients() -> None:
    embeddings, matches, positions = batch()
    nothing = embeddings._replace(valid=torch.zeros_like(embeddings.valid))
    losses = PretrainingLoss(PretrainConfig())(nothing, torch.full_like(matches, -1), positions)
    assert losses["local"].item() == losses["transport"].item() == 0
    losses["total"].backward()
    for leaf in embeddings[:5]:
        assert leaf is not None
        assert torch.isfinite(leaf.grad).all()


def test_keypoints_that_may_show_the_same_thing_are_no_negatives() -> None:
    """Places decide: equal to the loss of the keypoints that remain, without them equal to that of all."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(1, 3, 4, generator=generator) for _ in range(2))
    valid, matches = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, -1, -1]])
    everybody, _ = local_contrastive(first, second, valid, valid, matches)
    # The second keypoints lie beside the match, the third ones far from everything.
    mm = torch.tensor([[[0.0], [1.0], [50.0]], [[0.0], [1.0], [90.0]]])
    places = Places(mm, torch.tensor([2.0]), torch.tensor([8.0]))
    found, _ = local_contrastive(first, second, valid, valid, matches, places=places)
    keep = [0, 2]
    remaining, _ = local_contrastive(first[:, keep], second[:, keep], valid[:, keep], valid[:, keep], matches[:, keep])
    assert found == pytest.approx(remaining.item(), abs=1e-6)
    assert found < everybody
    apart = Places(mm * torch.tensor([[1.0], [100.0], [1.0]]), torch.tensor([2.0]), torch.tensor([8.0]))
    far, _ = local_contrastive(first, second, valid, valid, matches, places=apart)
    assert far > found


def test_places_work_in_chunks_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn(4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    first.requires_grad_()
    valid, matches = torch.ones(4, 5, dtype=torch.bool), torch.tensor([[0, 1, -1, -1, -1]] * 4)
    places = Places(
        10 * torch.rand(8, 5, 2, generator=generator, dtype=torch.float64), torch.full((4,), 2.0), torch.full((4,), 4.0)
    )
    whole = local_contrastive(first, second, valid, valid, matches, places=places)[0]
    (gradient,) = torch.autograd.grad(whole.sum(), first)
    monkeypatch.setattr(pairwise, "MAX_ELEMENTS", 1)
    chunks = local_contrastive(first, second, valid, valid, matches, places=places)[0]
    assert torch.allclose(chunks, whole)
    assert torch.allclose(torch.autograd.grad(chunks.sum(), first)[0], gradient)
