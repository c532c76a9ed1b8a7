from dataclasses import replace
from pathlib import Path

import figure
import numpy as np
import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect import CaseView, Level

SHAPE = (6, 16, 20)


def view(flat: bool = False) -> CaseView:
    """A case with five keypoints, of which the second attends to the fourth only."""
    generator = np.random.default_rng(0)
    labels = np.zeros(SHAPE, np.int16)
    labels[3, 4:9, 5:12] = 1
    box = (slice(3, 4) if flat else slice(0, 6), slice(0, 16), slice(0, 20))
    points = np.array([[3, 2, 2], [3, 7, 9], [0, 12, 3], [3, 13, 17], [2, 1, 15]], np.float32)
    attention = torch.zeros(1, 2, 2, 8, 8)
    attention[..., 1, 3] = 1.0
    stride = (2, 2) if flat else (1, 2, 2)
    shape = (8, 10) if flat else (6, 8, 10)
    level = Level(1, stride, attention, torch.zeros(1, 8, 4), torch.ones(1, *shape), torch.rand(1, *shape))
    return CaseView(
        name="case",
        image=generator.normal(size=(1, *SHAPE)).astype(np.float32),
        spacing=(4.0, 1.5, 1.0),
        prediction=labels,
        reference=labels,
        disagreement=None,
        box=box,
        offset=(0, 0) if flat else (0, 0, 0),
        flat=flat,
        keypoints=points,
        score=np.ones(5, np.float32),
        scales=np.ones(5, np.float32),
        index=np.arange(5),
        levels={1: level},
        original_prediction=labels,
        original_reference=labels,
        original_spacing=(4.0, 1.5, 1.0),
    )


@pytest.mark.parametrize("flat", [False, True])
def test_five_panels_show_what_the_network_did(flat: bool) -> None:
    drawn = figure.draw(view(flat))
    image, keypoints, attention, fused, result = drawn.axes
    assert [axes.get_title().split(",")[0] for axes in drawn.axes] == [
        "image", "keypoints", "attention of one keypoint", "fused map", "result (white: reference)",
    ]  # fmt: skip
    assert np.array_equal(image.images[0].get_array(), view().image[0, 3])  # the slice with the foreground
    shown = keypoints.collections[0].get_offsets()
    assert {(float(x), float(y)) for x, y in shown} == {(2, 2), (9, 7), (17, 13), (15, 1)}  # (x, y) within a slice
    widest = max(attention.lines, key=lambda line: line.get_linewidth())
    assert widest.get_xydata().tolist() == [[9, 7], [17, 13]]
    assert fused.images[1].get_extent() == [-0.5, 19.5, 15.5, -0.5]
    assert result.images[1].get_array().count() == 5 * 7


def test_a_model_without_keypoint_layers_is_refused() -> None:
    with pytest.raises(KAFError, match="found no keypoints"):
        figure.draw(replace(view(), keypoints=None))


def test_a_missing_model_is_an_error_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure.main(["--model", str(tmp_path / "missing"), "--output", str(tmp_path / "figure.png")]) == 1
    assert capsys.readouterr().err.startswith("figure: ")
    assert not (tmp_path / "figure.png").exists()
