from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import pytest

from nnunetv2_kaf.errors import KAFError
from pretraining.config import COMPONENTS, PretrainConfig, flag


def test_round_trip_through_json() -> None:
    config = PretrainConfig(epochs=3, batch_size=5, radius_mm=2.5, optimizer="sgd")
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_is_named() -> None:
    with pytest.raises(KAFError, match="epoch_count"):
        PretrainConfig.from_dict({"epoch_count": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 0),
        ("learning_rate", float("nan")),
        ("temperature", 0.0),
        ("optimizer", "adagrad"),
        ("elastic", 0.5),
        ("seed", None),
        ("contrast", 1.0),
        ("positives", "moco"),
        ("patient_pattern", "(unclosed"),
        ("patient_pattern", "nogroup"),
        ("patient_pattern", 3),
        ("across", 1.5),
        ("accumulate", 0),
    ],
)
def test_bad_values_name_the_flag(name: str, value: object) -> None:
    with pytest.raises(KAFError, match=flag(name)):
        PretrainConfig(**{name: value})  # type: ignore[arg-type]


def test_inconsistent_options() -> None:
    with pytest.raises(KAFError, match="scale-min"):
        PretrainConfig(scale_min=1.2, scale_max=1.1)
    with pytest.raises(KAFError, match="nothing to learn"):
        PretrainConfig(weight_bottleneck=0.0, weight_keypoints=0.0, weight_local=0.0, weight_transport=0.0)
    with pytest.raises(KAFError, match="--network plain has no keypoint layers, but --weight-keypoints"):
        PretrainConfig(network="plain")


def test_presets() -> None:
    assert PretrainConfig.from_preset("kaf", {}) == PretrainConfig()
    assert list(PretrainConfig().components) == list(COMPONENTS)
    for preset in ("simclr", "gcl", "pcl"):
        config = PretrainConfig.from_preset(preset, {"network": "plain"})
        assert config.components == {"bottleneck": 1.0}
        assert config.positives == preset
    assert PretrainConfig.from_preset("simclr", {"positives": "pcl"}).positives == "pcl"
    with pytest.raises(KAFError, match="--preset is 'moco'; expected one of kaf, paper, simclr"):
        PretrainConfig.from_preset("moco", {})


def test_the_paper_preset_is_the_recipe_as_published() -> None:
    """NeurIPS 2023: total (1, 1, 0.01) of PCL on bottleneck and keypoints and of the transport loss."""
    paper = PretrainConfig.from_preset("paper", {})
    assert paper.components == {"bottleneck": 1.0, "keypoints": 1.0, "transport": 0.01}
    assert (paper.optimizer, paper.learning_rate, paper.momentum, paper.weight_decay) == ("sgd", 0.002, 0.9, 1e-5)
    assert (paper.batch_size, paper.epochs, paper.sinkhorn_iterations, paper.temperature) == (32, 51, 100, 0.1)
    assert (paper.positives, paper.position_axes, paper.pooling_grid, paper.position_threshold) == (
        "pcl",
        "first",
        1,
        0.1,
    )
    assert (paper.mirror, paper.spatial, paper.scale_min, paper.scale_max) == (0.5, 0.67, 0.7, 1.3)
    assert (paper.ambiguous, PretrainConfig().ambiguous) == ("unmatched", "ignored")
    assert (paper.transport_matched, paper.transport_unmatched, paper.across) == (0.45, 1.0, 0.0)


def test_differences_ignore_what_does_not_change_the_result() -> None:
    assert PretrainConfig().differences(PretrainConfig(save_every=7, save_minutes=1)) == []
    assert PretrainConfig().differences(PretrainConfig(seed=7)) == ["seed: 0 != 7"]


def test_frozen_and_every_field_explained() -> None:
    with pytest.raises(FrozenInstanceError):
        PretrainConfig().epochs = 3  # type: ignore[misc]
    assert all(len(item.metadata["help"]) > 5 for item in fields(PretrainConfig))
