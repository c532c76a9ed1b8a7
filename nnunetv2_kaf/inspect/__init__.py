"""The arrays behind the pictures of `kaf-report`.

    from nnunetv2_kaf import inspect

    model = inspect.open_model("nnUNet_results/Dataset004_X/nnUNetTrainerKAF__nnUNetPlans__3d_fullres")
    case = inspect.view_case(model, ["case_0000.nii.gz"], "case.nii.gz")
    case.levels[1].attention[0, -1].mean(0)  # (K, K): last block, mean of the heads

`Inspection` sees any forward pass of a network of your own.
"""

from nnunetv2_kaf.inspect.case import CaseView, patch_around, preprocess_case, view_case
from nnunetv2_kaf.inspect.hooks import (
    Inspection,
    Level,
    attention_of,
    kaf_encoder,
    layer_spacing,
    scales_mm,
    spread_out,
    unwrapped,
)
from nnunetv2_kaf.inspect.model import Fold, TrainedModel, open_model

__all__ = [
    "CaseView",
    "Fold",
    "Inspection",
    "Level",
    "TrainedModel",
    "attention_of",
    "kaf_encoder",
    "layer_spacing",
    "open_model",
    "patch_around",
    "preprocess_case",
    "scales_mm",
    "spread_out",
    "unwrapped",
    "view_case",
]
