"""The study as one JSON file: what is trained on what; every mistake is reported with the key that it is in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from pretraining.config import PretrainConfig

from .schema import Rule, read_block, whole

ALL = "all"
"""In `labelled`: every patient that is not for validation or test."""
TRAINERS = ("plain", "kaf", "semi", "kaf_semi", "primus")
KAF_TRAINERS = ("kaf", "kaf_semi")
SEMI_TRAINERS = ("semi", "kaf_semi")
PLANNER = "ExperimentPlanner"
SEMI_ATTRIBUTES = (
    "confidence_threshold",
    "teacher_decay",
    "unlabelled_weight",
    "unlabelled_ramp",
    "unlabelled_share",
    "cutmix_probability",
    "predict_with",
)
ATTRIBUTES = ("initial_lr", "weight_decay", "oversample_foreground_percent", "warmup_epochs", *SEMI_ATTRIBUTES)
"""What `training` may set: nnU-Net's own names, the epochs of linear warm-up, and those of semi-supervised trainers."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_FIXED = ("seed", "network")


def _labelled(value: list[Any]) -> bool:
    numbers = [m for m in value if m != ALL]
    right = all(isinstance(m, int) and not isinstance(m, bool) and m >= 1 for m in numbers)
    return bool(value) and right and len(set(map(str, value))) == len(value)


_OBJECT = Rule((dict,), "an object", default={})
_TASK = {
    "data": Rule((str,), "the name of a raw dataset folder in --data"),
    "configuration": Rule((str,), "an nnU-Net configuration, such as 2d or 3d_fullres"),
    "batch_size": Rule((int, type(None)), "a whole number of at least 2, or null", lambda v: v is None or v >= 2, None),
    "downsample": whole(1, 1),
    "patch_size": Rule(
        (list, type(None)),
        "whole numbers of at least 8, one per axis, or null",
        lambda v: v is None or (len(v) in (2, 3) and all(type(n) is int and n >= 8 for n in v)),
        None,
    ),
    "features": Rule((int, type(None)), "a whole number of at least 4, or null", lambda v: v is None or v >= 4, None),
    "n_stages": Rule((int, type(None)), "a whole number of at least 2, or null", lambda v: v is None or v >= 2, None),
    "validation_patients": whole(1, 5),
    "patient_pattern": Rule(
        (str,),
        "a regular expression with a group",
        lambda v: re.compile(v).groups > 0,
        PretrainConfig().patient_pattern,
    ),
}
_ARM = {
    "trainer": Rule((str,), f"one of {', '.join(TRAINERS)}", lambda v: v in TRAINERS),
    "planner": Rule((str,), "the name of a planner", default=PLANNER),
    "kaf": _OBJECT,
    "pretraining": Rule((dict, type(None)), "an object with options of kaf-pretrain, or null", default=None),
    "training": _OBJECT,
    "tasks": Rule((list, type(None)), "names of tasks, or null for all", default=None),
    "labelled": Rule((list, type(None)), "some of the study's numbers of patients, or null for all", default=None),
    "note": Rule((str,), "text for the table", default=""),
    "earlier": Rule((bool,), "true or false", default=False),
}
_NOT_OF_A_RUN = ("tasks", "labelled", "note", "earlier")
_STUDY = {
    "comment": Rule((str,), "text: what it is for, and what it costs"),
    "conclusion": Rule((str,), "text: what the results show", default=""),
    "device": Rule((str,), "cpu, cuda or mps", lambda v: v in ("cpu", "cuda", "mps")),
    "seed": whole(0, 0),
    "labelled": Rule((list,), f'distinct numbers of patients, and "{ALL}"', _labelled),
    "draws": Rule(
        (int, dict),
        "a whole number of at least 1, or an object with one for every number in labelled",
        lambda v: all(type(n) is int and n >= 1 for n in (v.values() if isinstance(v, dict) else [v])),
    ),
    "test_share": Rule((float,), "a number between 0 and 1", lambda v: 0 < v < 1, 0.2),
    "epochs": whole(1),
    "iterations": whole(1),
    "validation_iterations": whole(1, 2),
    "augmentation_processes": whole(0, 0),
    "compile": Rule((bool,), "true or false", default=False),
    "mirror_predictions": Rule((bool,), "true or false", default=True),
    "training": _OBJECT,
    "pretraining": _OBJECT,
    "pretraining_seeds": whole(1, 1),
    "baseline": Rule((str,), "the name of an arm", default="plain"),
    "tasks": Rule((dict,), "an object of tasks", bool),
    "arms": Rule((dict,), "an object of arms", bool),
}


@dataclass(frozen=True)
class Task:
    """A dataset and a configuration; see `benchmarks/low_label/__main__.py` for the keys."""

    name: str
    data: str
    configuration: str
    batch_size: int | None
    downsample: int
    patch_size: list[int] | None
    features: int | None
    n_stages: int | None
    validation_patients: int
    patient_pattern: str


@dataclass(frozen=True)
class Arm:
    """A network, its pretraining and its schedule, complete: the study's common values are merged into it."""

    name: str
    trainer: str
    planner: str
    kaf: Mapping[str, Any]
    pretraining: Mapping[str, Any] | None
    training: Mapping[str, Any]
    tasks: tuple[str, ...]
    labelled: tuple[int | str, ...]
    note: str
    earlier: bool

    @property
    def network(self) -> str:
        """Of kaf-pretrain."""
        return "kaf" if self.trainer in KAF_TRAINERS else "plain"

    def definition(self) -> dict[str, Any]:
        """What decides about a run: JSON types, without the name, and where it takes part."""
        return {key: getattr(self, key) for key in _ARM if key not in _NOT_OF_A_RUN}


@dataclass(frozen=True)
class Study:
    """Everything that a config file says, and its name."""

    name: str
    comment: str
    conclusion: str
    device: str
    seed: int
    labelled: tuple[int | str, ...]
    draws: Mapping[int | str, int]
    test_share: float
    epochs: int
    iterations: int
    validation_iterations: int
    augmentation_processes: int
    compile: bool
    mirror_predictions: bool
    pretraining_seeds: int
    baseline: str
    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]

    def setting(self, task: Task) -> dict[str, Any]:
        """What all runs of a table have in common, JSON types."""
        names = ("device", "seed", "test_share", "epochs", "iterations", "validation_iterations")
        more = ("augmentation_processes", "compile", "mirror_predictions")
        task_keys = ("name", *_TASK)
        return {**{n: getattr(self, n) for n in names + more}, "task": {n: getattr(task, n) for n in task_keys}}


def digest(value: Any) -> str:
    """SHA-256 of JSON types, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Study:
    """Read a config file.

    Raises:
        KAFError: Naming the file, the key, what was found and what is expected.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise KAFError(f"--config {path} cannot be read ({error}). Name an existing file.") from error
    except json.JSONDecodeError as error:
        raise KAFError(f"{path} is not valid JSON ({error}). Correct the file.") from error
    try:
        return _study(path.stem, content)
    except KAFError as error:
        raise KAFError(f"{path}: {error}") from error


def _study(name: str, content: Any) -> Study:
    block = read_block(content, _STUDY, "")
    tasks = tuple(Task(n, **read_block(b, _TASK, f"tasks.{_name(n, 'tasks')}.")) for n, b in block["tasks"].items())
    _training(block["training"], "training")
    arms = tuple(_arm(n, b, block, tasks) for n, b in block["arms"].items())
    if len([m for m in block["labelled"] if m != ALL]) > 1:
        numbers = [m for m in block["labelled"] if m != ALL]
        if numbers != sorted(numbers):
            raise KAFError(f"labelled: found {block['labelled']}, expected ascending numbers. Sort them.")
    if isinstance(block["draws"], dict) and set(block["draws"]) != set(map(str, block["labelled"])):
        found = f"found the keys {list(block['draws'])}, expected {list(map(str, block['labelled']))}"
        raise KAFError(f"draws: {found}, those of labelled. Correct them.")
    block["draws"] = {
        number: block["draws"][str(number)] if isinstance(block["draws"], dict) else block["draws"]
        for number in block["labelled"]
    }
    if block["baseline"] not in block["arms"]:
        found = f"found {block['baseline']!r}, expected one of {', '.join(block['arms'])}"
        raise KAFError(f"baseline: {found}: the arm that all others are compared with. Correct it.")
    merged = {k: v for k, v in block.items() if k not in ("training", "pretraining", "tasks", "arms", "labelled")}
    return Study(name=name, labelled=tuple(block["labelled"]), tasks=tasks, arms=arms, **merged)


def _arm(name: str, content: Any, study: Mapping[str, Any], tasks: tuple[Task, ...]) -> Arm:
    where = f"arms.{_name(name, 'arms')}."
    block = read_block(content, _ARM, where)
    _training(block["training"], f"{where}training")
    block["training"] = {**study["training"], **block["training"]}
    if block["kaf"] and block["trainer"] not in KAF_TRAINERS:
        raise KAFError(f"{where}kaf: found with trainer {block['trainer']!r}, expected trainer kaf. Remove one.")
    own = [key for key in block["training"] if key in SEMI_ATTRIBUTES]
    if own and block["trainer"] not in SEMI_TRAINERS:
        found = f"found with trainer {block['trainer']!r}, expected trainer semi or kaf_semi"
        raise KAFError(f"{where}training.{own[0]}: {found}. Remove one.")
    _checked(f"{where}kaf", lambda: KAFConfig.from_dict(block["kaf"]))
    known = [task.name for task in tasks]
    if block["tasks"] is not None and not set(block["tasks"]) <= set(known):
        raise KAFError(f"{where}tasks: found {block['tasks']}, expected some of {known}.")
    block["tasks"] = tuple(known if block["tasks"] is None else block["tasks"])
    every = study["labelled"]
    own = every if block["labelled"] is None else block["labelled"]
    if not own or any(number not in every for number in own):
        raise KAFError(f"{where}labelled: found {own}, expected some of {every}.")
    block["labelled"] = tuple(number for number in every if number in own)
    if block["trainer"] == "primus":
        flat = [task.name for task in tasks if task.name in block["tasks"] and task.configuration == "2d"]
        if flat or block["pretraining"] is not None:
            found = f"2d task(s) {flat}" if flat else "pretraining"
            raise KAFError(f"{where}trainer: found primus with {found}; it is for 3D tasks, from scratch.")
        if block["training"].get("warmup_epochs", 1) < 1:
            raise KAFError(f"{where}training.warmup_epochs: found 0, expected 1 or more for primus.")
    arm = Arm(name, **block)
    if arm.pretraining is not None:
        options = {**study["pretraining"], **arm.pretraining}
        fixed = [key for key in _FIXED if key in options]
        if fixed:
            raise KAFError(f"{where}pretraining.{fixed[0]}: the study sets it itself. Remove it.")
        preset = options.pop("preset", "kaf")
        check = {**options, "network": arm.network}
        _checked(f"{where}pretraining", lambda: PretrainConfig.from_preset(preset, check))
        arm = Arm(**{**arm.__dict__, "pretraining": {"preset": preset, **options}})
    return arm


def _training(block: Mapping[str, Any], where: str) -> None:
    for key, value in block.items():
        if key not in ATTRIBUTES:
            raise KAFError(f"{where}.{key}: unknown key; known are {', '.join(ATTRIBUTES)}. Correct the spelling.")
        if key == "predict_with":
            if value not in ("student", "teacher"):
                raise KAFError(f"{where}.{key}: found {value!r}, expected student or teacher.")
            continue
        epochs = key == "warmup_epochs"
        if isinstance(value, bool) or not isinstance(value, int if epochs else (int, float)) or value < 0:
            expected = "a whole number of epochs, 0 or more" if epochs else "a number, 0 or more"
            raise KAFError(f"{where}.{key}: found {value!r}, expected {expected}.")


def _name(name: str, where: str) -> str:
    if not _NAME.fullmatch(name):
        raise KAFError(f"{where}.{name}: expected a name of letters, digits and underscores. Rename it.")
    return name


def _checked(where: str, make: Callable[[], object]) -> None:
    try:
        make()
    except KAFError as error:
        raise KAFError(f"{where}: {error}") from error
