"""Network planners: nnU-Net's own, with its UNet replaced by `KAFUNet`.

`nnUNetPlannerKAF` plans like nnU-Net's default planner, `nnUNetPlannerKAFResEncM/L/XL` like its residual-encoder
presets, `nnUNetPlannerKAFPaper` with the paper's widths and depths. The KAF layers count in the memory estimate that
sizes patch and batch, and data that nnU-Net already preprocessed for `nnUNetPlans` are used as they are.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_kaf.config import FINEST_LEVEL, KAFConfig
from nnunetv2_kaf.plans import kaf_architecture, read_plans

_LOGGER = logging.getLogger(__name__)
# what decides how data are preprocessed: for all configurations, and for one
_PREPROCESSING_OF_ALL = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
_PREPROCESSING = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)


class _KAFPlanning:
    """What KAF changes in a planner of nnU-Net; mixed in before it."""

    kaf_config: ClassVar[KAFConfig] = KAFConfig()
    finest_level: ClassVar[int] = FINEST_LEVEL

    def static_estimate_VRAM_usage(  # type: ignore[no-untyped-def]  # noqa: N802
        self, patch_size, input_channels, output_channels, arch_class_name, arch_kwargs, arch_kwargs_req_import
    ):
        """nnU-Net's estimate, of the network with its KAF layers."""
        entry = self._with_kaf(
            {"network_class_name": arch_class_name, "arch_kwargs": arch_kwargs}, [1.0] * len(patch_size), patch_size
        )
        return ExperimentPlanner.static_estimate_VRAM_usage(
            patch_size,
            input_channels,
            output_channels,
            entry["network_class_name"],
            entry["arch_kwargs"],
            arch_kwargs_req_import,
        )

    def get_plans_for_configuration(self, spacing, *args, **kwargs):  # type: ignore[no-untyped-def]
        """nnU-Net's plan, with the architecture replaced."""
        plan = super().get_plans_for_configuration(spacing, *args, **kwargs)  # type: ignore[misc]
        plan["architecture"] = self._with_kaf(plan["architecture"], plan["spacing"], plan["patch_size"])
        return plan

    def plan_experiment(self) -> dict[str, Any]:
        """Plan, and make sure that plain `nnUNetPlans` exist too.

        `nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerKAF` names no plans and so reads `nnUNetPlans`.
        """
        if not self._plain_plans_file.is_file():
            _LOGGER.info("%s does not exist yet, planning it with nnU-Net's default planner", self._plain_plans_file)
            ExperimentPlanner(
                self.dataset_name,  # type: ignore[attr-defined]
                preprocessor_name=self.preprocessor_name,  # type: ignore[attr-defined]
                overwrite_target_spacing=self.overwrite_target_spacing,  # type: ignore[attr-defined]
                suppress_transpose=self.suppress_transpose,  # type: ignore[attr-defined]
            ).plan_experiment()
        plans: dict[str, Any] = super().plan_experiment()  # type: ignore[misc]
        return plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Save; a configuration that is preprocessed exactly as in `nnUNetPlans` shares their data, and no other."""
        recursive_fix_for_json_export(plans)
        plain = read_plans(self._plain_plans_file)
        alike = all(plain.get(key) == plans.get(key) for key in _PREPROCESSING_OF_ALL)
        for name, plan in plans["configurations"].items():
            theirs = plain["configurations"].get(name, {})
            if "data_identifier" not in theirs:
                continue
            if alike and all(theirs.get(key) == plan.get(key) for key in _PREPROCESSING):
                plan["data_identifier"] = theirs["data_identifier"]
            elif plan.get("data_identifier") == theirs["data_identifier"]:  # as nnU-Net's residual-encoder planners do
                plan["data_identifier"] = f"{plans['plans_name']}_{name}"
        super().save_plans(plans)  # type: ignore[misc]

    @property
    def _plain_plans_file(self) -> Path:
        folder = Path(str(nnUNet_preprocessed)) / str(self.dataset_name)  # type: ignore[attr-defined]
        return folder / "nnUNetPlans.json"

    def _with_kaf(self, architecture: dict[str, Any], spacing: Any, patch_size: Any) -> dict[str, Any]:
        names = self.dataset_json.get("channel_names") or self.dataset_json["modality"]  # type: ignore[attr-defined]
        config = self.kaf_config.planned(patch_size, architecture["arch_kwargs"]["n_stages"], self.finest_level)
        return kaf_architecture(architecture, spacing, len(names), config)


class nnUNetPlannerKAF(_KAFPlanning, ExperimentPlanner):  # type: ignore[misc]  # noqa: N801
    """nnU-Net's default planner with KAF layers; writes `nnUNetKAFPlans`."""

    def __init__(self, *args: Any, plans_name: str = "nnUNetKAFPlans", **kwargs: Any) -> None:
        super().__init__(*args, plans_name=plans_name, **kwargs)


class nnUNetPlannerKAFPaper(nnUNetPlannerKAF):  # noqa: N801
    """The paper's widths and depths (`KAFConfig.paper`); writes `nnUNetKAFPaperPlans`."""

    kaf_config: ClassVar[KAFConfig] = KAFConfig.paper()
    finest_level: ClassVar[int] = 0

    def __init__(self, *args: Any, plans_name: str = "nnUNetKAFPaperPlans", **kwargs: Any) -> None:
        super().__init__(*args, plans_name=plans_name, **kwargs)


class nnUNetPlannerKAFResEncM(_KAFPlanning, nnUNetPlannerResEncM):  # type: ignore[misc]  # noqa: N801
    """nnU-Net's residual-encoder preset M with KAF layers; writes `nnUNetKAFResEncUNetMPlans`."""

    def __init__(self, *args: Any, plans_name: str = "nnUNetKAFResEncUNetMPlans", **kwargs: Any) -> None:
        super().__init__(*args, plans_name=plans_name, **kwargs)


class nnUNetPlannerKAFResEncL(_KAFPlanning, nnUNetPlannerResEncL):  # type: ignore[misc]  # noqa: N801
    """nnU-Net's residual-encoder preset L with KAF layers; writes `nnUNetKAFResEncUNetLPlans`."""

    def __init__(self, *args: Any, plans_name: str = "nnUNetKAFResEncUNetLPlans", **kwargs: Any) -> None:
        super().__init__(*args, plans_name=plans_name, **kwargs)


class nnUNetPlannerKAFResEncXL(_KAFPlanning, nnUNetPlannerResEncXL):  # type: ignore[misc]  # noqa: N801
    """nnU-Net's residual-encoder preset XL with KAF layers; writes `nnUNetKAFResEncUNetXLPlans`."""

    def __init__(self, *args: Any, plans_name: str = "nnUNetKAFResEncUNetXLPlans", **kwargs: Any) -> None:
        super().__init__(*args, plans_name=plans_name, **kwargs)
