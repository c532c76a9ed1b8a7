"""What has to be in the files that are read: one schema each, and one wording for what is wrong.

The schemas name what is used and let everything else pass. They are strict: text is no number, and a number that is not
finite is none at all.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError
from torch import Tensor

from nnunetv2_kaf.errors import KAFError

MAX_DEPTH = 16
"""Levels of nesting; plans have six."""
MAX_STAGES = 16
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


class Record(BaseModel):
    """Strict, with finite numbers, and silent about entries that it does not name."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, arbitrary_types_allowed=True)


Schema = TypeVar("Schema", bound=BaseModel)


def check(schema: type[Schema], content: object, where: str, fix: str) -> Schema:
    """Check the content of a file.

    Args:
        schema: What is expected.
        content: What was read.
        where: File, and place in it, for the message.
        fix: What to do, a sentence.

    Raises:
        KAFError: The first thing that is wrong: where, what was found, what was expected, the fix.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = "no such entry" if first["type"] == "missing" else brief(first["input"])
        expected = "one" if first["type"] == "missing" else _expected(first["msg"])
        # Not chained: the library's own text would be in a traceback what the message says already.
        raise KAFError(f"{where}{f': {place}' if place else ''}: found {found}, expected {expected}. {fix}") from None
    except RecursionError:
        raise KAFError(
            f"{where}: found entries nested too deeply, expected at most {MAX_DEPTH} levels. {fix}"
        ) from None


def brief(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping) and not value:
        return "an empty dict"
    return _REPR.repr(value)


def _expected(message: str) -> str:
    """The wording of the library as "a valid integer"."""
    text = re.sub(r"^(Value error, |Input should be |Dictionary should be )", "", message)
    return re.sub(r" or an instance of .*", "", text).replace("valid dictionary", "dictionary")


def _list(value: object) -> object:
    """Tuples count as lists: both stand for JSON's lists."""
    return list(value) if isinstance(value, tuple) else value


def plain(value: Any, depth: int = 0, finite: bool = True) -> Any:
    """Check that a value is made of null, numbers, text, lists and dicts only.

    Args:
        value: Any.
        depth: Levels above it.
        finite: Refuse NaN and infinite numbers, which a record of measurements may have.

    Raises:
        ValueError: It is not.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"at most {MAX_DEPTH} levels of nesting")
    if isinstance(value, (list, tuple)):
        for item in value:
            plain(item, depth + 1, finite)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError("keys that are text")
            plain(item, depth + 1, finite)
    elif finite and isinstance(value, float) and not math.isfinite(value):
        raise ValueError("finite numbers")
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise ValueError("null, numbers, text, lists and dicts only")
    return value


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


Name = Annotated[str, Field(min_length=1, max_length=200)]
PlainDict = Annotated[dict[str, Any], BeforeValidator(plain)]
Measurements = Annotated[dict[str, Any], BeforeValidator(partial(plain, finite=False))]


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
    kw_requires_import: Annotated[list[str], BeforeValidator(_list)] = Field(alias="_kw_requires_import")


def _path_name(value: str) -> str:
    """A name that becomes part of a path cannot lead anywhere else."""
    if not re.fullmatch(r"[^\W_][\w.+\- ]*", value) or len(value.encode()) > MAX_NAME:
        raise ValueError(f"a name of letters, digits, _, -, + and ., at most {MAX_NAME} bytes")
    return value


def check_name(value: str, option: str) -> None:
    """Check a name that becomes part of a path.

    Args:
        value: The name.
        option: The option that gives it, for the message.

    Raises:
        KAFError: It could lead elsewhere.
    """
    try:
        _path_name(value)
    except ValueError as error:
        raise KAFError(f"{option} is {value!r}; expected {error}.") from error


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


MAX_NAME = 128
PathName = Annotated[str, AfterValidator(_path_name)]
Strings = Annotated[list[str], BeforeValidator(_list)]


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
    use_mask_for_norm: Annotated[list[bool], BeforeValidator(_list)] = []
    preprocessor_name: Name = "DefaultPreprocessor"
    resampling_fn_data: Name | None = None
    resampling_fn_data_kwargs: PlainDict = {}
    resampling_fn_seg: Name | None = None
    resampling_fn_seg_kwargs: PlainDict = {}
    resampling_fn_probabilities: Name | None = None
    resampling_fn_probabilities_kwargs: PlainDict = {}
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
    strides: Annotated[list[list[int]], BeforeValidator(_list)]


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
    regions_class_order: Annotated[list[int], BeforeValidator(_list)] | None = None


def _fold(value: object) -> object:
    if value != "all" and not (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6):
        raise ValueError('a fold: a whole number from 0, or "all"')
    return value


Fold = Annotated[Any, BeforeValidator(_fold)]


class PretrainingCheckpoint(Record):
    """checkpoint_final.pth of a pretraining; `tensors.check_weights` looks at its weights."""

    network_weights: Any
    architecture: ArchitectureEntry
    num_input_channels: int = Field(ge=1, le=4096)
    dataset_name: PathName
    configuration: PathName
    fold: Fold
    plans: Annotated[PlansEntry, BeforeValidator(plain)]
    pretraining: Measurements
    versions: dict[str, str]


class ContinuedTraining(Record):
    """What `nnUNetTrainer.load_checkpoint` takes from a checkpoint."""

    network_weights: Any
    optimizer_state: dict[str, Any]
    grad_scaler_state: dict[str, Any] | None
    logging: dict[str, Any]
    current_epoch: int = Field(ge=0)
    init_args: dict[str, Any]


class RunIdentity(Record):
    """What a pretraining run is about; a run is continued as the same one only."""

    dataset: PathName
    plans: PathName
    configuration: PathName
    fold: str
    patch_size: list[int]
    spacing: list[float]
    batch_size: int
    cases: list[str]
    init: str | None


class ParameterGroup(Record):
    """Parameters of an optimiser, by number, and their options."""

    params: list[int]


class OptimizerState(Record):
    """The state dict of an optimiser; `tensors.check_optimizer` compares it with the optimiser that takes it."""

    state: dict[int, dict[str, Any]]
    param_groups: list[ParameterGroup] = Field(min_length=1)


def _history(value: object) -> object:
    for record in value if isinstance(value, list) else [value]:
        numbers = isinstance(record, Mapping) and all(
            isinstance(k, str) and isinstance(v, (int, float)) and not isinstance(v, bool) for k, v in record.items()
        )
        if not numbers or not math.isfinite(record.get("epoch", math.nan)):  # type: ignore[union-attr]
            raise ValueError("a list of records of numbers, each with its epoch")
    return value


History = Annotated[list[dict[str, Any]], BeforeValidator(_history)]


class FinishedRun(Record):
    """What checkpoint_final.pth of a pretraining records about the run."""

    config: dict[str, Any]
    dataset: PathName
    plans: PathName
    configuration: PathName
    fold: str
    cases: list[str] = []
    history: History = []


class RunCheckpoint(Record):
    """checkpoint_latest.pth of a pretraining: everything that is needed to go on."""

    config: dict[str, Any]
    identity: RunIdentity
    step: int = Field(ge=0)
    sums: Annotated[dict[str, float], BeforeValidator(partial(plain, finite=False))]
    history: History
    network: Any
    model: Any
    optimizer: OptimizerState
    scaler: PlainDict
    rng_cpu: Tensor
    rng_cuda: list[Tensor]


class Split(Record):
    """One fold: names of cases."""

    train: list[Name]
    val: list[Name]


class Splits(RootModel[Annotated[list[Split], Field(min_length=1)]]):
    """nnU-Net's splits_final.json."""

    model_config = ConfigDict(strict=True)
