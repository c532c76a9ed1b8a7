from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import networks
import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from synthetic import Layout

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.fusion import Diffusion

CPU = torch.device("cpu")
CASES = {
    2: networks.Case(
        Layout((4, 32, 24), (6.0, 1.5, 1.5), (32, 24), 5, (4, 8, 8), ((1, 1), (2, 2), (2, 2))), 3, 3, True
    ),
    3: networks.Case(
        Layout((8, 16, 24), (6.0, 1.5, 1.5), (8, 16, 24), 3, (4, 8, 8), ((1, 1, 1), (1, 2, 2), (2, 2, 2))), 2, 2
    ),
}


@pytest.fixture(autouse=True)
def _small_paper_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = KAFConfig.paper(token_dim=32, num_blocks=1, diffusion_channels=8)
    for name in ("paper_sparse", "paper_dense"):
        monkeypatch.setitem(networks.ARMS, name, (config, name.removeprefix("paper_")))


@pytest.fixture(params=[2, 3], ids=["2d", "3d"])
def case(request: pytest.FixtureRequest) -> networks.Case:
    return CASES[request.param]


@pytest.mark.parametrize("name", networks.CASES)
def test_the_networks_are_those_that_nnunet_plans(name: str) -> None:
    case = networks.CASES[name]
    options = case.layout.plan()["architecture"]["arch_kwargs"]
    spacing = case.layout.spacing[-case.dims :]
    _, strides, kernels, patch, _ = get_pool_and_conv_props(spacing, case.layout.patch_size, 4, 999999)
    assert [list(s) for s in strides] == options["strides"]
    assert [list(k) for k in kernels] == options["kernel_sizes"]
    assert tuple(patch) == case.layout.patch_size
    assert options["features_per_stage"] == [
        min(32 * 2**i, 320 if case.dims == 3 else 512) for i in range(len(strides))
    ]


@pytest.mark.parametrize("batch_dice", [True, False])
def test_the_loss_is_that_of_nnunets_trainer(case: networks.Case, batch_dice: bool) -> None:
    strides = case.layout.strides
    stub: Any = SimpleNamespace(
        label_manager=SimpleNamespace(has_regions=False, ignore_label=None),
        configuration_manager=SimpleNamespace(batch_dice=batch_dice, pool_op_kernel_sizes=strides),
        is_ddp=False,
        enable_deep_supervision=True,
        _do_i_compile=lambda: False,
    )
    stub._get_deep_supervision_scales = lambda: nnUNetTrainer._get_deep_supervision_scales(stub)
    theirs = nnUNetTrainer._build_loss(stub)
    ours = networks.make_loss(SimpleNamespace(batch_dice=batch_dice, layout=case.layout), compiled=False)  # type: ignore[arg-type]
    batch = networks.make_batch(case, 3, 0, CPU)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, case.classes, *target.shape[2:], generator=generator) for target in batch.targets]
    assert torch.equal(ours(logits, batch.targets), theirs(logits, batch.targets))


def test_the_batch_fits_the_network(case: networks.Case) -> None:
    batch = networks.make_batch(case, 3, 0, CPU)
    outputs = networks.build(case, "plain", 0, CPU)(batch.data)
    assert [o.shape[2:] for o in outputs] == [t.shape[2:] for t in batch.targets]
    assert outputs[0].shape[:2] == (3, case.classes)
    for target in batch.targets:
        assert target.unique().tolist() == list(range(case.classes))
    assert not torch.equal(batch.data[0], batch.data[1])
    assert torch.equal(batch.data, networks.make_batch(case, 3, 0, CPU).data)
    assert not torch.equal(batch.data, networks.make_batch(case, 3, 1, CPU).data)


def test_arms_differ_in_the_evaluation_only(case: networks.Case) -> None:
    batch = networks.make_batch(case, 1, 0, CPU)
    built = {name: networks.build(case, name, 0, CPU) for name in ("paper_sparse", "paper_dense")}
    for name, network in built.items():
        diffusions = [m for m in network.modules() if isinstance(m, Diffusion)]
        assert {m.evaluation for m in diffusions} == {name.removeprefix("paper_")}
        assert len(diffusions) == 2
    sparse, dense = (network.state_dict() for network in built.values())
    assert all(torch.equal(sparse[name], dense[name]) for name in dense)
    with torch.no_grad():
        a, b = (network(batch.data)[0] for network in built.values())
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_building_leaves_the_global_generator_alone(case: networks.Case) -> None:
    state = torch.get_rng_state()
    networks.build(case, "kaf", 0, CPU)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("arm", ["plain", "kaf"])
def test_steps_train(case: networks.Case, arm: str) -> None:
    batch, loss = networks.make_batch(case, 2, 0, CPU), networks.make_loss(case, compiled=False)
    step = networks.TrainingStep(networks.build(case, arm, 0, CPU), loss, batch, compiled=False)
    before = len(step.alive())
    losses = [step() for _ in range(8)]
    assert losses[-1] < losses[0]
    # One momentum per parameter has come, but for the coarsest output, which has no weight in the loss.
    assert len(step.alive()) == before + len(list(step.eager.parameters())) - 2


def test_batches_are_smaller_on_a_cpu() -> None:
    cube = networks.CASES["128^3"]
    assert CASES[2].batch_size(CPU, planned=False) == 3
    assert CASES[2].batch_size(CPU, planned=True) == 5
    assert CASES[2].batch_size(torch.device("cuda"), planned=False) == 5
    assert cube.batch_size(CPU, planned=False) is None
    assert cube.batch_size(torch.device("cuda"), planned=False) == 2
