"""One case through one model: image, prediction of every fold, disagreement, and the inside of one forward pass."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect.hooks import Inspection, Level, kaf_encoder, scales_mm
from nnunetv2_kaf.inspect.model import Fold, TrainedModel

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.int16]


@dataclass(frozen=True)
class CaseView:
    """Everything of a case that the report shows. Volumes are on the grid of the preprocessed image, (Z, Y, X).

    Attributes:
        name: Identifier.
        image: (C, Z, Y, X), normalised.
        spacing: Three voxel sizes in mm.
        prediction: Labels of the ensemble.
        reference: Labels, None without a label file.
        disagreement: Share of the folds that differ from the ensemble, None with one fold.
        box: The part of the volume that the inspected forward pass saw: three slices, one voxel thick in 2D.
        offset: Voxels of padding before the box, one per axis of the patch.
        flat: Whether the configuration is 2D.
        keypoints: (N, 3) voxels of the volume, strongest first; None for a network without keypoint layers.
        score: (N,) detection response in standard deviations.
        scales: (N,) mm, see `scales_mm`.
        index: (N,) position of each keypoint among the K of the forward pass.
        levels: `Level` by number, of a batch of one.
        original_prediction: Labels on the grid of the image file.
        original_reference: Labels on that grid, or None.
        original_spacing: Voxel sizes in mm on that grid.
    """

    name: str
    image: FloatArray
    spacing: tuple[float, ...]
    prediction: LabelArray
    reference: LabelArray | None
    disagreement: FloatArray | None
    box: tuple[slice, ...]
    offset: tuple[int, ...]
    flat: bool
    keypoints: FloatArray | None
    score: FloatArray
    scales: FloatArray
    index: npt.NDArray[np.intp]
    levels: Mapping[int, Level]
    original_prediction: LabelArray
    original_reference: LabelArray | None
    original_spacing: tuple[float, ...]


def view_case(
    model: TrainedModel,
    images: Sequence[str | Path],
    label: str | Path | None = None,
    device: str | torch.device = "cpu",
    mirror: bool = True,
) -> CaseView:
    """Preprocess and predict a case with nnU-Net's own code, and look inside a forward pass of the first fold.

    The forward pass is that on the patch around the middle of the foreground: of the reference if there is one, else of
    the prediction, else of the image.

    Args:
        model: A model folder, from `open_model`.
        images: One file per channel, in their order.
        label: Reference segmentation.
        device: Where to predict.
        mirror: Use nnU-Net's test-time mirroring, if the model was trained for it.

    Raises:
        KAFError: The files cannot be read as a case of this model, or it is the second stage of a cascade.
    """
    if model.is_cascade:
        raise KAFError(
            f"{model.folder} is the second stage of a cascade, whose input is the prediction of the first. Its images "
            "are not shown; look at the model of the first stage instead."
        )
    manager = model.manager()
    configuration = manager.get_configuration(model.configuration)
    data, reference, properties = preprocess_case(model, images, label)
    logits = _predict(model, torch.from_numpy(data), torch.device(device), mirror)
    mean = torch.stack(logits).mean(0)
    labels = manager.get_label_manager(dict(model.dataset_json))
    prediction = _labels(labels.convert_logits_to_segmentation(mean))
    disagreement = None
    if len(logits) > 1:
        single = np.stack([_labels(labels.convert_logits_to_segmentation(one)) for one in logits])
        disagreement = (single != prediction).mean(0).astype(np.float32)
    original = convert_predicted_logits_to_segmentation_with_correct_shape(
        mean, manager, configuration, labels, properties, num_threads_torch=torch.get_num_threads()
    )
    centre = _middle(prediction if reference is None or not (reference > 0).any() else reference)
    seen = _inspect(model, model.folds[0], data, centre, torch.device(device))
    first = Path(images[0]).name
    spacing = [properties["spacing"][axis] for axis in manager.transpose_forward]
    plan = list(configuration.spacing)
    return CaseView(
        name=first.removesuffix(f"_0000{model.dataset_json['file_ending']}"),
        image=data,
        spacing=tuple(float(s) for s in (plan if len(plan) == 3 else [spacing[0], *plan])),
        prediction=prediction,
        reference=reference,
        disagreement=disagreement,
        original_prediction=_labels(original),
        original_reference=None if label is None else _read_labels(manager, label),
        original_spacing=tuple(float(s) for s in properties["spacing"]),
        **seen,
    )


def preprocess_case(
    model: TrainedModel, images: Sequence[str | Path], label: str | Path | None
) -> tuple[FloatArray, LabelArray | None, dict[str, Any]]:
    """Preprocess a case as the model's training data were.

    Args:
        model: A model folder, from `open_model`.
        images: One file per channel, in their order.
        label: Reference segmentation.

    Returns:
        The image (C, Z, Y, X), the reference (Z, Y, X) on its grid or None, and what nnU-Net needs to go back.

    Raises:
        KAFError: The files cannot be read as a case of this model.
    """
    manager = model.manager()
    configuration = manager.get_configuration(model.configuration)
    channels = len(model.dataset_json.get("channel_names") or model.dataset_json.get("modality") or {})
    if len(images) != channels:
        raise KAFError(
            f"{Path(images[0]).name if images else 'a case'}: found {len(images)} image file(s), expected {channels}, "
            f"one for every channel of {model.folder / 'dataset.json'}: CASE_0000, CASE_0001, ..."
        )
    for file in [*images, *([label] if label is not None else [])]:
        if not Path(file).is_file():
            raise KAFError(f"{file} does not exist. Correct the path, or leave the case out.")
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        data, labels, properties = preprocessor.run_case(
            [str(f) for f in images], None if label is None else str(label), manager, configuration,
            dict(model.dataset_json),
        )  # fmt: skip
    except Exception as error:  # readers raise what they like
        raise KAFError(
            f"{images[0]} cannot be preprocessed as a case of {model.folder.name} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[-1] if str(error).strip() else 'no details'}). Expected images (and a "
            "label file of the same shape) as nnUNetv2_predict reads them."
        ) from error
    reference = None if label is None else _labels(np.maximum(np.asarray(labels)[0], 0))
    return np.ascontiguousarray(data, dtype=np.float32), reference, dict(properties)


def _predict(model: TrainedModel, data: Tensor, device: torch.device, mirror: bool) -> list[Tensor]:
    """Logits (H, Z, Y, X) of every fold, by nnU-Net's sliding window."""
    manager = model.manager()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces what does not matter here
        predictor = nnUNetPredictor(
            use_mirroring=mirror, perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False
        )
        out = []
        for fold in model.folds:
            predictor.manual_initialization(
                model.build(fold), manager, manager.get_configuration(model.configuration), None,
                dict(model.dataset_json), model.trainer, model.mirror_axes,
            )  # fmt: skip
            with torch.no_grad():
                out.append(predictor.predict_sliding_window_return_logits(data).float().cpu())
    return out


def _inspect(
    model: TrainedModel, fold: Fold, data: FloatArray, centre: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """Fields of `CaseView` that come from one forward pass on the patch around a voxel."""
    size = [int(n) for n in model.manager().get_configuration(model.configuration).patch_size]
    flat = len(size) == 2
    box = patch_around(centre, data.shape[1:], [1, *size] if flat else size)
    missing = [n - (b.stop - b.start) for n, b in zip([1, *size] if flat else size, box, strict=True)]
    before = [n // 2 for n in missing]
    fields: dict[str, Any] = {"box": box, "offset": tuple(before[1:] if flat else before), "flat": flat}
    empty = np.zeros(0, dtype=np.float32)
    if not model.is_kaf:
        nothing: dict[str, Any] = {
            "keypoints": None,
            "score": empty,
            "scales": empty,
            "index": np.zeros(0, np.intp),
            "levels": {},
        }
        return {**fields, **nothing}
    padding = [(0, 0), *((b, m - b) for b, m in zip(before, missing, strict=True))]
    patch = torch.from_numpy(np.pad(data[(slice(None), *box)], padding))[None].to(device)
    patch = patch[:, :, 0] if flat else patch
    network = model.build(fold).to(device)
    with torch.no_grad(), Inspection(network) as seen:
        network(patch)
    valid = seen.keypoints.valid[0].cpu()
    _, score = kaf_encoder(network).detector.detect(patch)
    scales = scales_mm(kaf_encoder(network), patch, seen.keypoints)[0].cpu()
    points = seen.keypoints.coords[0].cpu()[valid].numpy() - np.asarray(fields["offset"])
    start = np.asarray([b.start for b in box], dtype=np.float32)
    points = np.insert(points, 0, 0, axis=1) if flat else points
    return {
        **fields,
        "keypoints": (points + start).astype(np.float32),
        "score": score[0].cpu()[valid].numpy(),
        "scales": scales[valid].numpy(),
        "index": valid.nonzero().flatten().numpy(),
        "levels": seen.levels,
    }


def patch_around(centre: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Slices of a patch of `size` (smaller where the image is) around `centre`, inside `shape`."""
    starts = [max(0, min(c - n // 2, full - n)) for c, full, n in zip(centre, shape, size, strict=True)]
    return tuple(slice(start, min(start + n, full)) for start, n, full in zip(starts, size, shape, strict=True))


def _middle(labels: LabelArray) -> list[int]:
    """The slice with most foreground and its middle there; the middle of the image without foreground."""
    foreground = labels > 0
    if not foreground.any():
        return [n // 2 for n in labels.shape]
    row = int(foreground.sum((1, 2)).argmax())
    return [row, *(int(v) for v in np.median(np.argwhere(foreground[row]), axis=0))]


def _labels(array: Any) -> LabelArray:
    out: LabelArray = np.asarray(array).astype(np.int16)
    return out


def _read_labels(manager: Any, file: str | Path) -> LabelArray:
    labels, _ = manager.image_reader_writer_class().read_seg(str(file))
    return _labels(np.asarray(labels)[0])
