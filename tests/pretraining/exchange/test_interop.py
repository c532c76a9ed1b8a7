from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_architecture
from nnunetv2_kaf.weights import save_pretraining_checkpoint
from pretraining.exchange.interop import describe, initialize_encoder
from pretraining.exchange.sources import read_weights

UNETS = "dynamic_network_architectures.architectures.unet"
SMALL = KAFConfig(num_keypoints=9, token_dim=8, num_blocks=1, num_heads=2, position_hidden=(8,))
CONCAT = KAFConfig(num_keypoints=9, token_dim=8, num_blocks=1, num_heads=2, position_hidden=(8,), fusion="concat")
SPACING = {2: (1.0, 1.5), 3: (4.0, 1.0, 1.0)}
SHAPE = {2: (24, 16), 3: (8, 24, 16)}
FEATURES = (4, 6, 6, 12)  # equal and doubled neighbours: a concat fusion adds one projected skip and removes another


def architecture(ndim: int = 2, backbone: str = "plain", features: tuple[int, ...] = FEATURES) -> dict[str, Any]:
    n = len(features)
    depth = "n_conv_per_stage" if backbone == "plain" else "n_blocks_per_stage"
    return {
        "network_class_name": f"{UNETS}.{'PlainConvUNet' if backbone == 'plain' else 'ResidualEncoderUNet'}",
        "arch_kwargs": {
            "n_stages": n,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": [[1, 3, 3][-ndim:], *[[3] * ndim for _ in features[1:]]],
            "strides": [[1] * ndim, *[[1, 2, 2][-ndim:] for _ in features[1:]]],
            depth: [1, 2, 1, 1][:n],
            "n_conv_per_stage_decoder": [1] * (n - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def with_kaf(entry: dict[str, Any], config: KAFConfig = SMALL, channels: int = 1) -> dict[str, Any]:
    return kaf_architecture(entry, SPACING[len(entry["arch_kwargs"]["strides"][0])], channels, config)


def build(entry: dict[str, Any], channels: int = 1, seed: int = 0) -> nn.Module:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(seed)
    network: nn.Module = get_network_from_plans(
        entry["network_class_name"],
        entry["arch_kwargs"],
        entry["_kw_requires_import"],
        channels,
        3,
        allow_init=True,
        deep_supervision=True,
    )
    return network


def random_weights(network: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter random, so that a tensor that is not taken shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def image(ndim: int, channels: int = 1) -> Tensor:
    return torch.randn(2, channels, *SHAPE[ndim], generator=torch.Generator().manual_seed(3))


def nnunet_file(path: Path, network: nn.Module, prefix: str = "", **extra: Any) -> Path:
    """As `nnUNetTrainer.save_checkpoint` writes it, with its numpy scalars."""
    checkpoint = {
        "network_weights": {prefix + k: v for k, v in network.state_dict().items()},
        "optimizer_state": {},
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "epochs": [np.int64(1)], "ok": np.bool_(True)},
        "_best_ema": np.float64(0.7),
        "init_args": {"plans": {"dataset_name": "Dataset004_X", "plans_name": "P"}, "configuration": "2d", "fold": 0},
        "trainer_name": "nnUNetTrainer",
        **extra,
    }
    torch.save(checkpoint, path)
    return path


def nnssl_file(path: Path, network: nn.Module, rename: Callable[[str], str] = str, **plan: Any) -> Path:
    keys = {"key_to_encoder": network.key_to_encoder, "key_to_stem": network.key_to_stem}
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_num_input_channels": 1,
        **{k: rename(str(v)) for k, v in keys.items()},
        **plan,
    }
    weights = {rename(k): v for k, v in network.state_dict().items()}
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": plan}, path)
    return path


def convolutional(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {k: v.clone() for k, v in state.items() if k.startswith(("encoder.stem.", "encoder.stages."))}


@pytest.mark.parametrize("backbone", ["plain", "residual"])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("write", [nnunet_file, nnssl_file])
def test_the_encoder_computes_what_the_one_in_the_file_computes(
    write: Callable[..., Path], ndim: int, backbone: str, tmp_path: Path
) -> None:
    donor = random_weights(build(architecture(ndim, backbone)))
    network = build(with_kaf(architecture(ndim, backbone)), seed=5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    report = initialize_encoder(network, write(tmp_path / "donor.pth", donor), 1)
    for ours, theirs in zip(network.encoder(image(ndim)), donor.encoder(image(ndim)), strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = convolutional(donor)
    for name, tensor in network.state_dict().items():
        if name.removeprefix("decoder.") not in expected:
            assert torch.equal(tensor, before[name]), f"{name} must stay"
    assert sum(report.tensors.values()) == len(expected)
    assert report.left == {"encoder.layers": sum(k.startswith("encoder.layers.") for k in before)}
    assert report.adapted == {}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks(prefix: str, tmp_path: Path) -> None:
    donor = random_weights(build(architecture()))
    network = build(with_kaf(architecture()))
    initialize_encoder(network, nnunet_file(tmp_path / "donor.pth", donor, prefix), 1)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in convolutional(donor).items())


@pytest.mark.parametrize(
    ("rename", "plan"),
    [
        (lambda k: k.replace("encoder.", "online_encoder.", 1) if k.startswith("encoder.") else k, {}),
        (lambda k: k, {"key_to_encoder": "encoder"}),
        (lambda k: f"module.{k}", {}),
        (lambda k: f"module.{k}", {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"}),
    ],
)
def test_nnssl_names_the_place_of_the_encoder(
    rename: Callable[[str], str], plan: dict[str, str], tmp_path: Path
) -> None:
    donor = random_weights(build(architecture(3, "residual")))
    network = build(with_kaf(architecture(3, "residual")))
    initialize_encoder(network, nnssl_file(tmp_path / "nnssl.pth", donor, rename, **plan), 1)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in convolutional(donor).items())


def test_a_plain_network_is_initialised_too(tmp_path: Path) -> None:
    donor, network = random_weights(build(with_kaf(architecture()))), build(architecture(), seed=4)
    report = initialize_encoder(network, nnunet_file(tmp_path / "kaf.pth", donor), 1)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in convolutional(donor).items())
    assert report.left == {}


def test_keypoint_layers_are_taken_where_all_of_a_layer_fits(tmp_path: Path) -> None:
    donor = random_weights(build(with_kaf(architecture())))
    path = nnunet_file(tmp_path / "kaf.pth", donor)
    same = build(with_kaf(architecture()), seed=4)
    report = initialize_encoder(same, path, 1)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in donor.state_dict().items() if k.startswith("encoder."))
    assert report.left == {}
    deeper = KAFConfig.from_dict({**SMALL.to_dict(), "num_blocks": 2})
    other = build(with_kaf(architecture(), deeper), seed=4)
    before = {k: v.clone() for k, v in other.state_dict().items() if k.startswith("encoder.layers.")}
    report = initialize_encoder(other, path, 1)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in before.items()), (
        "half a layer would be worse than none"
    )
    assert report.left == {"encoder.layers": len(before)}


def test_our_own_checkpoint(tmp_path: Path) -> None:
    donor = random_weights(build(with_kaf(architecture())))
    network = build(with_kaf(architecture()), seed=4)
    report = initialize_encoder(network, own_checkpoint(tmp_path / "own.pth", donor, with_kaf(architecture())), 1)
    assert all(
        torch.equal(v, network.state_dict()[k]) for k, v in donor.state_dict().items() if k.startswith("encoder.")
    )
    assert report.note == "--init with a pretraining checkpoint, Dataset004_X, nnUNetPlans, 2d"


def own_checkpoint(path: Path, network: nn.Module, entry: dict[str, Any], channels: int = 1) -> Path:
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "batch_size": 2,
        "patch_size": [24, 16],
        "spacing": [1.0, 1.5],
        "architecture": entry,
        "normalization_schemes": ["ZScoreNormalization"],
    }
    plans = {"dataset_name": "Dataset004_X", "plans_name": "nnUNetPlans", "configurations": {"2d": configuration}}
    save_pretraining_checkpoint(
        path, network, plans=plans, configuration="2d", num_input_channels=channels, dataset_name="Dataset004_X",
        fold=0, pretraining={},
    )  # fmt: skip
    return path


@pytest.mark.parametrize("backbone", ["plain", "residual"])
def test_one_channel_becomes_several(backbone: str, tmp_path: Path) -> None:
    donor = random_weights(build(architecture(2, backbone)))
    network = build(with_kaf(architecture(2, backbone), channels=3), channels=3)
    report = initialize_encoder(network, nnunet_file(tmp_path / "one.pth", donor), 3)
    one = image(2)
    for ours, theirs in zip(network.encoder(one.repeat(1, 3, 1, 1)), donor.encoder(one), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    first = network.get_parameter(f"{network.keys_to_in_proj[0]}.weight")
    torch.testing.assert_close(first.sum(1, keepdim=True), donor.get_parameter(f"{donor.keys_to_in_proj[0]}.weight"))
    assert set(report.adapted) == {f"{key}.weight" for key in network.keys_to_in_proj}
    assert all("repeated for 3, divided by 3" in rule for rule in report.adapted.values())


def test_several_channels_do_not_become_another_number(tmp_path: Path) -> None:
    path = nnunet_file(tmp_path / "two.pth", build(architecture(), channels=2))
    for channels in (1, 3):
        network = build(with_kaf(architecture(), channels=channels), channels=channels)
        with pytest.raises(KAFError, match=rf"input channels: file 2, here {channels}\. .*found weights for 2"):
            initialize_encoder(network, path, channels)
    same = build(with_kaf(architecture(), channels=2), channels=2)
    assert initialize_encoder(same, path, 2).adapted == {}


@pytest.mark.parametrize("ndim", [2, 3])
def test_concat_fusion_starts_with_the_features_of_the_file(ndim: int, tmp_path: Path) -> None:
    donor = random_weights(build(architecture(ndim)))
    network = build(with_kaf(architecture(ndim), CONCAT), seed=4)
    report = initialize_encoder(network, nnunet_file(tmp_path / "plain.pth", donor), 1)
    for ours, theirs in zip(network.encoder(image(ndim)), donor.encoder(image(ndim)), strict=True):
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs)
    assert {name.split(".")[2] for name in report.adapted} == {"1", "2", "3"}, "stage 0 sees no fusion"


def test_concat_fusion_in_a_residual_backbone(tmp_path: Path) -> None:
    donor = random_weights(build(architecture(2, "residual")))
    network = build(with_kaf(architecture(2, "residual"), CONCAT), seed=4)
    report = initialize_encoder(network, nnunet_file(tmp_path / "residual.pth", donor), 1)
    ours, theirs = network.state_dict(), donor.state_dict()
    # stage 1, 4 -> 6 features: both project, with twice the input here
    name = "encoder.stages.1.blocks.0.skip.1.conv.weight"
    assert torch.equal(ours[name], torch.cat((theirs[name], torch.zeros_like(theirs[name])), dim=1))
    # stage 2, 6 -> 6: only ours projects; it hands on the six features
    name = "encoder.stages.2.blocks.0.skip.1.conv.weight"
    assert name not in theirs
    assert torch.equal(ours[name].flatten(1), torch.cat((torch.eye(6), torch.zeros(6, 6)), dim=1))
    assert report.adapted[name].startswith("identity")
    # stage 3, 6 -> 12: only theirs projects; 12 channels come in here
    name = "encoder.stages.3.blocks.0.skip.1.conv.weight"
    assert name not in ours
    assert report.adapted[name].startswith("not used")
    for ours_map, theirs_map in zip(network.encoder(image(2))[:2], donor.encoder(image(2))[:2], strict=True):
        torch.testing.assert_close(ours_map[:, : theirs_map.shape[1]], theirs_map)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (architecture(features=(4, 6, 8, 12)), r"features: file \[4, 6, 8, 12\], here \[4, 6, 6, 12\]"),
        (architecture(features=FEATURES[:3]), r"stages: file 3, here 4.*encoder\.stages\.3\..* not in the file"),
        (architecture(3), r"kernel sizes: file \[\[1, 3, 3\].*here \[\[3, 3\]"),
        (architecture(2, "residual"), r"backbone: file residual, here plain"),
    ],
)
def test_another_architecture_is_named_and_nothing_is_changed(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = nnunet_file(tmp_path / "other.pth", build(other))
    network = build(with_kaf(architecture()))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(KAFError, match=message):
        initialize_encoder(network, path, 1)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_one_missing_and_one_additional_tensor_are_errors(tmp_path: Path) -> None:
    donor, network = build(architecture()), build(with_kaf(architecture()))
    state = donor.state_dict()
    gone = "encoder.stages.1.0.convs.1.norm.bias"
    path = nnunet_file(tmp_path / "less.pth", donor, network_weights={k: v for k, v in state.items() if k != gone})
    with pytest.raises(KAFError, match=rf"{gone}: not in the file"):
        initialize_encoder(network, path, 1)
    more = {**state, "encoder.stages.4.0.convs.0.conv.weight": torch.zeros(4, 12, 3, 3)}
    with pytest.raises(KAFError, match=r"stages: file 5, here 4.*only in the file"):
        initialize_encoder(network, nnunet_file(tmp_path / "more.pth", donor, network_weights=more), 1)


class Evil:
    """Makes a folder when it is unpickled without restrictions."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = nnunet_file(tmp_path / "evil.pth", build(architecture()), extra=Evil(str(trap)))
    with pytest.raises(KAFError, match=r"evil\.pth is unsafe: it holds objects besides tensors.*mkdir.*could run code"):
        initialize_encoder(build(with_kaf(architecture())), path, 1)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap works"


def test_numpy_scalars_are_read_and_the_permission_ends_there(tmp_path: Path) -> None:
    path = nnunet_file(tmp_path / "nnunet.pth", build(architecture()))
    assert "nnUNetTrainer, Dataset004_X, P, 2d" in read_weights(path).kind
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    network = build(with_kaf(architecture()))
    with pytest.raises(KAFError, match=r"nowhere\.pth does not exist"):
        initialize_encoder(network, tmp_path / "nowhere.pth", 1)
    whole = nnunet_file(tmp_path / "whole.pth", build(architecture()))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(KAFError, match=r"cut\.pth \(3000 bytes\) cannot be read.*truncated"):
        initialize_encoder(network, cut, 1)
    cases: list[tuple[Any, str]] = [
        ([1, 2], "found a list, expected a checkpoint"),
        ({"state_dict": {}}, r"found no network_weights \(its entries: \['state_dict'\]\)"),
        ({"format": "nnunetv2_kaf.pretraining_run"}, "finish that run with --continue"),
        ({"network_weights": {"eva.blocks.0.weight": torch.zeros(1)}}, "holds no encoder of nnU-Net's UNets"),
        (
            {"network_weights": {"x": torch.zeros(1)}, "nnssl_adaptation_plan": {"key_to_stem": "s"}},
            "must name key_to_encoder",
        ),
        ({"network_weights": {}, "format": "nnunetv2_kaf.pretraining", "format_version": 99}, "format version 99"),
    ]
    for content, message in cases:
        torch.save(content, tmp_path / "foreign.pth")
        with pytest.raises(KAFError, match=message):
            initialize_encoder(network, tmp_path / "foreign.pth", 1)


def test_the_log_says_what_was_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = build(with_kaf(architecture(), channels=2), channels=2)
    with caplog.at_level("INFO", logger="pretraining"):
        report = initialize_encoder(network, nnunet_file(tmp_path / "one.pth", build(architecture())), 2)
    total = sum(report.tensors.values())
    assert f"--init: {total} tensors {{'encoder.stages': {total}}} taken from {tmp_path / 'one.pth'}" in caplog.text
    assert "adapted: {'1 input channel repeated for 2, divided by 2': 2}" in caplog.text
    assert "left at their initialisation: {'encoder.layers': " in caplog.text


def test_describe_reads_the_architecture_off_the_tensors() -> None:
    found = describe(build(architecture(3, "residual"), channels=2).state_dict())
    assert found == {
        "backbone": "residual",
        "stages": 4,
        "features": [4, 6, 6, 12],
        "kernel sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "convolutions": [2, 4, 2, 2],
        "input channels": 2,
    }
