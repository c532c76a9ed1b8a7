"""The engine itself; whole files are in tests/pretraining/exchange/test_interop.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnunetv2_kaf.fitting import CONVOLUTIONAL, concatenated_stages, fit
from nnunetv2_kaf.weights import first_convolution

Build = Callable[..., nn.Module]


def encoder(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if name.startswith("encoder.")}


def test_equal_networks_fit_without_a_rule(build_kaf: Build) -> None:
    source, target = encoder(build_kaf(3)), encoder(build_kaf(3))
    found = fit(source, target, first_convolution(build_kaf(3)), ())
    assert found.values.keys() == target.keys()
    assert (found.adapted, found.left, found.misfits) == ({}, [], [])


def test_other_kernels_are_adapted_only_if_asked_for(build_plain: Build, build_kaf: Build) -> None:
    network = build_kaf(3)
    target = encoder(network)
    source = {
        name: torch.randn(*tensor.shape[:2], 3, 3, 3) if tensor.ndim == 5 and tensor.shape[2] == 1 else tensor
        for name, tensor in encoder(build_plain(3)).items()
    }
    changed = {n for n, t in source.items() if t.shape != target[n].shape}
    assert changed
    first = first_convolution(network)
    refused = fit(source, target, first, concatenated_stages(network))
    assert len(refused.misfits) == len(changed)
    taken = fit(source, target, first, concatenated_stages(network), adapt=True)
    assert taken.misfits == []
    assert set(taken.adapted) == changed
    for name in changed:
        assert taken.adapted[name] == "kernel [3, 3, 3] summed or padded to [1, 3, 3]"
        torch.testing.assert_close(taken.values[name], source[name].sum(2, keepdim=True))


def test_fewer_and_more_stages(build_plain: Build) -> None:
    network = build_plain(2)
    whole = {n: t for n, t in encoder(network).items() if n.startswith(CONVOLUTIONAL)}
    short = {n: t for n, t in whole.items() if not n.startswith("encoder.stages.2.")}
    last = set(whole) - set(short)
    first = first_convolution(network)
    assert len(fit(short, whole, first, ()).misfits) == len(last)
    deeper = fit(short, whole, first, (), adapt=True)
    assert set(deeper.left) == last
    assert deeper.misfits == []
    shallower = fit(whole, short, first, (), adapt=True)
    assert set(shallower.adapted) == last
    assert "not used" in next(iter(shallower.adapted.values()))
    assert shallower.values.keys() == short.keys()


def test_other_features_never_fit(build_plain: Build) -> None:
    network = build_plain(2)
    target = encoder(network)
    source = {name: tensor[:1] if tensor.ndim > 1 else tensor for name, tensor in target.items()}
    assert fit(source, target, first_convolution(network), (), adapt=True).misfits
