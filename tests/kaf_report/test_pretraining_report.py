from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from kaf_report import cli, pair_figures
from pretraining.cli import main as pretrain


@pytest.fixture
def run(tiny: Any, fast: list[str], tmp_path: Path) -> Path:
    """A finished pretraining of the tiny dataset."""
    tiny.add_cases(5)
    folder = tmp_path / "run"
    assert pretrain(["-d", "123", "-c", "2d", *fast, "--output", str(folder)]) == 0
    return folder


def page(folder: Path, out: Path, *options: str) -> str:
    assert cli.main([str(folder), "-o", str(out), *options]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


def test_curves_pairs_and_neighbours(run: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    text = page(run, tmp_path / "out", "--pairs", "3")
    assert torch.equal(torch.get_rng_state(), state)
    pictures = sorted(p.name for p in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["curves.png", "neighbours.png", "pair_000.png", "pair_001.png", "pair_002.png"]
    assert text.count('<img src="data:image/png') == 5
    for words in ("2 of 2, 2 steps each", "SHA-256", "bottleneck x 1", "without a partner", "Nearest neighbours"):
        assert words in text
    # the parent folder of one run is understood as well
    (run.parent / "all").mkdir()
    run.rename(run.parent / "all" / "fold_all")
    assert "Nearest neighbours" in page(run.parent / "all", tmp_path / "out", "--pairs", "1")


def test_the_pairs_are_of_the_patients_that_the_run_held_out(
    tiny: Any, fast: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.add_cases(5)
    tiny.preprocess_raw_images()
    (tmp_path / "more").mkdir()
    for i in range(6):
        volume = sitk.GetImageFromArray(np.random.default_rng(i).normal(size=(10, 28, 20)).astype(np.float32))
        volume.SetSpacing((1.0, 1.0, 4.0))
        sitk.WriteImage(volume, str(tmp_path / "more" / f"new_{i}_0000.nii.gz"))
    folder = tmp_path / "run"
    options = ["-d", "123", "-c", "2d", "--images", str(tmp_path / "more"), "--fold", "all", *fast]
    assert pretrain([*options, "--output", str(folder)]) == 0
    record = torch.load(folder / "checkpoint_final.pth", weights_only=True)["pretraining"]
    (held_out,) = record["held_out"]
    assert held_out not in record["cases"]
    assert held_out.rpartition("/")[2].startswith("new_"), "of the unlabelled ones"
    for entry in (tmp_path / "more").iterdir():
        entry.unlink()  # the preprocessed images are enough
    text = page(folder, tmp_path / "out", "--pairs", "3")
    assert text.count(f"{held_out}: ") == text.count(" right, ") > 0
    assert "held out" not in text
    # without such a record the page says what it shows
    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    del content["pretraining"]["held_out"]
    torch.save(content, folder / "checkpoint_final.pth")
    assert "No patient is recorded as held out" in page(folder, tmp_path / "out", "--pairs", "1")
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main([str(folder), "-o", str(tmp_path / "out"), "--pairs", "1"]) == 0
    trained = next(case for case in record["cases"] if "/" in case)
    next(tiny.folder.glob(f"*_kaf_images/{trained}-*.b2nd")).unlink()
    assert "1 preprocessed images of the pretraining are gone" in page(folder, tmp_path / "out")


def test_without_the_last_save_the_encoder_alone_is_compared(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint_latest.pth").unlink()
    text = page(run, tmp_path / "out", "--pairs", "1")
    assert "which holds the heads, is gone" in text
    assert 'class="frame"' in text
    (run / "checkpoint_latest.pth").write_bytes(b"damaged")
    text = page(run, tmp_path / "out", "--pairs", "1")
    assert "which holds the heads, cannot be used" in text
    assert 'class="frame"' in text


def test_an_unfinished_run_is_shown_as_far_as_it_came(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint_final.pth").unlink()
    text = page(run, tmp_path / "out", "--pairs", "1")
    assert "is not finished" in text
    assert 'class="frame"' in text


def test_without_the_data_the_rest_is_shown(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    text = page(run, tmp_path / "out")
    assert "Pairs and neighbours are not shown" in text
    assert "nnUNet_preprocessed is not set" in text
    assert 'class="frame"' not in text
    assert "data:image/png" in text


def test_options_of_models_and_damaged_files_are_errors(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(run), "-i", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "-i are for models" in capsys.readouterr().err
    content = torch.load(run / "checkpoint_final.pth", weights_only=True)
    for change in ({"history": ["a"]}, {"dataset": 7}, {"config": {"epochs": -1}}):
        changed = {**content, "pretraining": {**content["pretraining"], **change}}
        torch.save(changed, run / "checkpoint_final.pth")
        assert cli.main([str(run), "-o", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert next(iter(change)) in error or "--epochs" in error
        assert "Traceback" not in error
    (run / "checkpoint_final.pth").write_bytes(b"x")
    assert cli.main([str(run), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "checkpoint_final.pth" in error
    assert "Traceback" not in error


def test_matches_are_mutual_and_every_keypoint_has_one_kind() -> None:
    first = np.eye(5, 4)
    second = np.eye(4)[[1, 0, 2, 3]]
    valid_first, valid_second = np.array([True] * 4 + [False]), np.array([True, True, True, False])
    true = np.array([1, 2, -1, -1, -1])
    matching = pair_figures.match(first, second, valid_first, valid_second, true)
    assert matching.found[:3].tolist() == [1, 0, 2]
    kinds = {kind: np.flatnonzero(matching.of(kind)).tolist() for kind in pair_figures.COLORS}
    assert kinds["right"] == [0]
    assert kinds["wrong"][:2] == [1, 2]
    assert sorted(point for points in kinds.values() for point in points) == [0, 1, 2, 3]
    nothing = pair_figures.match(first, second, valid_first, np.zeros(4, dtype=bool), true)
    assert (nothing.found == -1).all()
    assert np.flatnonzero(nothing.of("missed")).tolist() == [0, 1]
