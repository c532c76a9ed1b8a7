import copy

import pytest
import torch
from torch import nn
from torch.nn.parameter import Parameter

from semisupervised.quick_norm import quicken_norms

NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def network(dims: int, **options: bool) -> nn.Sequential:
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    torch.manual_seed(dims)
    norm = NORMS[dims](5, eps=1e-3, affine=True, **options)
    for parameter in (norm.weight, norm.bias):
        nn.init.normal_(parameter)
    return nn.Sequential(conv(2, 5, 3, padding=1), norm, nn.LeakyReLU(inplace=True), conv(5, 1, 1))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_the_same(dims, training):
    slow = network(dims).double().train(training)
    quick = copy.deepcopy(slow)
    quicken_norms(quick)
    images = [torch.randn(3, 2, *(6, 7, 9)[-dims:], dtype=torch.float64).requires_grad_() for _ in range(1)]
    images.append(images[0].detach().clone().requires_grad_())
    for net, image in zip((slow, quick), images, strict=True):
        net(image).square().sum().backward()
    torch.testing.assert_close(quick(images[0]), slow(images[0]), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(images[1].grad, images[0].grad, atol=1e-10, rtol=1e-8)
    for a, b in zip(quick.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-8)


def test_it_is_the_group_normalisation_that_runs_also_in_a_copy():
    quick = network(2)
    quicken_norms(quick)
    twin = copy.deepcopy(quick)
    with torch.no_grad():
        twin[1].weight.zero_()
        twin[1].bias.fill_(2)
    image = torch.randn(1, 2, 4, 4)
    with torch.profiler.profile() as seen:
        out = twin[1](twin[0](image))
    assert torch.equal(out, torch.full_like(out, 2)), "the copy uses its own parameters"
    names = {event.key for event in seen.key_averages()}
    assert "aten::native_group_norm" in names
    assert "aten::native_batch_norm" not in names


def test_names_stay_and_weights_of_one_form_fit_the_other():
    slow, quick = network(3), network(3)
    quicken_norms(quick)
    assert list(quick.state_dict()) == list(slow.state_dict())
    slow[1].weight = Parameter(torch.randn(5))
    quick.load_state_dict(slow.state_dict())
    image = torch.randn(2, 2, 4, 5, 6)
    torch.testing.assert_close(quick(image), slow(image), atol=1e-5, rtol=1e-4)
    assert isinstance(quick[1], nn.InstanceNorm3d)


def test_others_are_left_alone():
    class Own(nn.InstanceNorm2d):
        pass

    running = network(2, track_running_stats=True)
    own = nn.Sequential(Own(3), nn.BatchNorm2d(3))
    for net in (running, own):
        before = [type(module) for module in net.modules()]
        quicken_norms(net)
        assert [type(module) for module in net.modules()] == before
