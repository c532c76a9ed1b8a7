"""What `attention` compares: encoders of four kinds, patches of cases, and their views under known transformations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.encoder import KAFEncoder
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256
from nnunetv2_kaf.inspect import Inspection, TrainedModel, kaf_encoder, layer_spacing, open_model, preprocess_case
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.config import PretrainConfig
from pretraining.pairs.render import make_recipe, render
from pretraining.pairs.splines import bounding_box, control_points, to_source, to_view
from pretraining.pairs.views import ViewParameters, draw_view

KINDS = ("random", "scratch", "pretrained", "trained")
_STILL: dict[str, Any] = {
    **{name: 0.0 for name in ("mirror", "spatial", "rotation", "elastic", "gamma", "contrast", "brightness", "noise")},
    **{"scale_min": 1.0, "scale_max": 1.0},
}
NOISE = 0.3
TRANSFORMS: dict[str, dict[str, float]] = {
    "noise": {},
    "intensity": {"gamma": 0.4, "contrast": 0.25, "brightness": 0.25},
    "rotation": {"spatial": 1.0, "rotation": 20.0},
    "elastic": {"spatial": 1.0, "elastic": 0.25},
}
"""Options of `PretrainConfig` that each transformation has; the noise has a standard deviation of 0.3 of the view's."""


@dataclass(frozen=True)
class Network:
    """One network to measure.

    Attributes:
        kind: One of `KINDS`.
        path: File or folder that it comes from.
        sha256: SHA-256 of the checkpoint, None for random weights.
        encoder: Encoder in evaluation mode.
    """

    kind: str
    path: str
    sha256: str | None
    encoder: KAFEncoder


@dataclass(frozen=True)
class Seen:
    """One view through one network.

    Attributes:
        source: (N, D) keypoints in voxels of the source image.
        control: The view's spline, from source to view.
        shape: Shape of the view.
        attention: Attention by level (blocks, heads, N, N).
    """

    source: npt.NDArray[np.float64]
    control: npt.NDArray[np.float64]
    shape: tuple[int, ...]
    attention: Mapping[int, npt.NDArray[np.float64]]

    def shows(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which source points (M, D) lie inside this view."""
        shown: npt.NDArray[np.bool_] = to_view(self.control, self.shape, points)[1]
        return shown


def open_network(kind: str, path: Path, seed: int) -> tuple[Network, TrainedModel | None]:
    """Read a network.

    Args:
        kind: "random": the network of a fold's plans with fresh weights; "scratch" and "trained": a fold of a model;
            "pretrained": checkpoint_final.pth of kaf-pretrain.
        path: fold_N folder of a model, or a file for "pretrained".
        seed: Seed of fresh weights.

    Returns:
        The network, and the model whose fold was named.

    Raises:
        KAFError: The path holds nothing of that kind, or a network without keypoint layers.
    """
    if kind == "pretrained":
        encoder = _pretrained(path)
        return Network(kind, str(path), file_sha256(path), encoder), None
    if not path.name.startswith("fold_"):
        raise KAFError(f"--network {kind}={path}: expected the folder fold_N of a model.")
    model = open_model(path.parent, [path.name.removeprefix("fold_")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.build(None if kind == "random" else model.folds[0])
    digest = None if kind == "random" else file_sha256(path / "checkpoint_final.pth")
    return Network(kind, str(path), digest, kaf_encoder(network).eval()), model


def _pretrained(path: Path) -> KAFEncoder:
    """The encoder of a pretraining checkpoint."""
    checkpoint = read_checkpoint(path)
    network = build_network(
        checkpoint["architecture"], checkpoint["num_input_channels"], 2, where=str(path), initialize=False
    )
    encoder = kaf_encoder(network)
    weights = {k.removeprefix("encoder."): v for k, v in checkpoint["network_weights"].items() if k[:8] == "encoder."}
    encoder.load_state_dict(weights)
    return encoder.eval()


def check_alike(networks: Sequence[Network]) -> None:
    """Raise a KAFError unless all networks see the same keypoints: attention is compared over the same ones."""

    def sight(network: Network) -> Any:
        config = network.encoder.config
        detection = {
            k: v for k, v in config.to_dict().items() if k.startswith(("detection", "num_keypoints", "levels"))
        }
        return detection, [round(s, 3) for s in layer_spacing(network.encoder)]

    first = networks[0]
    for other in networks[1:]:
        if sight(other) != sight(first):
            raise KAFError(
                f"{other.path} detects keypoints with {sight(other)}, {first.path} with {sight(first)}. Compare "
                "networks of the same plans."
            )


@dataclass(frozen=True)
class Patch:
    """A place in a case: a slice (2D) or a volume (3D), and where in it views are centred.

    Attributes:
        image: (C, *S).
        labels: (*S) or None.
        centre: D voxels.
    """

    image: Tensor
    labels: npt.NDArray[np.int16] | None
    centre: tuple[float, ...]


def patches(model: TrainedModel, images: Sequence[Path], label: Path | None, slices: int) -> list[Patch]:
    """Preprocess a case and choose where to look.

    Args:
        model: Model whose preprocessing is used.
        images: A file per channel.
        label: Reference, or None.
        slices: 2D: so many slices, spread over those with foreground (without labels over all).

    Returns:
        3D: one patch around the middle of the foreground, or of the image.
    """
    data, labels, _ = preprocess_case(model, images, label)
    flat = len(model.manager().get_configuration(model.configuration).patch_size) == 2
    foreground = np.argwhere(labels > 0) if labels is not None else np.zeros((0, 3))
    if not len(foreground):
        foreground = np.argwhere(np.ones(data.shape[1:], dtype=bool))
    image = torch.from_numpy(data)
    if not flat:
        return [Patch(image, labels, tuple(np.round(np.median(foreground, 0)).tolist()))]
    rows = np.unique(foreground[:, 0])
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, slices).round().astype(int))]
    return [
        Patch(
            image[:, row],
            None if labels is None else labels[row],
            tuple(np.round(np.median(foreground[foreground[:, 0] == row, 1:], 0)).tolist()),
        )
        for row in rows.tolist()
    ]


def draw(
    name: str, patch: Patch, shape: Sequence[int], spacing: Sequence[float], generator: np.random.Generator
) -> ViewParameters:
    """Draw the parameters of a view: one of `TRANSFORMS`, or "none"."""
    config = PretrainConfig(**{**_STILL, **TRANSFORMS.get(name, {})})
    channels = patch.image.shape[0]
    # The middle of an even patch lies between two voxels: an untransformed view must not interpolate.
    centre = [c + ((n - 1) / 2) % 1 for c, n in zip(patch.centre, shape, strict=True)]
    parameters = draw_view(centre, shape, spacing, channels, config, generator)
    return replace(parameters, noise=(NOISE,) * channels) if name == "noise" else parameters


def look(
    network: Network, patch: Patch, parameters: ViewParameters, shape: Sequence[int], device: torch.device
) -> Seen:
    """Render a view and pass it through a network; keypoints are detected in the view, as in nnU-Net's prediction."""
    spacing = layer_spacing(network.encoder)
    control = control_points(parameters, shape, spacing)
    box = bounding_box(control, patch.image.shape[1:])
    recipe = make_recipe([patch.image[(slice(None), *box)]], [[b.start for b in box]], [control], [parameters])
    view = render(recipe, shape).to(device)
    with torch.no_grad(), Inspection(network.encoder) as seen:
        network.encoder(view)
    valid = seen.keypoints.valid[0]
    coords = seen.keypoints.coords[0][valid].double().cpu().numpy()
    attention = {
        level: found.attention[0][..., valid, :][..., valid].double().cpu().numpy()
        for level, found in seen.levels.items()
    }
    return Seen(to_source(control, shape, coords), control, tuple(shape), attention)


def case_files(
    images: Path, labels: Path | None, ending: str, channels: int
) -> Iterator[tuple[str, list[Path], Path | None]]:
    """Yield identifier, image files and label file of every case of a folder in nnU-Net's naming."""
    for first in sorted(images.glob(f"*_0000{ending}")):
        case = first.name.removesuffix(f"_0000{ending}")
        files = [images / f"{case}_{channel:04d}{ending}" for channel in range(channels)]
        label = None if labels is None else labels / f"{case}{ending}"
        if label is None or label.is_file():
            yield case, files, label
