import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_kaf import weights
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_plans, resolve_configuration

Plans = dict[str, Any]


def build(plans: Plans, configuration: str = "2d", channels: int = 1, classes: int = 3) -> nn.Module:
    architecture = resolve_configuration(plans, configuration)["architecture"]
    network: nn.Module = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        deep_supervision=True,
    )
    return network


@pytest.fixture
def plans(plain_plans: Plans) -> Plans:
    return kaf_plans(plain_plans, KAFConfig(num_keypoints=12, token_dim=16, num_blocks=1, position_hidden=(8,)))


@pytest.fixture
def checkpoint(plans: Plans, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_final.pth"
    torch.manual_seed(1)
    save(path, plans)
    return path


def save(path: Path, plans: Plans, configuration: str = "2d", channels: int = 1) -> None:
    weights.save_pretraining_checkpoint(
        path,
        build(plans, configuration, channels),  # type: ignore[arg-type]
        plans=plans,
        configuration=configuration,
        num_input_channels=channels,
        dataset_name=plans["dataset_name"],
        fold=0,
        pretraining={"epochs": 3},
    )


def test_the_whole_encoder_is_loaded_and_nothing_else(plans: Plans, checkpoint: Path) -> None:
    torch.manual_seed(2)
    network = build(plans, classes=5)
    decoder = {
        k: v.clone() for k, v in network.state_dict().items() if not k.startswith(("encoder", "decoder.encoder"))
    }
    report = weights.load_encoder(network, checkpoint, plans, "2d")
    stored = torch.load(checkpoint, weights_only=True)["network_weights"]
    for name, tensor in network.state_dict().items():
        expected = decoder[name] if name in decoder else stored[name]
        assert torch.equal(tensor, expected), name
    encoder = [k for k in stored if k.startswith("encoder.")]
    assert sum(report.tensors.values()) == len(encoder)
    assert set(report.tensors) == {"encoder.stages", "encoder.layers"}
    assert report.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert report.to_dict()["tensors_loaded"] == len(encoder)


def test_checkpoint_is_self_describing_and_safe_to_load(plans: Plans, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    assert content["plans"] == plans
    assert set(content["network_weights"]) == set(build(plans).state_dict())
    assert {"torch", "nnunetv2", "nnunetv2-kaf", "python"} <= set(content["versions"])
    assert (content["configuration"], content["fold"], content["dataset_name"]) == ("2d", 0, "Dataset990_Tiny")


def test_nnunets_own_pretrained_weights_option_accepts_it(plans: Plans, checkpoint: Path) -> None:
    network = build(plans, classes=5)
    load_pretrained_weights(network, str(checkpoint))
    stored = weights.read_checkpoint(checkpoint)["network_weights"]
    assert torch.equal(
        network.state_dict()["encoder.stages.0.0.convs.0.conv.weight"], stored["encoder.stages.0.0.convs.0.conv.weight"]
    )


def test_another_number_of_blocks_names_both_configurations_and_loads_nothing(plans: Plans, checkpoint: Path) -> None:
    changed = kaf_plans(plans)
    changed["plans_name"] = "otherPlans"
    changed["configurations"]["2d"]["architecture"]["arch_kwargs"]["kaf"]["num_blocks"] = 2
    network = build(changed)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(
        KAFError, match=r"Dataset990_Tiny, nnUNetPlans, 2d.*otherPlans, 2d.*num_blocks: checkpoint 1, training 2"
    ):
        weights.load_encoder(network, checkpoint, changed, "2d")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_another_configuration_or_channel_count_is_an_error(plans: Plans, checkpoint: Path) -> None:
    with pytest.raises(KAFError, match=r"nnUNetPlans, 2d\).*nnUNetPlans, 3d_fullres\).*conv_op"):
        weights.load_encoder(build(plans, "3d_fullres"), checkpoint, plans, "3d_fullres")
    with pytest.raises(KAFError, match="input channels: checkpoint 1, training 2"):
        weights.load_encoder(build(plans, channels=2), checkpoint, plans, "2d")  # one image channel, one one-hot


def several_channels(plans: Plans, count: int) -> Plans:
    """The plans of a dataset with that many image channels."""
    out = kaf_plans(plans)
    out["configurations"]["2d"]["normalization_schemes"] = ["ZScoreNormalization"] * count
    block = out["configurations"]["2d"]["architecture"]["arch_kwargs"]["kaf"]
    block["detection_channels"] = list(range(count))
    return out


def test_one_channel_serves_several_image_channels(plans: Plans, checkpoint: Path, tmp_path: Path) -> None:
    multi = several_channels(plans, 3)
    network = build(multi, channels=3)
    report = weights.load_encoder(network, checkpoint, multi, "2d")
    stored = torch.load(checkpoint, weights_only=True)["network_weights"]
    for name, tensor in network.state_dict().items():
        if name in report.adapted:
            assert torch.equal(tensor, torch.cat([stored[name]] * 3, dim=1) / 3)
        elif name.startswith("encoder."):
            assert torch.equal(tensor, stored[name])
    assert set(report.adapted) == set(weights.first_convolution(network))
    assert "repeated for 3" in str(report.to_dict()["adapted"])
    two = tmp_path / "two.pth"
    save(two, several_channels(plans, 2), channels=2)
    with pytest.raises(KAFError, match="input channels: checkpoint 2, training 3"):
        weights.load_encoder(network, two, multi, "2d")
    single = build(plans)
    with pytest.raises(KAFError, match="input channels: checkpoint 2, training 1"):
        weights.load_encoder(single, two, plans, "2d")


def plain_checkpoint(path: Path, plans: Plans) -> nn.Module:
    network = build(plans)
    weights.save_pretraining_checkpoint(
        path, network, plans=plans, configuration="2d", num_input_channels=1, dataset_name="Dataset990_Tiny",
        fold=0, pretraining={},
    )  # fmt: skip
    return network


@pytest.mark.parametrize("residual", [False, True])
def test_a_plain_network_is_saved_for_nnunets_own_trainer(plain_plans: Plans, tmp_path: Path, residual: bool) -> None:
    if residual:
        entry = plain_plans["configurations"]["2d"]["architecture"]
        entry["network_class_name"] = entry["network_class_name"].replace("PlainConvUNet", "ResidualEncoderUNet")
        entry["arch_kwargs"]["n_blocks_per_stage"] = entry["arch_kwargs"].pop("n_conv_per_stage")
    path = tmp_path / "plain.pth"
    source = plain_checkpoint(path, plain_plans)
    network = build(plain_plans, classes=5)
    load_pretrained_weights(network, str(path))
    expected = source.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in network.state_dict().items() if ".seg_layers." not in k)
    assert torch.load(path, weights_only=True)["num_input_channels"] == 1


def test_a_plain_checkpoint_is_explained(plans: Plans, plain_plans: Plans, tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    plain_checkpoint(path, plain_plans)
    with pytest.raises(KAFError, match=r"plain encoder.*-tr nnUNetTrainer -pretrained_weights .*plain\.pth"):
        weights.load_encoder(build(plans), path, plans, "2d")


def test_plans_must_describe_the_network(plans: Plans, plain_plans: Plans, tmp_path: Path) -> None:
    for network, wrong in ((build(plans), plain_plans), (build(plain_plans), plans)):
        with pytest.raises(ValueError, match="does not describe a"):
            weights.save_pretraining_checkpoint(
                tmp_path / "x.pth", network, plans=wrong, configuration="2d", num_input_channels=1,
                dataset_name="Dataset990_Tiny", fold=0, pretraining={},
            )  # fmt: skip


def test_a_parameter_with_several_names_is_stored_once(plans: Plans, checkpoint: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)["network_weights"]
    size = sum(p.numel() * p.element_size() for p in build(plans).parameters())
    assert (
        sum(s.nbytes() for s in {v.untyped_storage().data_ptr(): v.untyped_storage() for v in stored.values()}.values())
        == size
    )


def test_another_voxel_size_fits(plans: Plans, checkpoint: Path) -> None:
    coarse = kaf_plans(plans)
    coarse["configurations"]["2d"]["spacing"] = [3.0, 3.0]
    coarse["configurations"]["2d"]["architecture"]["arch_kwargs"]["spacing"] = [3.0, 3.0]
    assert weights.load_encoder(build(coarse), checkpoint, coarse, "2d").source == str(checkpoint)


def test_missing_truncated_and_foreign_files(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KAFError, match=r"nowhere\.pth does not exist.*kaf-pretrain"):
        weights.read_checkpoint(tmp_path / "nowhere.pth")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(KAFError, match=r"truncated\.pth \(1000 bytes\).*truncated"):
        weights.read_checkpoint(truncated)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(KAFError, match="cannot be read as a pretraining checkpoint"):
        weights.read_checkpoint(text)
    foreign = tmp_path / "nnunet.pth"
    torch.save({"network_weights": {}, "trainer_name": "nnUNetTrainer"}, foreign)
    with pytest.raises(KAFError, match=r"not a pretraining checkpoint.*-pretrained_weights"):
        weights.read_checkpoint(foreign)
    future = tmp_path / "future.pth"
    torch.save({**weights.read_checkpoint(checkpoint), "format_version": 99}, future)
    with pytest.raises(KAFError, match="format version 99"):
        weights.read_checkpoint(future)


def test_report_is_frozen() -> None:
    report = weights.LoadReport(None, None, {}, "scratch")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.note = "changed"  # type: ignore[misc]
