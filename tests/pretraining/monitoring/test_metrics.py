from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from pretraining.config import COMPONENTS
from pretraining.monitoring.metrics import GROUPS, PANELS, alignment, effective_rank, recall_hits, uniformity
from pretraining.monitoring.monitor import MONITORED


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    return sum(p * q for p, q in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


def squared_distance(a: Tensor, b: Tensor) -> float:
    return 2 - 2 * cosine(a, b)


def naive_recall(first: Tensor, second: Tensor, valid: Tensor, matches: Tensor, ranks: tuple[int, ...]) -> list[int]:
    hits = [0] * len(ranks)
    for n, row in enumerate(matches.tolist()):
        for i, j in enumerate(row):
            if j < 0:
                continue
            own = cosine(first[n, i], second[n, j])
            better = 0
            for k in range(second.shape[1]):
                if k != j and valid[n, k] and cosine(first[n, i], second[n, k]) >= own:
                    better += 1
            for r, rank in enumerate(ranks):
                hits[r] += better < rank
    return hits


def keypoints(batch: int = 3, count: int = 9, other: int = 7, size: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Descriptors of two views, validity of the second and random matches to its valid keypoints."""
    g = generator(batch + count)
    second = torch.randn(batch, other, size, generator=g, dtype=torch.float64)
    valid = torch.rand(batch, other, generator=g) < 0.7
    matches = torch.full((batch, count), -1)
    for n in range(batch):
        usable = valid[n].nonzero()[:, 0]
        chosen = usable[torch.randperm(len(usable), generator=g)][: count - 2]
        matches[n, : len(chosen)] = chosen
    noise = torch.randn(batch, count, size, generator=g, dtype=torch.float64)
    partners = second.gather(1, matches.clamp_min(0).unsqueeze(2).expand(-1, -1, size))
    return partners + noise, second, valid, matches


@pytest.mark.parametrize("ranks", [(1, 5), (1,), (2, 3, 7)])
@pytest.mark.parametrize(("count", "other"), [(9, 7), (7, 9), (4, 4)])
def test_recall_equals_naive(ranks: tuple[int, ...], count: int, other: int) -> None:
    first, second, valid, matches = keypoints(count=count, other=other)
    hits, total = recall_hits(first, second, valid, matches, ranks)
    assert hits.tolist() == naive_recall(first, second, valid, matches, ranks)
    assert int(total) == int((matches >= 0).sum()) > 0
    assert hits.dtype == total.dtype == torch.long


def test_recall_by_hand() -> None:
    # cosines of keypoint 0 with the second view: 1, 0.8, 0; of keypoint 1: 0, 0.6, 1
    first = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    second = torch.tensor([[[3.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    for matches, expected in (((0, 2), [2, 2, 2]), ((1, 2), [1, 2, 2]), ((2, 0), [0, 0, 2]), ((-1, 1), [0, 1, 1])):
        hits, total = recall_hits(first, second, everything, torch.tensor([matches]), ranks=(1, 2, 3))
        assert hits.tolist() == expected
        assert int(total) == 2 - matches.count(-1)


def test_recall_ignores_invalid_keypoints_and_the_length_of_descriptors() -> None:
    first, second, valid, matches = keypoints()
    hits, total = recall_hits(first, second, valid, matches)
    assert 0 < int(hits[0]) < int(total)
    filled = torch.where(valid.unsqueeze(2), second, first[:, :1])
    assert recall_hits(first, filled, valid, matches)[0].tolist() == hits.tolist()
    assert (
        recall_hits(3 * first, second * torch.arange(1, 8).view(1, 7, 1), valid, matches)[0].tolist() == hits.tolist()
    )


def test_recall_is_independent_of_padding_order_and_batch_mates() -> None:
    first, second, valid, matches = keypoints()
    hits, total = recall_hits(first, second, valid, matches)
    padded = recall_hits(
        torch.cat([first, first], 1),
        torch.cat([second, first[:, :5]], 1),
        torch.cat([valid, torch.zeros(3, 5, dtype=torch.bool)], 1),
        torch.cat([matches, torch.full_like(matches, -1)], 1),
    )
    assert (padded[0].tolist(), int(padded[1])) == (hits.tolist(), int(total))
    order = torch.randperm(7, generator=generator())
    moved = torch.where(matches >= 0, order.argsort()[matches.clamp_min(0)], -1)
    assert recall_hits(first, second[:, order], valid[:, order], moved)[0].tolist() == hits.tolist()
    single = [recall_hits(first[n, None], second[n, None], valid[n, None], matches[n, None])[0] for n in range(3)]
    assert torch.stack(single).sum(0).tolist() == hits.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_collapsed_descriptors_recall_nothing(dtype: torch.dtype) -> None:
    everything, matches = torch.ones(2, 40, dtype=torch.bool), torch.arange(40).expand(2, 40)
    for vector in (torch.randn(33, generator=generator(), dtype=torch.float64), torch.zeros(33)):
        same = vector.to(dtype).expand(2, 40, 33)
        hits, total = recall_hits(same, same, everything, matches)
        assert (hits.tolist(), int(total)) == ([0, 0], 80)


def test_descriptors_that_differ_by_rounding_recall_nothing() -> None:
    g = generator()
    # Differences of the cosine of about 1e-8, below the rounding of float32: their order would be chance
    nearly = torch.randn(33, generator=g) + 1e-4 * torch.randn(2, 40, 33, generator=g)
    hits, _ = recall_hits(nearly, nearly, torch.ones(2, 40, dtype=torch.bool), torch.arange(40).expand(2, 40))
    assert hits.tolist() == [0, 0]


def test_recall_of_broken_descriptors_is_zero() -> None:
    broken = torch.full((1, 8, 4), math.nan)
    hits, _ = recall_hits(broken, broken, torch.ones(1, 8, dtype=torch.bool), torch.arange(8).unsqueeze(0))
    assert hits.tolist() == [0, 0]


@pytest.mark.parametrize("count", [0, 6])
def test_recall_without_matches_is_zero_of_zero(count: int) -> None:
    points = torch.randn(2, count, 4, generator=generator())
    nothing = torch.full((2, count), -1)
    hits, total = recall_hits(points, points, torch.zeros(2, count, dtype=torch.bool), nothing)
    assert (hits.tolist(), int(total)) == ([0, 0], 0)


def test_recall_is_measured_in_full_precision_within_autocast() -> None:
    g = generator()
    first = torch.randn(4, 64, 32, generator=g)
    # Differences of the cosine below the precision of bfloat16
    second = first[:, :1] + 0.02 * torch.randn(4, 64, 32, generator=g)
    arguments = (
        second.flip(1) + 1e-4,
        second,
        torch.ones(4, 64, dtype=torch.bool),
        torch.arange(64).flip(0).expand(4, 64),
    )
    hits, _ = recall_hits(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = recall_hits(*arguments)
    assert inside.tolist() == hits.tolist()
    assert int(hits[0]) > 200


@pytest.mark.parametrize(
    ("second", "valid", "matches"),
    [
        ((2, 5, 3), (2, 5), (2, 6)),
        ((2, 5, 4), (2, 6), (2, 6)),
        ((2, 5, 4), (2, 5), (2, 5)),
        ((3, 5, 4), (3, 5), (2, 6)),
    ],
)
def test_recall_names_shapes_that_disagree(
    second: tuple[int, ...], valid: tuple[int, ...], matches: tuple[int, ...]
) -> None:
    with pytest.raises(KAFError, match=r"matches \(B, K\); found \(2, 6, 4\)"):
        recall_hits(
            torch.zeros(2, 6, 4), torch.zeros(second), torch.zeros(valid).bool(), torch.zeros(matches, dtype=torch.long)
        )


@pytest.mark.parametrize("ranks", [(), (0, 5)])
def test_recall_refuses_ranks_below_one(ranks: tuple[int, ...]) -> None:
    first, second, valid, matches = keypoints()
    with pytest.raises(KAFError, match="ranks of at least 1"):
        recall_hits(first, second, valid, matches, ranks)


@pytest.mark.parametrize("count", [2, 6, 20])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_alignment_and_uniformity_equal_naive(count: int, size: int) -> None:
    z = torch.randn(count, size, generator=generator(count), dtype=torch.float64)
    half = count // 2
    expected = sum(squared_distance(z[i], z[i + half]) for i in range(half)) / half
    assert float(alignment(z)) == pytest.approx(expected, abs=1e-9)
    potentials = [math.exp(-2 * squared_distance(z[i], z[j])) for i in range(count) for j in range(count) if i != j]
    assert float(uniformity(z)) == pytest.approx(math.log(sum(potentials) / len(potentials)), abs=1e-9)


def test_alignment_and_uniformity_by_hand() -> None:
    x, y = [3.0, 0.0], [0.0, 0.5]
    assert float(alignment(torch.tensor([x, y, x, y]))) == 0
    assert float(alignment(torch.tensor([x, x, x, y]))) == pytest.approx(1)
    assert float(alignment(torch.tensor([x, [-1.0, 0.0]]))) == pytest.approx(4)
    assert float(uniformity(torch.tensor([x, [-1.0, 0.0]]))) == pytest.approx(-8)
    # 6 pairs: 2 equal ones, 4 at a squared distance of 2
    expected = math.log((2 + 4 * math.exp(-4)) / 6)
    assert float(uniformity(torch.tensor([x, y, x, y]))) == pytest.approx(expected, rel=1e-6)


def test_uniformity_of_evenly_spread_vectors_is_as_documented() -> None:
    z = torch.randn(1000, 64, generator=generator())
    assert float(uniformity(z)) == pytest.approx(-4 + 8 / 64, abs=0.02)
    assert float(alignment(z)) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("metric", [alignment, uniformity, effective_rank])
def test_global_metrics_ignore_length_rotation_and_the_order_of_pairs(metric: object) -> None:
    assert callable(metric)
    g = generator()
    z = torch.randn(12, 5, generator=g, dtype=torch.float64)
    expected = float(metric(z))
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    order = torch.randperm(6, generator=g)
    assert float(metric(z * torch.rand(12, 1, generator=g).add(0.1))) == pytest.approx(expected)
    assert float(metric(z @ rotation)) == pytest.approx(expected)
    assert float(metric(z[torch.cat([order, order + 6])])) == pytest.approx(expected)
    assert float(metric(z.roll(6, 0))) == pytest.approx(expected)
    assert float(metric(z.roll(1, 1) + z)) != pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_global_metrics_of_collapsed_vectors(dtype: torch.dtype) -> None:
    z = torch.randn(1, 128, generator=generator()).expand(64, 128).to(dtype)
    assert float(alignment(z)) == pytest.approx(0, abs=1e-9)
    assert float(uniformity(z)) == pytest.approx(0, abs=1e-9)
    assert float(effective_rank(z)) == 1
    assert alignment(z).dtype == uniformity(z).dtype == effective_rank(z).dtype == torch.float32


@pytest.mark.parametrize(("count", "size"), [(4, 6), (10, 3), (40, 8), (2, 2)])
def test_effective_rank_equals_naive(count: int, size: int) -> None:
    z = torch.randn(count, size, generator=generator(count), dtype=torch.float64)
    x = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    x = x - x.mean(axis=0)
    # singular values from the eigenvalues of the Gram matrix: another road than that of the code
    values = np.sqrt(np.clip(np.linalg.eigvalsh(x.T @ x), 0, None))
    entropy = 0.0
    for share in values / values.sum():
        entropy -= share * math.log(share) if share > 1e-7 else 0
    assert float(effective_rank(z)) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert 1 <= float(effective_rank(z)) <= min(count - 1, size) + 1e-9


@pytest.mark.parametrize("dimensions", [1, 2, 5, 8])
def test_effective_rank_of_a_cross_is_its_number_of_axes(dimensions: int) -> None:
    axes = torch.eye(8)[:dimensions]
    assert float(effective_rank(torch.cat([axes, -2 * axes]))) == pytest.approx(dimensions, rel=1e-5)


def test_effective_rank_by_hand() -> None:
    # centred singular values sqrt(4) and sqrt(2): shares p and 1 - p
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    p = 2 / (2 + math.sqrt(2))
    assert float(effective_rank(z)) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 64])
@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_effective_rank_of_equal_vectors_is_one_and_never_nan(count: int, noise: float) -> None:
    g = generator()
    z = torch.randn(1, 128, generator=g).expand(count, 128)
    assert float(effective_rank(z * (1 + noise * torch.randn(count, 128, generator=g)))) == 1
    assert float(effective_rank(torch.zeros(count, 128))) == 1


def test_effective_rank_sees_a_small_spread_above_the_rounding() -> None:
    g = generator()
    z = torch.randn(1, 128, generator=g) + 0.01 * torch.randn(64, 128, generator=g)
    assert float(effective_rank(z)) > 30


def test_metrics_of_vectors_that_are_not_finite_are_nan() -> None:
    z = torch.randn(8, 4, generator=generator())
    z[3, 2] = math.nan
    assert math.isnan(float(effective_rank(z)))
    assert math.isnan(float(alignment(z)))
    assert math.isnan(float(uniformity(z)))


def test_global_metrics_refuse_other_shapes() -> None:
    for metric, shapes in (
        (alignment, ((3, 4), (0, 4), (2, 3, 4))),
        (uniformity, ((1, 4), (2, 3, 4))),
        (effective_rank, ((0, 4), (2, 3, 4))),
    ):
        for shape in shapes:
            with pytest.raises(KAFError, match="Expected embeddings"):
                metric(torch.zeros(shape))


def test_metrics_change_neither_their_input_nor_the_random_state() -> None:
    before = torch.get_rng_state()
    first, second, valid, matches = keypoints()
    copies = [t.clone() for t in (first, second, valid, matches)]
    recall_hits(first, second, valid, matches)
    z = first[:, :8].flatten(0, 1)
    for metric in (alignment, uniformity, effective_rank):
        metric(z)
    for tensor, copy in zip((first, second, valid, matches), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_number_of_a_run_is_registered_once() -> None:
    names = [name for panel in PANELS for name in panel.names]
    assert len(names) == len(set(names))
    assert set(MONITORED) <= set(names)
    assert {"total", "matched", "learning_rate", *COMPONENTS} <= set(names)
    assert GROUPS["uniformity"] == GROUPS["effective_rank"] == "global"
