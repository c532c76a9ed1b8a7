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

from .config import PLANNER, Task
from .layout import Layout

PLAIN = "nnUNetPlans"


def planned(planner: str) -> str:
    """Name of the plans of a planner within the study."""
    return PLAIN if planner == PLANNER else f"{planner}Plans"


def write(layout: Layout) -> None:
    """Write the plans of every arm next to nnU-Net's."""
    plain, configuration = _read(layout, PLANNER), layout.task.configuration
    for arm in layout.arms:
        plans = same_batch(_read(layout, arm.planner), plain, configuration, layout.task)
        if arm.network == "kaf":
            network = resolve_configuration(plans, configuration)
            stages = network["architecture"]["arch_kwargs"]["n_stages"]
            plans = kaf_plans(plans, kaf_config(arm.kaf, network["patch_size"], stages))
        name = layout.plans_name(arm)
        plans = {**plans, "plans_name": name}
        (layout.preprocessed / f"{name}.json").write_text(json.dumps(plans, indent=2) + "\n")


def kaf_config(options: Mapping[str, Any], patch_size: Sequence[int], n_stages: int) -> KAFConfig:
    """The layers of an arm: its options, and what plans choose where it says nothing."""
    config = KAFConfig.from_dict(options)
    planned = config.planned(patch_size, n_stages)
    return replace(planned, num_keypoints=options.get("num_keypoints", planned.num_keypoints))


def same_batch(plans: Mapping[str, Any], plain: Mapping[str, Any], configuration: str, task: Task) -> dict[str, Any]:
    """Plans with one configuration, with the batch and the patch that all arms of a task share.

    Args:
        plans: Plans of the arm's planner.
        plain: Plans of nnU-Net's default planner.
        configuration: What is trained.
        task: Its batch, patch, width and depth; None is what `plain`, or the arm's own planner, has.

    Raises:
        KAFError: The planner preprocesses in another way, or its network cannot pool the patch.
    """
    ours, theirs = resolve_configuration(plans, configuration), resolve_configuration(plain, configuration)
    ours = resized(ours, task)
    if ours["data_identifier"] != theirs["data_identifier"]:
        raise KAFError(
            f"planner of {plans['plans_name']}: found the data identifier {ours['data_identifier']}, expected that of "
            f"nnU-Net's default planner, {theirs['data_identifier']}: all arms share their data. Use another planner."
        )
    patch = task.patch_size or theirs["patch_size"]
    if len(patch) != len(theirs["patch_size"]):
        raise KAFError(
            f"tasks.{task.name}.patch_size: found {patch}, expected {len(theirs['patch_size'])} numbers for "
            f"{configuration}. Correct it."
        )
    pooling = [math.prod(stride) for stride in zip(*ours["architecture"]["arch_kwargs"]["strides"], strict=True)]
    if any(n % p for n, p in zip(patch, pooling, strict=True)):
        raise KAFError(
            f"{plans['plans_name']}: its network pools by {pooling}, which does not divide the patch {patch} "
            "that all arms share. Use another planner, patch_size or n_stages."
        )
    changed = {
        "patch_size": patch,
        "batch_size": task.batch_size or theirs["batch_size"],
        "batch_dice": theirs["batch_dice"],
    }
    return {**plans, "configurations": {configuration: {**ours, **changed}}}


def resized(configuration: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """A configuration whose network has the task's width and depth: its first stages, features from that width.

    Args:
        configuration: Resolved, with the network of a planner.
        task: `features` of the first stage, doubled from stage to stage up to the planner's maximum, and `n_stages`.

    Raises:
        KAFError: The planner's network has fewer stages.
    """
    if task.features is None and task.n_stages is None:
        return dict(configuration)
    architecture = configuration["architecture"]
    given = architecture["arch_kwargs"]
    planned, widths = given["n_stages"], given["features_per_stage"]
    count = task.n_stages or planned
    if count > planned:
        raise KAFError(
            f"tasks.{task.name}.n_stages: found {count}, but the planner's network has {planned} stages. Lower it."
        )
    first = task.features or widths[0]
    kwargs = {**given, "n_stages": count, "features_per_stage": [min(first * 2**i, widths[-1]) for i in range(count)]}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == planned and name != "features_per_stage":
            kwargs[name] = value[:count]
        elif isinstance(value, list) and len(value) == planned - 1:
            kwargs[name] = value[: count - 1]
    return {**configuration, "architecture": {**architecture, "arch_kwargs": kwargs}}


def _read(layout: Layout, planner: str) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads((layout.preprocessed / f"{planned(planner)}.json").read_text())
    return plans
