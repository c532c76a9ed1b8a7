import json

import pytest

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError


@pytest.mark.parametrize(
    "config", [KAFConfig(), KAFConfig.paper(), KAFConfig(levels=(0, 2), detection_channels=(0, 1))]
)
def test_json_round_trip(config: KAFConfig) -> None:
    assert KAFConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_preset_has_the_papers_widths_and_depths() -> None:
    paper = KAFConfig.paper()
    assert (paper.token_dim, paper.num_blocks, paper.num_heads, paper.mlp_ratio) == (256, 9, 4, 2.0)
    assert (paper.position_hidden, paper.fusion, paper.diffusion_channels) == ((32, 64, 128, 256), "concat", 64)
    assert KAFConfig.paper(num_blocks=12).num_blocks == 12
    assert KAFConfig.paper_code() == KAFConfig.paper(num_blocks=18)


def test_plans_name_their_levels_without_full_resolution_and_the_bottleneck() -> None:
    found = {stages: KAFConfig().planned((64, 64), stages).levels for stages in (1, 2, 3, 6)}
    assert found == {1: None, 2: (0,), 3: (1,), 6: (1, 2, 3, 4)}
    assert KAFConfig(levels=(0,)).planned((64, 64), 6).levels == (0,), "levels that are given are kept"
    assert KAFConfig().planned((64, 64), 4, finest_level=0).levels == (0, 1, 2)
    assert KAFConfig().planned((64, 64), 4).num_keypoints == 32


def test_unknown_key_is_named_with_the_known_ones() -> None:
    with pytest.raises(KAFError, match=r"num_keypoint'.*known keys.*num_keypoints"):
        KAFConfig.from_dict({"num_keypoint": 3})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_keypoints", 0),
        ("num_keypoints", 2.5),
        ("num_keypoints", True),
        ("token_dim", 30),
        ("fusion", "sum"),
        ("levels", [0, 0]),
        ("levels", [-1]),
        ("levels", []),
        ("diffusion_channels", 0),
        ("detection_channels", []),
        ("detection_scales", [1.0, 2.0]),
        ("detection_scales", [2.0, 1.0, 3.0]),
        ("detection_threshold", -1),
        ("mlp_ratio", 0),
        ("mlp_ratio", "wide"),
        ("activation_checkpointing", 1),
        ("position_hidden", [0]),
    ],
)
def test_bad_value_is_an_error_that_shows_it(option: str, value: object) -> None:
    with pytest.raises(KAFError) as caught:
        KAFConfig.from_dict({option: value})
    assert str(value if not isinstance(value, list) else value[0] if value else "") in str(caught.value)
