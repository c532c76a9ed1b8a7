from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from pretraining.objectives import pairwise
from pretraining.objectives.transport import log_sinkhorn, transport_loss
from pretraining.pairs.batch import Places

DOUBLE = torch.float64
loss_of = partial(transport_loss, iterations=20, matched_weight=0.45, unmatched_weight=1.0)


def unrolled(scores: Tensor, dustbin: Tensor, iterations: int) -> Tensor:
    """One pair without padding, plain autograd: (Ka, Kb) -> (Ka + 1, Kb + 1)."""
    a, b = scores.shape
    table = torch.cat([torch.cat([scores, dustbin.expand(a, 1)], 1), dustbin.expand(1, b + 1)], 0)
    mass_a = torch.tensor([1.0] * a + [b], dtype=scores.dtype).log()
    mass_b = torch.tensor([1.0] * b + [a], dtype=scores.dtype).log()
    u, v = torch.zeros_like(mass_a), torch.zeros_like(mass_b)
    for _ in range(iterations):
        u = mass_a - torch.logsumexp(table + v[None, :], 1)
        v = mass_b - torch.logsumexp(table + u[:, None], 0)
    return table + u[:, None] + v[None, :]


def masks(valid: list[list[int]]) -> Tensor:
    return torch.tensor(valid, dtype=torch.bool)


def case(seed: int = 0, ka: int = 4, kb: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs with all points, some points, one point, none on the first side, none on the second, none at all."""
    g = torch.Generator().manual_seed(seed)
    valid_a, valid_b = torch.rand(6, ka, generator=g) > 0.3, torch.rand(6, kb, generator=g) > 0.3
    valid_a[0], valid_b[0] = True, True
    valid_a[1, :2] = valid_b[1, 1:3] = True
    valid_a[2], valid_b[2] = torch.arange(ka) == 1, torch.arange(kb) == 3
    valid_a[3], valid_b[4], valid_a[5], valid_b[5] = False, False, False, False
    valid_b[3, 0] = valid_a[4, 0] = True
    scores = 2 * torch.randn(6, ka, kb, generator=g, dtype=DOUBLE)
    return scores, torch.tensor(0.3, dtype=DOUBLE), valid_a, valid_b


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_equals_the_unrolled_reference(iterations: int) -> None:
    scores, dustbin, valid_a, valid_b = case()
    scores.requires_grad_(), dustbin.requires_grad_()
    out = log_sinkhorn(scores, dustbin, valid_a, valid_b, iterations)
    g = torch.Generator().manual_seed(1)
    ours, theirs = torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    for n in range(5):
        rows, columns = valid_a[n].nonzero()[:, 0], valid_b[n].nonzero()[:, 0]
        expected = unrolled(scores[n][rows][:, columns], dustbin, iterations)
        found = out[n][torch.cat([rows, torch.tensor([4])])][:, torch.cat([columns, torch.tensor([5])])]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        weights = torch.randn(found.shape, generator=g, dtype=DOUBLE).masked_fill(expected == -torch.inf, 0)
        ours = ours + (found.masked_fill(expected == -torch.inf, 0) * weights).sum()
        if len(rows) and len(columns):
            theirs = theirs + (expected * weights).sum()
        else:  # nothing to choose: plain autograd gives NaN here, the truth is a gradient of zero
            assert expected[torch.isfinite(expected)].abs().max() < 1e-9
    found_gradients = torch.autograd.grad(ours, (scores, dustbin))
    expected_gradients = torch.autograd.grad(theirs, (scores, dustbin))
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 4])
def test_gradcheck(iterations: int) -> None:
    scores, dustbin, valid_a, valid_b = case()
    inside = log_sinkhorn(scores, dustbin, valid_a, valid_b, iterations) > -torch.inf

    def finite(s: Tensor, z: Tensor) -> Tensor:
        return log_sinkhorn(s, z, valid_a, valid_b, iterations).masked_fill(~inside, 0)

    assert torch.autograd.gradcheck(finite, (scores.requires_grad_(), dustbin.requires_grad_()))


def test_marginals_converge() -> None:
    scores, dustbin, valid_a, valid_b = case(3)
    assignment = log_sinkhorn(scores, dustbin, valid_a, valid_b, 500).exp()
    rows = torch.cat([valid_a, valid_b.sum(1, keepdim=True)], 1).to(DOUBLE)
    columns = torch.cat([valid_b, valid_a.sum(1, keepdim=True)], 1).to(DOUBLE)
    torch.testing.assert_close(assignment.sum(2), rows, rtol=0, atol=1e-8)
    torch.testing.assert_close(assignment.sum(1), columns, rtol=0, atol=1e-12)


def test_hand_computed_assignment() -> None:
    # one point on each side: both sums are 1 in a symmetric 2 x 2 problem, P = [[p, 1 - p], [1 - p, p]] with
    # p^2 / (1 - p)^2 = e^(s + z - 2 z)
    ok = torch.ones(1, 1, dtype=torch.bool)
    out = log_sinkhorn(torch.full((1, 1, 1), 3.0, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE), ok, ok, 300).exp()
    ratio = math.exp((3.0 - 1.0) / 2)
    expected = torch.tensor([[ratio, 1], [1, ratio]], dtype=DOUBLE) / (1 + ratio)
    torch.testing.assert_close(out[0], expected)


def test_equal_scores_share_the_mass_equally() -> None:
    ok = torch.ones(1, 3, dtype=torch.bool)
    out = log_sinkhorn(torch.ones(1, 3, 3), torch.tensor(1.0), ok, ok, 50).exp()
    torch.testing.assert_close(out[0, :3, :3], torch.full((3, 3), 1 / 6))
    torch.testing.assert_close(out[0, 3, 3], torch.tensor(1.5))


def test_padding_has_no_mass_and_no_influence() -> None:
    scores, dustbin, valid_a, valid_b = case()
    scores.requires_grad_()
    out = log_sinkhorn(scores, dustbin, valid_a, valid_b, 10)
    padded = torch.full((6, 7, 9), torch.nan, dtype=DOUBLE)
    padded[:, :4, :5] = scores.detach()
    padded.requires_grad_()
    wide = log_sinkhorn(
        padded,
        dustbin,
        torch.nn.functional.pad(valid_a, (0, 3)),
        torch.nn.functional.pad(valid_b, (0, 4)),
        10,
    )
    rows, columns = [0, 1, 2, 3, 7], [0, 1, 2, 3, 4, 9]
    assert torch.equal(wide[:, rows][:, :, columns].isinf(), out.isinf())
    torch.testing.assert_close(wide[:, rows][:, :, columns], out)
    assert (wide[:, 4:7] == -torch.inf).all()
    assert (wide[:, :, 5:9] == -torch.inf).all()
    plain = torch.autograd.grad(out[out > -torch.inf].square().sum(), scores)[0]
    gradient = torch.autograd.grad(wide[wide > -torch.inf].square().sum(), padded)[0]
    torch.testing.assert_close(gradient[:, :4, :5], plain)
    assert (gradient[:, 4:] == 0).all()
    assert (gradient[:, :, 5:] == 0).all()
    assert (plain[~(valid_a[:, :, None] & valid_b[:, None])] == 0).all()


def test_an_infinite_gradient_at_padding_is_ignored() -> None:
    scores, dustbin, valid_a, valid_b = case()
    scores.requires_grad_()
    out = log_sinkhorn(scores, dustbin, valid_a, valid_b, 3)
    weights = torch.ones_like(out).masked_fill(out == -torch.inf, torch.nan)
    assert torch.isfinite(torch.autograd.grad(out, scores, weights)[0]).all()


def test_permutation_equivariance_and_batch_independence() -> None:
    scores, dustbin, valid_a, valid_b = case()
    out = log_sinkhorn(scores, dustbin, valid_a, valid_b, 10)
    rows, columns = [2, 0, 3, 1], [4, 2, 0, 1, 3]
    moved = log_sinkhorn(scores[:, rows][:, :, columns], dustbin, valid_a[:, rows], valid_b[:, columns], 10)
    torch.testing.assert_close(moved, out[:, [*rows, 4]][:, :, [*columns, 5]])
    for n in range(6):
        alone = log_sinkhorn(scores[n : n + 1], dustbin, valid_a[n : n + 1], valid_b[n : n + 1], 10)
        torch.testing.assert_close(alone[0], out[n])


@pytest.mark.parametrize(("ka", "kb"), [(0, 3), (3, 0), (0, 0)])
def test_no_points_at_all(ka: int, kb: int) -> None:
    scores = torch.zeros(2, ka, kb, requires_grad=True)
    valid_a, valid_b = torch.ones(2, ka, dtype=torch.bool), torch.ones(2, kb, dtype=torch.bool)
    dustbin = torch.tensor(0.5, requires_grad=True)
    out = log_sinkhorn(scores, dustbin, valid_a, valid_b, 5)
    assert out.shape == (2, ka + 1, kb + 1)
    # everything goes to the dustbin
    torch.testing.assert_close(out[:, :ka, kb].exp(), torch.ones(2, ka))
    torch.testing.assert_close(out[:, ka, :kb].exp(), torch.ones(2, kb))
    out[out > -torch.inf].sum().backward()  # type: ignore[no-untyped-call]
    assert dustbin.grad is not None
    assert float(dustbin.grad) == pytest.approx(0, abs=1e-6)
    loss, counted = loss_of(
        torch.zeros(2, ka, 4), torch.zeros(2, kb, 4), valid_a, valid_b, torch.full((2, ka), -1), dustbin
    )
    assert loss.tolist() == [0.0, 0.0]
    assert not counted.any()


def test_extreme_scores_stay_finite() -> None:
    ok = torch.ones(1, 6, dtype=torch.bool)
    scores = (1e4 * torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    out = log_sinkhorn(scores, torch.tensor(0.0), ok, ok, 50)
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), scores)[0]).all()


def test_half_precision_is_computed_in_float32() -> None:
    scores, dustbin, valid_a, valid_b = case()
    out = log_sinkhorn(scores.bfloat16(), dustbin.float(), valid_a, valid_b, 20)
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out, log_sinkhorn(scores.bfloat16().double(), dustbin, valid_a, valid_b, 20).float(), rtol=1e-4, atol=1e-4
    )


def test_memory_does_not_grow_with_matrices_per_iteration() -> None:
    ok = torch.ones(1, 40, dtype=torch.bool)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[iterations] = saved.get(iterations, 0) + tensor.numel()
        return tensor

    for iterations in (5, 50):
        scores = torch.randn(1, 40, 40, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            log_sinkhorn(scores, torch.tensor(0.0, requires_grad=True), ok, ok, iterations)
    assert saved[50] - saved[5] <= 45 * 2 * 41
    assert saved[50] < 4 * 41 * 41 + 51 * 2 * 41


def naive_loss(
    a: Tensor, b: Tensor, va: Tensor, vb: Tensor, matches: Tensor, dustbin: Tensor, weights: tuple[float, float]
) -> list[float]:
    losses = []
    for n in range(len(a)):
        rows = [i for i in range(a.shape[1]) if va[n, i]]
        columns = [j for j in range(b.shape[1]) if vb[n, j]]
        if not rows or not columns:
            losses.append(math.nan)
            continue
        table = unrolled(a[n, rows] @ b[n, columns].T / math.sqrt(a.shape[2]), dustbin, 20)
        good, lonely, taken = [], [], set()
        for i, row in enumerate(rows):
            j = int(matches[n, row])
            if j in columns:
                good.append(-float(table[i, columns.index(j)]))
                taken.add(j)
            else:
                lonely.append(-float(table[i, -1]))
        lonely += [-float(table[-1, k]) for k, column in enumerate(columns) if column not in taken]
        losses.append(
            weights[0] * (sum(good) / len(good) if good else 0.0)
            + weights[1] * (sum(lonely) / len(lonely) if lonely else 0.0)
        )
    return losses


def points(seed: int = 0, pairs: int = 7) -> tuple[Tensor, ...]:
    """Unequal counts; no match, everything matched, no point on one side; matches to points that are not valid."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(pairs, 6, 5, generator=g, dtype=DOUBLE), torch.randn(pairs, 8, 5, generator=g, dtype=DOUBLE)
    va, vb = torch.rand(pairs, 6, generator=g) > 0.3, torch.rand(pairs, 8, generator=g) > 0.3
    matches = torch.stack([torch.randperm(8, generator=g)[:6] for _ in range(pairs)])
    matches[torch.rand(pairs, 6, generator=g) > 0.7] = -1
    matches[1] = -1
    va[2], vb[2], matches[2] = True, torch.arange(8) < 6, torch.randperm(6, generator=g)
    va[3], vb[4] = False, False
    return a, b, va, vb, matches


@pytest.mark.parametrize("weights", [(0.45, 1.0), (1.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("limit", [2**24, 7 * 9 * 2])
def test_loss_equals_naive(weights: tuple[float, float], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "MAX_ELEMENTS", limit)
    dustbin = torch.tensor(0.2, dtype=DOUBLE)
    per_pair, counted = transport_loss(
        *points(), dustbin, iterations=20, matched_weight=weights[0], unmatched_weight=weights[1]
    )
    expected = naive_loss(*points(), dustbin, weights)
    assert counted.tolist() == [not math.isnan(x) for x in expected]
    assert per_pair.tolist() == pytest.approx([0.0 if math.isnan(x) else x for x in expected], abs=1e-9)


def test_loss_gradcheck_with_and_without_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, va, vb, matches = points()
    dustbin = torch.tensor(0.2, dtype=DOUBLE)
    inputs = [x.requires_grad_() for x in (a, b, dustbin)]
    gradients = []
    for limit in (2**24, 7 * 9 * 3):
        monkeypatch.setattr(pairwise, "MAX_ELEMENTS", limit)
        gradients.append(torch.autograd.grad(loss_of(a, b, va, vb, matches, dustbin)[0].square().sum(), inputs))
    torch.testing.assert_close(gradients[0], gradients[1])
    few = partial(transport_loss, iterations=3, matched_weight=0.45, unmatched_weight=1.0)
    assert torch.autograd.gradcheck(lambda x, y, z: few(x, y, va, vb, matches, z)[0], inputs)


def test_padding_may_hold_nan() -> None:
    a, b, va, vb, matches = points()
    dustbin = torch.tensor(0.2, dtype=DOUBLE)
    plain = loss_of(a, b, va, vb, matches, dustbin)[0]
    a[~va], b[~vb] = torch.nan, torch.inf
    a, b, dustbin = a.requires_grad_(), b.requires_grad_(), dustbin.requires_grad_()
    loss, _ = loss_of(a, b, va, vb, matches, dustbin)
    torch.testing.assert_close(loss, plain)
    gradients = torch.autograd.grad(loss.sum(), (a, b, dustbin))
    assert all(torch.isfinite(x).all() for x in gradients)
    assert (gradients[0][~va] == 0).all()
    assert (gradients[1][~vb] == 0).all()


def test_the_loss_falls_when_matches_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    a, valid = torch.randn(1, 5, 16, generator=generator), torch.ones(1, 5, dtype=torch.bool)
    dustbin = torch.tensor(0.0)
    right, wrong = torch.arange(5).unsqueeze(0), torch.arange(5).roll(1).unsqueeze(0)
    good, bad = (loss_of(4 * a, 4 * a, valid, valid, matches, dustbin)[0] for matches in (right, wrong))
    assert good < bad
    # unmatched points want a high dustbin
    nothing = torch.full((1, 5), -1)
    high = loss_of(a, a, valid, valid, nothing, torch.tensor(40.0))[0]
    assert float(high) < 0.05  # the iterations approach 0 slowly
    assert high < loss_of(a, a, valid, valid, nothing, dustbin)[0]


def test_errors() -> None:
    ok, dustbin = torch.ones(1, 2, dtype=torch.bool), torch.tensor(0.0)
    with pytest.raises(KAFError, match="scores"):
        log_sinkhorn(torch.zeros(1, 2, 3), dustbin, ok, ok, 5)
    with pytest.raises(KAFError, match="iterations is 0"):
        log_sinkhorn(torch.zeros(1, 2, 2), dustbin, ok, ok, 0)
    with pytest.raises(KAFError, match="matches"):
        loss_of(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), ok, ok, torch.zeros(1, 3).long(), dustbin)


def test_points_that_merely_lack_a_partner_do_not_belong_to_the_dustbin() -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randn(1, 3, 4, generator=generator) for _ in range(2))
    valid, matches = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, -1, -1]])
    options = {"dustbin": torch.tensor(0.0), "iterations": 20, "matched_weight": 0.0, "unmatched_weight": 1.0}
    # The second keypoints are within reach of each other, the third ones of nobody.
    places = Places(
        torch.tensor([[[0.0], [20.0], [50.0]], [[0.0], [26.0], [90.0]]]), torch.tensor([2.0]), torch.tensor([8.0])
    )
    found, _ = transport_loss(first, second, valid, valid, matches, places=places, **options)
    scores = torch.bmm(first, second.transpose(1, 2)) / math.sqrt(4)
    cost = -log_sinkhorn(scores, options["dustbin"], valid, valid, 20)
    assert found == pytest.approx(((cost[0, 2, -1] + cost[0, -1, 2]) / 2).item(), rel=1e-5)
