"""The phantoms: reproducible, complete, stored with their spacing, and not solved by a threshold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import phantoms
import pytest
import SimpleITK as sitk  # noqa: N813
from phantoms import IGNORE, LV, MYO, RV, PhantomConfig, make_phantom
from scipy import ndimage

SMALL = PhantomConfig(training=2, test=1, shape=(12, 40, 40))


def _phantom(config: PhantomConfig = SMALL, seed: int = 0) -> phantoms.Phantom:
    return make_phantom(config, np.random.default_rng(seed))


def test_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        phantoms.write_dataset(tmp_path / name, SMALL)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.nii.gz"))
    assert len(files) == 6
    for file in files:
        first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / file))) for name in ("a", "b"))
        np.testing.assert_array_equal(first, second)


def test_seeds_and_cases_differ(tmp_path: Path) -> None:
    assert not np.array_equal(_phantom(seed=0).labels, _phantom(seed=1).labels)
    first = phantoms.write_dataset(tmp_path, SMALL)
    assert len(set(first)) == 3
    images = [sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted((tmp_path / "imagesTr").iterdir())]
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("seed", range(8))
def test_every_structure_is_present_and_related_as_in_a_heart(seed: int) -> None:
    labels = _phantom(PhantomConfig(), seed).labels
    voxels = {label: int((labels == label).sum()) for label in (RV, MYO, LV)}
    assert min(voxels.values()) > 300, voxels
    # The cavity is enclosed by muscle in its slice, but where the tilted valve plane cuts the last one.
    shell = ndimage.binary_dilation(labels == LV, np.ones((1, 3, 3))) & (labels != LV)
    assert (labels[shell] == MYO).mean() > 0.9


def _best_dice(image: np.ndarray, mask: np.ndarray) -> float:
    """Return the best Dice that any intensity window reaches, over a grid of 40 quantiles."""
    edges = np.quantile(image, np.linspace(0, 1, 40))
    inside, total = (np.histogram(values, edges)[0].cumsum() for values in (image[mask], image))
    best = 0.0
    for low in range(len(inside)):
        hits = inside[low:] - (inside[low - 1] if low else 0)
        size = total[low:] - (total[low - 1] if low else 0)
        best = max(best, float((2 * hits / (size + mask.sum())).max()))
    return best


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_no_intensity_window_solves_it(smoothing: float) -> None:
    """Chosen per case and per structure with the reference at hand, a window stays under a Dice of 0.6."""
    config = PhantomConfig(channels=2)
    for seed in range(4):
        phantom = _phantom(config, seed)
        for image in phantom.images:
            seen = ndimage.gaussian_filter(image, smoothing)
            masks = [phantom.labels == label for label in (RV, MYO, LV)]
            scores = [_best_dice(seen, mask) for mask in [*masks, phantom.labels > 0]]
            assert max(scores) < 0.6, (seed, scores)


def test_spacing_and_geometry_are_stored(tmp_path: Path) -> None:
    phantoms.write_dataset(tmp_path, replace(SMALL, spacing=(4.0, 1.25, 1.5)))
    for path in tmp_path.rglob("*.nii.gz"):
        image = sitk.ReadImage(str(path))
        assert image.GetSpacing() == pytest.approx((1.5, 1.25, 4.0))
        assert image.GetSize() == (40, 40, 12)


def test_two_channels_show_one_anatomy_in_two_contrasts() -> None:
    phantom = _phantom(replace(SMALL, channels=2, shape=(16, 56, 56)))
    blood = np.isin(phantom.labels, (RV, LV))
    muscle = phantom.labels == MYO
    bright, dark = phantom.images
    assert np.median(bright[blood]) > np.median(bright[muscle])
    assert np.median(dark[blood]) < np.median(dark[muscle])


def test_label_styles(tmp_path: Path) -> None:
    ignore = _phantom(replace(SMALL, style="ignore")).labels
    plain = _phantom(SMALL).labels
    assert (ignore == IGNORE).any()
    np.testing.assert_array_equal(ignore[ignore != IGNORE], plain[ignore != IGNORE])
    assert phantoms.dataset_json(replace(SMALL, style="ignore"))["labels"]["ignore"] == IGNORE
    regions = phantoms.dataset_json(replace(SMALL, style="regions"))
    assert len(regions["regions_class_order"]) == len(regions["labels"]) - 1
    phantoms.write_dataset(tmp_path, replace(SMALL, style="ignore"))
    test_labels = sitk.GetArrayFromImage(sitk.ReadImage(str(next((tmp_path / "labelsTs").iterdir()))))
    assert not (test_labels == IGNORE).any()


def test_single_slice_is_possible() -> None:
    assert _phantom(replace(SMALL, shape=(1, 40, 48))).images.shape == (1, 1, 40, 48)


@pytest.mark.parametrize("change", [{"channels": 3}, {"training": 0}, {"shape": (0, 4, 4)}])
def test_impossible_requests_are_rejected(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset900_KAFPhantom"
    assert phantoms.main([str(folder), "--training", "1", "--test", "0", "--shape", "8", "32", "32"]) == 0
    content = json.loads((folder / "dataset.json").read_text())
    assert content["numTraining"] == 1
    assert [path.name for path in (folder / "imagesTr").iterdir()] == ["phantom_000_0000.nii.gz"]
