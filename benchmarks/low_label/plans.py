"""The plans of the arms: nnU-Net's, with one batch and one patch for all, and the network of the arm."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_plans, resolve_configuration

from .config import PLANNER
from .layout import Layout

PLAIN = "nnUNetPlans"


def planned(planner: str) -> str:
    """Name of the plans of a planner within the study."""
    return PLAIN if planner == PLANNER else f"{planner}Plans"


def write(layout: Layout) -> None:
    """Write the plans of every arm next to nnU-Net's."""
    plain, configuration = _read(layout, PLANNER), layout.task.configuration
    for arm in layout.arms:
        plans = same_batch(_read(layout, arm.planner), plain, configuration, layout.task.batch_size)
        if arm.trainer == "kaf":
            network = resolve_configuration(plans, configuration)
            stages = network["architecture"]["arch_kwargs"]["n_stages"]
            plans = kaf_plans(plans, kaf_config(arm.kaf, network["patch_size"], stages))
        name = layout.plans_name(arm)
        plans = {**plans, "plans_name": name}
        (layout.preprocessed / f"{name}.json").write_text(json.dumps(plans, indent=2) + "\n")


def kaf_config(options: Mapping[str, Any], patch_size: Sequence[int], n_stages: int) -> KAFConfig:
    """Return the layers of an arm: its options, and what plans choose where it says nothing."""
    config = KAFConfig.from_dict(options)
    planned = config.planned(patch_size, n_stages)
    return replace(planned, num_keypoints=options.get("num_keypoints", planned.num_keypoints))


def same_batch(
    plans: Mapping[str, Any], plain: Mapping[str, Any], configuration: str, batch_size: int | None
) -> dict[str, Any]:
    """Return plans with one configuration, whose batch is that of the study and whose patch is that of plain nnU-Net.

    Args:
        plans: of the arm's planner.
        plain: of nnU-Net's default planner.
        configuration: what is trained.
        batch_size: of the study; None is that of `plain`.

    Raises:
        KAFError: the planner preprocesses in another way, or its network cannot pool the patch.
    """
    ours, theirs = resolve_configuration(plans, configuration), resolve_configuration(plain, configuration)
    if ours["data_identifier"] != theirs["data_identifier"]:
        raise KAFError(
            f"planner of {plans['plans_name']}: found the data identifier {ours['data_identifier']}, expected that of "
            f"nnU-Net's default planner, {theirs['data_identifier']}: all arms share their data. Use another planner."
        )
    patch = theirs["patch_size"]
    pooling = [math.prod(stride) for stride in zip(*ours["architecture"]["arch_kwargs"]["strides"], strict=True)]
    if any(n % p for n, p in zip(patch, pooling, strict=True)):
        raise KAFError(
            f"{plans['plans_name']}: its network pools by {pooling}, which does not divide the patch {patch} of "
            "nnU-Net's default planner, which all arms share. Use another planner."
        )
    changed = {
        "patch_size": patch,
        "batch_size": batch_size or theirs["batch_size"],
        "batch_dice": theirs["batch_dice"],
    }
    return {**plans, "configurations": {configuration: {**ours, **changed}}}


def _read(layout: Layout, planner: str) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads((layout.preprocessed / f"{planned(planner)}.json").read_text())
    return plans
