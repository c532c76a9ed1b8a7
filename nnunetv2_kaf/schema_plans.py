"""Schemas of the files that nnU-Net plans, describes and splits a dataset with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, RootModel

from nnunetv2_kaf.schema_check import Listed, Name, PathName, PlainDict, Record, Strings, plain

MAX_STAGES = 16


def _counts(high: int, low: int = 1) -> BeforeValidator:
    """A whole number, or a list of them, or a list of lists of them (one per stage, one per axis)."""

    def validate(value: object, depth: int = 0) -> object:
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        if isinstance(value, (list, tuple)) and depth < 2 and 0 < len(value) <= MAX_STAGES:
            for item in value:
                validate(item, depth + 1)
        elif not ok:
            raise ValueError(f"whole numbers from {low} to {high}: one, or one per stage")
        return value

    return BeforeValidator(validate)


def _numbers(low: float, high: float, kind: type = float) -> BeforeValidator:
    """A list of two or three numbers, one per axis."""

    def validate(value: object) -> object:
        items: list[Any] = list(value) if isinstance(value, (list, tuple)) else []
        types = (int,) if kind is int else (int, float)
        ok = all(type(v) in types and low <= v <= high for v in items)
        if not (2 <= len(items) <= 3 and ok):
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"two or three {what} from {low:g} to {high:g}, one per axis")
        return items

    return BeforeValidator(validate)


class ArchKwargs(Record):
    """Options of nnU-Net's UNets and of ours, in sizes that a network can have."""

    n_stages: int = Field(ge=1, le=MAX_STAGES)
    features_per_stage: Annotated[Any, _counts(65536)]
    kernel_sizes: Annotated[Any, _counts(63)]
    strides: Annotated[Any, _counts(64)]
    n_conv_per_stage: Annotated[Any, _counts(256)] = 1
    n_blocks_per_stage: Annotated[Any, _counts(256)] = 1
    n_conv_per_stage_decoder: Annotated[Any, _counts(256)]
    conv_bias: bool = False
    norm_op_kwargs: PlainDict | None = None
    dropout_op_kwargs: PlainDict | None = None
    nonlin_kwargs: PlainDict | None = None


def _arch_kwargs(value: Any) -> Any:
    operators = ("conv_op", "norm_op", "dropout_op", "nonlin", "block")
    if isinstance(value, Mapping):
        # operators may be classes where the entry was made in Python; the allow-list decides about them
        plain({k: v for k, v in value.items() if k not in operators})
    return value


class ArchitectureEntry(Record):
    """The `architecture` entry of a configuration."""

    network_class_name: Name
    arch_kwargs: Annotated[ArchKwargs, BeforeValidator(_arch_kwargs)]
    kw_requires_import: Annotated[list[str], Listed] = Field(alias="_kw_requires_import")


class NamedNetwork(Record):
    """What says which network a configuration has; its options depend on the network."""

    network_class_name: Name
    arch_kwargs: dict[str, Any]
    kw_requires_import: Strings = Field(alias="_kw_requires_import")


class ConfigurationEntry(Record):
    """A configuration of plans, its inheritance resolved."""

    data_identifier: PathName
    patch_size: Annotated[list[int], _numbers(1, 65536, int)]
    spacing: Annotated[list[float], _numbers(1e-6, 1e6)]
    batch_size: int = Field(ge=1, le=2**20)
    normalization_schemes: Annotated[Strings, Field(min_length=1)]
    use_mask_for_norm: Annotated[list[bool], Listed] = Field(default_factory=list)
    preprocessor_name: Name = "DefaultPreprocessor"
    resampling_fn_data: Name | None = None
    resampling_fn_data_kwargs: PlainDict = Field(default_factory=dict)
    resampling_fn_seg: Name | None = None
    resampling_fn_seg_kwargs: PlainDict = Field(default_factory=dict)
    resampling_fn_probabilities: Name | None = None
    resampling_fn_probabilities_kwargs: PlainDict = Field(default_factory=dict)
    previous_stage: PathName | None = None
    architecture: NamedNetwork


class PlansEntry(Record):
    """Plans, as far as they are read here."""

    dataset_name: PathName
    plans_name: PathName
    configurations: dict[PathName, dict[str, Any]] = Field(min_length=1)
    image_reader_writer: Name = "SimpleITKIO"
    label_manager: Name = "LabelManager"


class NetworkSpacing(Record):
    """The voxel size of a KAF network, in mm."""

    spacing: Annotated[list[float], _numbers(1e-6, 1e6)]
    strides: Annotated[list[list[int]], Listed]


def _labels(value: object) -> object:
    """Label values by name; a region is a list of values."""
    values = list(value.values()) if isinstance(value, Mapping) else []
    flat = [w for v in values for w in (v if isinstance(v, (list, tuple)) and v else [v])]
    if not values or any(not isinstance(v, int) or isinstance(v, bool) or not 0 <= v < 65536 for v in flat):
        raise ValueError('label values by name, e.g. {"background": 0, "heart": 1}')
    return value


class DatasetDescription(Record):
    """nnU-Net's dataset.json."""

    labels: Annotated[dict[Name, Any], BeforeValidator(_labels)]
    channel_names: dict[str, Any] | None = None
    modality: dict[str, Any] | None = None
    regions_class_order: Annotated[list[int], Listed] | None = None


class Split(Record):
    """One fold: names of cases."""

    train: list[Name]
    val: list[Name]


class Splits(RootModel[Annotated[list[Split], Field(min_length=1)]]):
    """nnU-Net's splits_final.json."""

    model_config = ConfigDict(strict=True)
