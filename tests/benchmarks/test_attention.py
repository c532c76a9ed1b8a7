from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention
import attention_page
import attention_views
import numpy as np
import pytest
import torch

from nnunetv2_kaf.inspect import open_model
from nnunetv2_kaf.weights import save_pretraining_checkpoint

Write = Callable[..., Path]
CPU = torch.device("cpu")


def pretraining(model: Path, path: Path) -> Path:
    """A checkpoint of kaf-pretrain with the weights of a model."""
    found = open_model(model)
    save_pretraining_checkpoint(
        path, found.build(found.folds[0]), plans=found.plans, configuration=found.configuration, num_input_channels=1,
        dataset_name="Dataset900_Phantom", fold=0, pretraining={},
    )  # fmt: skip
    return path


@pytest.mark.parametrize("ndim", [2, 3])
def test_all_kinds_are_measured_and_the_page_follows(
    ndim: int, write_model: Write, phantom_data: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m", ndim, folds=("0", "1"))
    fold, other = model / "fold_0", model / "fold_1"
    checkpoint = pretraining(model, tmp_path / "checkpoint_final.pth")
    networks = {"random": fold, "scratch": other, "pretrained": checkpoint, "trained": model / "fold_[0]"}
    code = attention.main(
        ["--name", "phantoms", "--images", str(phantom_data / "imagesTs"), "--labels", str(phantom_data / "labelsTs")]
        + [word for kind, path in networks.items() for word in ("--network", f"{kind}={path}")]
        + ["--results", str(tmp_path), "--slices", "2"]
    )
    assert code == 0
    document = json.loads((tmp_path / "attention_phantoms.json").read_text())
    assert [n["kind"] for n in document["networks"]] == list(networks)
    assert document["networks"][0]["sha256"] is None
    of = {n["kind"]: n["cases"] for n in document["networks"]}
    assert set(of["trained"]) == {"phantom_t000", "phantom_t001"}
    # the same weights in two files, the same views: the same numbers
    assert of["pretrained"] == of["trained"]
    assert of["scratch"] != of["trained"]
    for values in of["trained"].values():
        assert {"near", "effective", "own", "own_uniform", "noise/js", "rotation/stays_other"} <= set(values)
        assert all(0 <= value <= 1 for value in values.values())
    page = attention_page.write_page(tmp_path, tmp_path / "page.md").read_text()
    assert "| pretrained, then trained |" in page
    verdict = "pretrained, then trained against pretrained, consistency: no clear difference (+0.000"
    assert verdict in page
    summary = attention_page.summary(tmp_path)
    assert "| pretrained, then trained |" in summary
    assert verdict in summary
    assert attention_page.summary(tmp_path / "m") == ""


def seen(write_model: Write, data: Path, folder: Path, transform: str) -> tuple[Any, tuple[float, ...]]:
    """One view of one phantom through a network with random weights."""
    network, model = attention_views.open_network("trained", write_model(folder) / "fold_0", 0)
    assert model is not None
    case = next(attention_views.case_files(data / "imagesTs", data / "labelsTs", ".nii.gz", 1))
    (place,) = attention_views.patches(model, case[1], case[2], 1)
    spacing = (3.0, 1.5, 1.5)
    parameters = attention_views.draw(transform, place, (8, 24, 24), spacing, np.random.default_rng(1))
    return attention_views.look(network, place, parameters, (8, 24, 24), CPU), spacing


def test_the_same_view_is_perfectly_consistent(write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    view, spacing = seen(write_model, phantom_data, tmp_path / "m", "none")
    assert np.allclose(view.source, view.source.round(), atol=1e-6)  # an untransformed view interpolates nothing
    found = attention.compare(view, view, spacing)
    assert found["matched"] == 1
    assert found["js"] == pytest.approx(0, abs=1e-6)
    assert found["stays"] == pytest.approx(1, abs=1e-4)
    assert found["js_other"] > 0.01


def test_a_rotated_view_is_compared_in_the_frame_of_the_source(
    write_model: Write, phantom_data: Path, tmp_path: Path
) -> None:
    still, spacing = seen(write_model, phantom_data, tmp_path / "m", "none")
    turned, _ = seen(write_model, phantom_data, tmp_path / "n", "rotation")
    moved = np.abs(turned.source - turned.source.round()).max()
    assert moved > 0.1  # the points of the view lie on another raster
    found = attention.compare(still, turned, spacing)
    assert 0.2 < found["matched"] < 1
    assert found["js"] > 0


def test_too_few_matches_give_no_numbers(write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    view, spacing = seen(write_model, phantom_data, tmp_path / "m", "none")
    far = attention_views.Seen(view.source + 1000, view.control, view.shape, view.attention)
    assert attention.compare(view, far, spacing) == {"matched": 0.0}


def document(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    def cases(values: list[float]) -> dict[str, Any]:
        return {f"p{i}": {"noise/js": 1 - v, "noise/js_other": 1.0} for i, v in enumerate(values)}

    kinds = {"pretrained": ours, "random": theirs}
    return {
        "networks": [{"kind": kind, "cases": cases(values)} for kind, values in kinds.items()],
        "patient_of": {f"p{i}": f"p{i}" for i in range(len(ours))},
    }


@pytest.mark.parametrize(("shift", "words"), [(0.2, ": higher (+0.2"), (-0.2, "**lower** (-0.2"), (0.0, "no clear")])
def test_the_verdict_follows_the_interval(shift: float, words: str) -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(0.3, 0.6, 12)
    noise = generator.normal(0, 0.01, 12)
    found = attention_page.verdicts(document((base + shift + noise - noise.mean()).tolist(), base.tolist()))
    assert words in found[0]
    assert len([line for line in found if "not measured" in line]) == 2


def test_attention_that_is_equal_everywhere_has_no_consistency() -> None:
    read = attention_page._reader({"noise/js": 0.0, "noise/js_other": 0.0})
    assert read("noise/consistency") is None


def test_bad_input_is_named(
    write_model: Write, tmp_path: Path, phantom_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plain = write_model(tmp_path / "m"), write_model(tmp_path / "p", network="plain")
    where = ["--name", "x", "--images", str(phantom_data / "imagesTs"), "--results", str(tmp_path)]
    for arguments, message in (
        ([], "--name, --images, --network is missing"),
        ([*where, "--network", "better=x"], "expected KIND=PATH"),
        ([*where, "--network", f"trained={model}"], "expected the folder fold_N"),
        ([*where, "--network", f"pretrained={tmp_path / 'none'}"], "does not exist"),
        ([*where, "--network", f"trained={plain / 'fold_0'}"], "has no keypoint layers"),
        ([*where, "--network", f"trained={model / 'fold_0'}", "--cases", "nobody"], "found no *_0000.nii.gz"),
    ):
        assert attention.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_networks_that_detect_other_keypoints_are_not_compared(write_model: Write, tmp_path: Path) -> None:
    opened = [attention_views.open_network("trained", write_model(tmp_path / n) / "fold_0", 0)[0] for n in "ab"]
    attention_views.check_alike(opened)
    plans = json.loads((tmp_path / "b" / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["kaf"]["num_keypoints"] = 10
    (tmp_path / "b" / "plans.json").write_text(json.dumps(plans))
    opened[1] = attention_views.open_network("trained", tmp_path / "b" / "fold_0", 0)[0]
    with pytest.raises(attention.KAFError, match="Compare networks of the same plans"):
        attention_views.check_alike(opened)


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    attention_page.write_page(attention.RESULTS, tmp_path / "page.md")
    assert attention_page.PAGE.read_text() == (tmp_path / "page.md").read_text()


def test_two_patients_show_no_difference() -> None:
    found = attention_page.verdicts(document([0.9, 0.9], [0.1, 0.1]))
    assert "no clear difference (+0.8" in found[0]
