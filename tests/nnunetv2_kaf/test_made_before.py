"""Files that an early version wrote, before pretraining was split into rooms: they load, and give what they gave.

`made_before` holds a pretraining checkpoint in 2D, a model folder in 3D that was trained for three steps, and the
logits of both networks on an image. The files were written by commit 1c6655b.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

import nnunetv2_kaf
from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.inspect import open_model
from nnunetv2_kaf.plans import resolve_configuration
from nnunetv2_kaf.weights import load_encoder, read_checkpoint

FILES = Path(__file__).parent / "made_before"
PRETRAINING = FILES / "pretraining_2d.pth"
MODEL = FILES / "nnUNetTrainerKAF_5epochs__nnUNetKAFPlans__3d_fullres"


def example(configuration: str) -> tuple[Tensor, Tensor]:
    with np.load(FILES / "expected.npz") as arrays:
        return tuple(torch.from_numpy(arrays[f"{name}_{configuration}"]) for name in ("image", "logits"))  # type: ignore[return-value]


def test_a_pretraining_checkpoint_gives_the_same_network() -> None:
    image, logits = example("2d")
    content = read_checkpoint(PRETRAINING)
    plans = content["plans"]
    network = build_network(resolve_configuration(plans, "2d")["architecture"], 1, 3, where="test")
    report = load_encoder(network, PRETRAINING, plans, "2d")
    assert sum(report.tensors.values()) == sum(name.startswith("encoder.") for name in network.state_dict())
    network.load_state_dict(content["network_weights"])
    network.eval()
    network.decoder.deep_supervision = False
    with torch.no_grad():
        torch.testing.assert_close(network(image), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reader", ["nnU-Net", "inspect"])
def test_a_model_folder_gives_the_same_network(reader: str) -> None:
    image, logits = example("3d_fullres")
    if reader == "nnU-Net":
        nnunetv2_kaf.activate()
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(MODEL), use_folds=(0,))
        network = predictor.network
        network.load_state_dict(predictor.list_of_parameters[0])
    else:
        model = open_model(MODEL)
        network = model.build(model.folds[0])
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(image), logits, rtol=1e-4, atol=1e-5)
