"""KAF architectures in nnU-Net's plans: substitute, recognise, check; and the standard place of pretraining runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import nnunetv2
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_kaf.architecture import NETWORK_CLASS
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.safe_load import read_json
from nnunetv2_kaf.schema_check import brief, check
from nnunetv2_kaf.schema_plans import (
    ArchitectureEntry,
    ConfigurationEntry,
    DatasetDescription,
    NetworkSpacing,
    PlansEntry,
)

_FIX = "Restore the file, or plan the experiment again."
_REPLACEABLE = ("PlainConvUNet", "ResidualEncoderUNet")


def kaf_architecture(
    architecture: Mapping[str, Any], spacing: Sequence[float], num_image_channels: int, config: KAFConfig
) -> dict[str, Any]:
    """The `architecture` entry of a plan with its UNet replaced by `KAFUNet`.

    Args:
        architecture: nnU-Net's entry for `PlainConvUNet` or `ResidualEncoderUNet`.
        spacing: Voxel sizes of the configuration in mm, array order.
        num_image_channels: Channels of the images; keypoints are detected in all of them.
        config: The layers; its `detection_channels` are replaced by the image channels.

    Returns:
        A new entry; every option of the original is kept.
    """
    block = {**config.to_dict(), "detection_channels": list(range(num_image_channels))}
    entry = deepcopy(dict(architecture))
    entry["network_class_name"] = NETWORK_CLASS
    entry["arch_kwargs"] = {**entry["arch_kwargs"], "spacing": [float(s) for s in spacing], "kaf": block}
    return entry


def is_kaf(plans: Mapping[str, Any], configuration: str) -> bool:
    """Whether a configuration's network is a `KAFUNet`."""
    name: str = resolve_configuration(plans, configuration)["architecture"]["network_class_name"]
    return name == NETWORK_CLASS


def kaf_plans(plans: Mapping[str, Any], config: KAFConfig | None = None) -> dict[str, Any]:
    """Plans whose plain or residual-encoder UNets are replaced by `KAFUNet`.

    Args:
        plans: nnU-Net's plans; not changed. Configurations that already name a `KAFUNet` keep it, with every option of
            its kaf block written out; those with a network of another kind stay as they are.
        config: The layers, as given; None = the defaults, as `KAFConfig.planned` suits them to patch and network.

    Returns:
        A deep copy. A configuration that only inherits its architecture keeps inheriting it, unless it changes the
        spacing or the patch size, which the network depends on.

    Raises:
        KAFError: A kaf block that is there already is wrong.
    """
    out = deepcopy(dict(plans))
    for name, own in plans["configurations"].items():
        resolved = resolve_configuration(plans, name)
        if is_kaf(plans, name) and "architecture" in own:
            arguments: dict[str, Any] = out["configurations"][name]["architecture"]["arch_kwargs"]
            arguments["kaf"] = KAFConfig.from_dict(arguments.get("kaf", {})).to_dict()
        replaceable = resolved["architecture"]["network_class_name"].rsplit(".", 1)[-1] in _REPLACEABLE
        if replaceable and own.keys() & {"architecture", "spacing", "patch_size"}:
            check(ArchitectureEntry, resolved["architecture"], f"{plans['plans_name']}: {name}.architecture", _FIX)
            out["configurations"][name]["architecture"] = kaf_architecture(
                resolved["architecture"],
                resolved["spacing"],
                len(resolved["normalization_schemes"]),
                config
                or KAFConfig().planned(resolved["patch_size"], resolved["architecture"]["arch_kwargs"]["n_stages"]),
            )
    return out


def check_configuration(plans: Mapping[str, Any], configuration: str) -> KAFConfig:
    """Check that a configuration's KAF network can be built and run on its patch.

    Returns:
        The configuration's layers.

    Raises:
        KAFError: The network is of another kind, the kaf block or its spacing is wrong, the patch cannot be pooled, or
            it has fewer voxels than keypoints.
    """
    where = f"plans {plans['plans_name']}, configuration {configuration}"
    resolved = resolve_configuration(plans, configuration)
    architecture = resolved["architecture"]
    if architecture["network_class_name"] != NETWORK_CLASS:
        raise KAFError(
            f"{where}: found the network {architecture['network_class_name']}, expected one of {_REPLACEABLE} or "
            f"{NETWORK_CLASS}. KAF layers can be put into nnU-Net's plain and residual-encoder UNets only; plan with "
            "nnUNetPlannerKAF, or train with the trainer that belongs to that network."
        )
    check(ArchitectureEntry, architecture, f"{where}: architecture", _FIX)
    options = architecture["arch_kwargs"]
    missing = [key for key in ("kaf", "spacing") if key not in options]
    if missing:
        raise KAFError(f"{where}: architecture.arch_kwargs lacks {missing}. Plan again with nnUNetPlannerKAF.")
    config = KAFConfig.from_dict(options["kaf"])
    spacing = list(resolved["spacing"])
    check(NetworkSpacing, options, f"{where}: architecture.arch_kwargs", _FIX)
    if len(spacing) != len(options["spacing"]) or not all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(spacing, options["spacing"], strict=True)
    ):
        raise KAFError(
            f"{where}: the network's spacing {options['spacing']} differs from the configuration's {spacing}. Set "
            "architecture.arch_kwargs.spacing to the configuration's spacing."
        )
    patch = list(resolved["patch_size"])
    if any(len(stage) != len(patch) for stage in (spacing, *options["strides"])):
        raise KAFError(
            f"{where}: architecture.arch_kwargs.strides: found {options['strides']} for the spacing {spacing}, "
            f"expected {len(patch)} axes each, as the patch {patch} has. {_FIX}"
        )
    pooling = [math.prod(s) for s in zip(*options["strides"], strict=True)]
    if any(n % s for n, s in zip(patch, pooling, strict=True)):
        raise KAFError(
            f"{where}: the patch {patch} cannot be pooled by {pooling} in {options['n_stages']} stages. Use a patch "
            "size that is a multiple of it, or fewer stages."
        )
    if math.prod(patch) < config.num_keypoints:
        raise KAFError(
            f"{where}: kaf option num_keypoints: found {config.num_keypoints}, more than the {math.prod(patch)} voxels "
            f"of the patch {patch}. Lower num_keypoints in the plans' kaf block."
        )
    return config


def pretraining_folder(
    dataset_name: str, plans_name: str, configuration: str, fold: int | str, kind: str = "KAFPretraining"
) -> Path:
    """Standard place of a pretraining run: next to nnU-Net's trainings of the same dataset.

    Args:
        dataset_name: DatasetXXX_Name.
        plans_name: Plans identifier.
        configuration: 2d, 3d_fullres, ...
        fold: The fold whose validation cases were left out, or "all".
        kind: First part of the folder's name.

    Raises:
        KAFError: nnUNet_results is not set.
    """
    results = os.environ.get("nnUNet_results")  # noqa: SIM112  # nnU-Net's spelling
    if not results:
        raise KAFError("the environment variable nnUNet_results is not set; set it as in nnU-Net's documentation")
    run = f"{kind}__{plans_name}__{configuration}"
    return Path(results) / dataset_name / run / f"fold_{fold}"


def read_plans(path: Path) -> dict[str, Any]:
    """Read a plans file and check what is used of it (`check_plans`).

    Raises:
        KAFError: It cannot be read, or an entry is wrong.
    """
    plans = read_json(path, "Restore it, or plan the experiment again.")
    check_plans(plans, str(path))
    return dict(plans)


def read_description(path: Path) -> dict[str, Any]:
    """Read a dataset.json and check what is used of it.

    Raises:
        KAFError: It cannot be read, or an entry is wrong.
    """
    fix = "Restore the file, or run nnUNetv2_plan_and_preprocess again."
    description = read_json(path, fix)
    entry = check(DatasetDescription, description, str(path), fix)
    if not (entry.channel_names or entry.modality):
        raise KAFError(f'{path}: channel_names: found none, expected at least one, e.g. {{"0": "MRI"}}. {fix}')
    try:
        LabelManager(entry.labels, entry.regions_class_order)
    except (AssertionError, RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise KAFError(
            f"{path}: labels: found {brief(entry.labels)}, which nnU-Net refuses ({error}). {fix}"
        ) from error
    return dict(description)


def check_plans(plans: object, where: str) -> None:
    """Check the entries of plans that are used, and that names in them stand for what they should.

    nnU-Net looks classes and functions up by these names, in its own package, and calls what it finds.

    Args:
        plans: Content of a file.
        where: The file, for messages.

    Raises:
        KAFError: An entry is missing, of a wrong type or size, leads out of its folder, or names something else.
    """
    entry = check(PlansEntry, plans, where, _FIX)
    names = {
        "image_reader_writer": (entry.image_reader_writer, "imageio", BaseReaderWriter),
        "label_manager": (entry.label_manager, "utilities.label_handling", LabelManager),
    }
    for option, (name, place, base) in names.items():
        _check_named(where, option, name, place, base)
    for configuration in entry.configurations:
        _check_configuration_names(plans, configuration, where)  # type: ignore[arg-type]


def resolve_configuration(plans: Mapping[str, Any], configuration: str, where: str = "") -> dict[str, Any]:
    """A configuration with its inheritance resolved by nnU-Net.

    Args:
        plans: Checked by `check_plans`, or made here.
        configuration: Its name.
        where: File of the plans, for messages.

    Raises:
        KAFError: There is no such configuration, it inherits from itself or from nothing, or an entry is wrong.
    """
    where = where or f"plans {plans.get('plans_name')}"
    _check_inheritance(plans, configuration, where)
    try:
        resolved: dict[str, Any] = PlansManager(dict(plans)).get_configuration(configuration).configuration
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # of plans of an old format
        raise KAFError(
            f"{where}, configuration {configuration}: found no architecture that nnU-Net can make out ({error!r}), "
            f"expected network_class_name and arch_kwargs. {_FIX}"
        ) from error
    check(ConfigurationEntry, resolved, f"{where}: configurations.{configuration}", _FIX)
    return resolved


def _check_inheritance(plans: Mapping[str, Any], configuration: str, where: str) -> None:
    chain, name = [configuration], configuration
    while True:
        if name not in plans["configurations"]:
            by = "" if len(chain) == 1 else f", from which {chain[-2]} inherits (inherits_from)"
            raise KAFError(
                f"{where}: found no configuration {name!r}{by}, available are {list(plans['configurations'])}"
            )
        parent = plans["configurations"][name].get("inherits_from")
        if parent is None and "inherits_from" not in plans["configurations"][name]:
            return
        if not isinstance(parent, str) or parent in chain:
            found = f"the circle {' -> '.join([*chain, parent])}" if isinstance(parent, str) else brief(parent)
            raise KAFError(
                f"{where}: configurations.{name}.inherits_from: found {found}, expected the name of another "
                f"configuration. {_FIX}"
            )
        chain.append(parent)
        name = parent


def _check_configuration_names(plans: Mapping[str, Any], configuration: str, where: str) -> None:
    """Check that the names in a configuration stand for preprocessors, normalisations and resampling functions."""
    entry = ConfigurationEntry.model_validate(resolve_configuration(plans, configuration, where))
    place = f"{where}: configurations.{configuration}"
    _check_named(place, "preprocessor_name", entry.preprocessor_name, "preprocessing", DefaultPreprocessor)
    for name in entry.normalization_schemes:
        _check_named(place, "normalization_schemes", name, "preprocessing.normalization", ImageNormalization)
    for option in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        _check_named(place, option, getattr(entry, option), "preprocessing.resampling", None)


def _check_named(where: str, option: str, name: str | None, place: str, base: type | None) -> None:
    """Check that a name stands for a class derived from `base` (None: a function) in a package of nnU-Net."""
    if name is None:
        return
    package = f"nnunetv2.{place}"
    found = _find(name, place) if name.isidentifier() else None
    ok = isinstance(found, type) and issubclass(found, base) if base else isinstance(found, FunctionType)
    if not ok or not found.__module__.startswith(package):
        kind = f"a class derived from {base.__name__}" if base else "a function"
        raise KAFError(f"{where}: {option}: found {brief(name)}, expected {kind} of {package}. {_FIX}")


@lru_cache(maxsize=256)
def _find(name: str, place: str) -> Any:
    folder = Path(str(nnunetv2.__path__[0])).joinpath(*place.split("."))
    return recursive_find_python_class(str(folder), name, f"nnunetv2.{place}")
