import math

import pytest
import torch

from semisupervised.losses import SMOOTH, PseudoLabels, UnlabelledLoss, at_resolution, hard_labels


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


def pseudo_labels(output: torch.Tensor, threshold: float, regions: bool) -> PseudoLabels:
    target, probability = hard_labels(output, regions)
    return PseudoLabels(target, probability >= threshold)


def test_labels_are_the_likeliest_ones_with_their_probability():
    probabilities = torch.tensor([[0.96, 0.04], [0.6, 0.4], [0.2, 0.8]])
    target, probability = hard_labels(probabilities.log().T[None, :, :, None], regions=False)
    assert target[0, 0, :, 0].tolist() == [0, 0, 1]
    assert target.dtype == torch.int64
    torch.testing.assert_close(probability[0, 0, :, 0], torch.tensor([0.96, 0.6, 0.8]))
    target, probability = hard_labels(torch.tensor([0.9, 0.3]).logit().view(1, 2, 1, 1), regions=True)
    assert target.flatten().tolist() == [1, 0]
    torch.testing.assert_close(probability.flatten(), torch.tensor([0.9, 0.7]))


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
def test_the_loss_is_that_of_a_naive_loop(shape):
    output = logits(2, 3, *shape)
    labels = pseudo_labels(logits(2, 3, *shape).flip(0), 0.8, regions=False)
    probability = output.softmax(1)
    entropy, count = 0.0, 0
    overlap, guessed, wanted = [0.0] * 3, [0.0] * 3, [0.0] * 3
    for b in range(2):
        for place in torch.cartesian_prod(*[torch.arange(n) for n in shape]).tolist():
            count += 1
            if not labels.sure[(b, 0, *place)]:
                continue
            wish = int(labels.target[(b, 0, *place)])
            entropy -= math.log(float(probability[(b, wish, *place)]))
            for c in range(3):
                p = float(probability[(b, c, *place)])
                guessed[c] += p
                wanted[c] += c == wish
                overlap[c] += p * (c == wish)
    smooth = SMOOTH * count
    dice = sum((2 * overlap[c] + smooth) / (guessed[c] + wanted[c] + smooth) for c in (1, 2)) / 2
    loss = UnlabelledLoss(regions=False, batch_dice=True, ddp=False)([output], labels)
    assert loss.item() == pytest.approx(entropy / count - dice, rel=1e-4)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_few_voxels_of_a_class_weigh_little_whether_they_are_missed_or_too_many(batch_dice):
    def dice(labelled: int, given: int) -> float:
        """Dice of class 1 where the network gives it to the first voxels of 1600, without the cross-entropy."""
        target = torch.zeros(1, 1, 40, 40, dtype=torch.int64)
        target.view(-1)[:labelled] = 1
        output = torch.zeros(1, 2, 40, 40)
        output[:, 0].view(-1)[given:] = 50.0
        output[:, 1].view(-1)[:given] = 50.0
        labels = PseudoLabels(target, torch.ones_like(target, dtype=torch.bool))
        entropy = torch.nn.functional.cross_entropy(output, target[:, 0])
        return float(entropy - UnlabelledLoss(False, batch_dice, ddp=False)([output], labels))

    assert dice(4, 4) == dice(0, 0) == pytest.approx(1)
    assert 0.9 < dice(4, 0) < 1  # nnU-Net's is 0
    assert dice(400, 0) < 0.2
    assert 0.9 < dice(0, 4) < 1  # as wrong as to miss them; nnU-Net's is 0, whether there are 4 or 40
    assert dice(0, 40) < 0.7


def test_unsure_voxels_do_not_matter():
    for regions in (False, True):
        output = logits(2, 3, 6, 6).requires_grad_()
        labels = pseudo_labels(logits(2, 3, 6, 6).flip(1), 0.9, regions)
        loss = UnlabelledLoss(regions, batch_dice=False, ddp=False)([output], labels)
        loss.backward()
        sure = labels.sure.expand(2, 3, 6, 6)
        assert (output.grad[~sure] == 0).all()
        assert (output.grad[sure] != 0).any()
        other = torch.where(labels.sure, labels.target, (1 - labels.target).abs())
        again = UnlabelledLoss(regions, batch_dice=False, ddp=False)([output], PseudoLabels(other, labels.sure))
        assert again.item() == pytest.approx(loss.item())


def test_nothing_sure_gives_no_gradient():
    output = logits(1, 3, 4, 4).requires_grad_()
    labels = PseudoLabels(torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    UnlabelledLoss(False, batch_dice=True, ddp=False)([output], labels).backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_deep_supervision_weighs_the_outputs_at_their_resolution():
    labels = pseudo_labels(logits(2, 3, 8, 8), 0.5, regions=False)
    fine, coarse, coarsest = logits(2, 3, 8, 8), logits(2, 3, 4, 4), logits(2, 3, 2, 2)
    single = UnlabelledLoss(False, batch_dice=True, ddp=False)
    both = UnlabelledLoss(False, batch_dice=True, ddp=False, weights=(0.75, 0.25, 0.0))
    expected = 0.75 * single([fine], labels) + 0.25 * single([coarse], at_resolution(labels, (4, 4)))
    assert both([fine, coarse, coarsest], labels).item() == pytest.approx(expected.item())
    half = at_resolution(labels, (4, 4))
    assert torch.equal(half.target, labels.target[:, :, 1::2, 1::2])
    assert half.sure.dtype == torch.bool


@pytest.mark.parametrize("shape", [(5, 4), (8, 8), (3, 1)])
def test_labels_are_resampled_as_nnunet_resamples_them(shape):
    labels = pseudo_labels(logits(2, 4, 8, 8), 0.5, regions=False)
    expected = torch.nn.functional.interpolate(labels.target.float(), size=shape, mode="nearest-exact")
    assert torch.equal(at_resolution(labels, shape).target.float(), expected)
