"""The study's own raw dataset: test patients apart, images smaller if asked for; the source is only read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813  (the name everyone knows it by)

from nnunetv2_kaf.errors import KAFError

from .layout import Layout
from .splits import Split


def describe(source: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a raw dataset.

    Args:
        source: Folder with dataset.json, imagesTr and labelsTr.

    Returns:
        Its dataset.json and the identifiers of its labelled cases.

    Raises:
        KAFError: It is not there, has no cases or an ignore label.
    """
    file = source / "dataset.json"
    if not file.is_file():
        raise KAFError(f"{file} does not exist. --data must name the folder that holds the raw datasets.")
    description: dict[str, Any] = json.loads(file.read_text())
    if "ignore" in description["labels"]:
        raise KAFError(f"{file}: found an ignore label, for which distances are not defined. Use another dataset.")
    ending = description["file_ending"]
    cases = sorted(p.name.removesuffix(ending) for p in (source / "labelsTr").glob(f"*{ending}"))
    if not cases:
        raise KAFError(f"{source / 'labelsTr'} holds no *{ending} file, expected the labels of the cases.")
    return description, cases


def write(layout: Layout, source: Path, split: Split) -> None:
    """Write training and validation patients to imagesTr, test patients to imagesTs; dataset.json comes last."""
    description, _ = describe(source)
    finished = layout.raw / "dataset.json"
    if finished.is_file():
        return
    ending, channels = description["file_ending"], len(description["channel_names"])
    test = set(split.cases_of(split.test))
    for case in split.cases_of(split.cases):
        part = "Ts" if case in test else "Tr"
        images = [f"{case}_{channel:04d}{ending}" for channel in range(channels)]
        _case(
            [source / "imagesTr" / image for image in images],
            source / "labelsTr" / f"{case}{ending}",
            layout.raw / f"images{part}",
            layout.raw / f"labels{part}",
            layout.task.downsample,
        )
    training = len(split.cases_of(split.cases)) - len(test)
    plain = {key: value for key, value in description.items() if key != "dataset"}
    finished.write_text(json.dumps({**plain, "numTraining": training}, indent=2) + "\n")


def _case(images: Sequence[Path], label: Path, image_folder: Path, label_folder: Path, factor: int) -> None:
    """Link a case, or write it with fewer voxels in the plane."""
    for folder in (image_folder, label_folder):
        folder.mkdir(parents=True, exist_ok=True)
    if factor == 1:
        for file, folder in [*((image, image_folder) for image in images), (label, label_folder)]:
            target = folder / file.name
            target.unlink(missing_ok=True)
            target.symlink_to(file.resolve())
        return
    smaller = [downsample(sitk.ReadImage(str(image)), factor) for image in images]
    for image, file in zip(smaller, images, strict=True):
        sitk.WriteImage(image, str(image_folder / file.name), True)
    labels = downsample_labels(sitk.ReadImage(str(label)), smaller[0])
    sitk.WriteImage(labels, str(label_folder / label.name), True)


def downsample(image: sitk.Image, factor: int) -> sitk.Image:
    """Average blocks of factor x factor voxels of a slice; the spacing grows accordingly."""
    return sitk.BinShrink(sitk.Cast(image, sitk.sitkFloat32), [factor, factor, 1])


def downsample_labels(labels: sitk.Image, grid: sitk.Image) -> sitk.Image:
    """Labels on the grid of the smaller image: the label with the largest Gaussian-weighted share of a voxel."""
    return sitk.Resample(labels, grid, sitk.Transform(), sitk.sitkLabelGaussian, 0, labels.GetPixelID())
