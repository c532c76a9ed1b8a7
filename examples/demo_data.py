"""The data of the demo: phantoms, or the user's own dataset with some labelled cases held out for testing.

Nothing is ever written into the user's folder; the demo's own raw dataset links to its files.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import phantoms

from nnunetv2_kaf.errors import KAFError

PHANTOM_NAME = "Dataset900_KAFPhantom"
# A training step of these takes under a second on two cores.
PHANTOM_CONFIG = phantoms.PhantomConfig(training=10, test=4, shape=(12, 40, 40))
TEST_FRACTION, MAX_TEST_CASES, SEED = 0.2, 20, 0


@dataclass(frozen=True)
class Case:
    """A labelled case: the image file of each channel, in order, and its reference."""

    images: tuple[Path, ...]
    label: Path


def dataset_id(name: str) -> str:
    """The number in `DatasetXXX_Name`, without leading zeros.

    Raises:
        KAFError: `name` is not of that form.
    """
    match = re.fullmatch(r"Dataset(\d{3})_.+", name)
    if match is None:
        raise KAFError(f"DATA: the folder is named {name!r}, expected DatasetXXX_Name with three digits. Rename it.")
    return str(int(match.group(1)))


def _expand(folder: Path, path: str) -> Path:
    return folder / os.path.expandvars(path)  # an absolute path stays absolute


def read_cases(folder: Path, content: dict[str, Any]) -> dict[str, Case]:
    """List the labelled cases of a raw dataset, also where `dataset.json` lists the files itself.

    Raises:
        KAFError: There is no labelled case.
    """
    ending = content["file_ending"]
    if "dataset" in content:
        return {
            name: Case(tuple(_expand(folder, image) for image in entry["images"]), _expand(folder, entry["label"]))
            for name, entry in content["dataset"].items()
        }
    cases: dict[str, Case] = {}
    for label in sorted((folder / "labelsTr").glob(f"*{ending}")):
        identifier = label.name.removesuffix(ending)
        pattern = re.compile(re.escape(identifier) + r"_\d{4}" + re.escape(ending))
        images = (p for p in (folder / "imagesTr").glob(f"{identifier}_*{ending}") if pattern.fullmatch(p.name))
        cases[identifier] = Case(tuple(sorted(images)), label)
    complete = {identifier: case for identifier, case in cases.items() if case.images}
    if not complete:
        raise KAFError(
            f"DATA: {folder} has no labelled case; expected imagesTr/CASE_0000{ending} and labelsTr/CASE{ending}."
        )
    return complete


def group_cases(identifiers: Sequence[str]) -> list[list[str]]:
    """Group the cases that belong together, so that a split never separates two images of one patient.

    Cases belong together if they agree up to the last `_` (`patient001_frame01`, `patient001_frame12`). Where
    that leaves fewer than five groups the part before `_` names no patient (`hippocampus_001`) and each case stands
    alone.
    """
    groups: dict[str, list[str]] = {}
    for identifier in sorted(identifiers):
        groups.setdefault(identifier.rpartition("_")[0] or identifier, []).append(identifier)
    return list(groups.values()) if len(groups) >= 5 else [[identifier] for identifier in sorted(identifiers)]


def hold_out(groups: Sequence[Sequence[str]], seed: int = SEED) -> tuple[list[list[str]], list[str]]:
    """Draw the test cases group by group.

    Returns:
        The groups that stay for training and the test cases: a fifth of the groups, about 20 cases at most.

    Raises:
        KAFError: With fewer than six groups nnU-Net's five folds could not be made from the rest.
    """
    if len(groups) < 6:
        raise KAFError(f"DATA: found {len(groups)} independent labelled cases, expected at least 6 (1 test, 5 folds).")
    order = np.random.default_rng(seed).permutation(len(groups))
    wanted = min(math.ceil(TEST_FRACTION * len(groups)), len(groups) - 5)
    test: list[str] = []
    taken = set()
    for index in order[:wanted]:
        if test and len(test) + len(groups[index]) > MAX_TEST_CASES:
            break
        test.extend(groups[index])
        taken.add(int(index))
    return [list(group) for index, group in enumerate(groups) if index not in taken], sorted(test)


def make_splits(groups: Sequence[Sequence[str]], seed: int = SEED) -> list[dict[str, list[str]]]:
    """nnU-Net's `splits_final.json` with five folds of whole groups."""
    folds = np.array_split(np.random.default_rng(seed).permutation(len(groups)), 5)
    splits = []
    for fold in folds:
        inside = set(fold.tolist())
        val = [case for index, group in enumerate(groups) if index in inside for case in group]
        train = [case for index, group in enumerate(groups) if index not in inside for case in group]
        splits.append({"train": train, "val": val})
    return splits


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:  # file systems without links
        shutil.copy2(source, target)


def prepare_own_data(source: Path, raw: Path, preprocessed: Path) -> str:
    """Link a raw dataset into the demo's folders, a part of its labelled cases as test set.

    Writes grouped folds as well where cases share a patient; nnU-Net would split them case by case. `dataset.json`
    comes last: a folder that has it is complete.

    Raises:
        KAFError: `source` is no raw dataset, or too small.
    """
    source = source.expanduser().resolve()
    file = source / "dataset.json"
    if not file.is_file():
        raise KAFError(f"DATA: {file} does not exist; expected an nnU-Net raw dataset folder (DatasetXXX_Name).")
    content = json.loads(file.read_text(encoding="utf-8"))
    identifier, target = dataset_id(source.name), raw / source.name
    if (target / "dataset.json").is_file():
        return identifier
    cases = read_cases(source, content)
    groups = group_cases(list(cases))
    training, test = hold_out(groups)
    for split in ("Tr", "Ts"):
        for folder in ("images", "labels"):
            (target / f"{folder}{split}").mkdir(parents=True, exist_ok=True)
    ending = content["file_ending"]
    for name, case in cases.items():
        split = "Ts" if name in test else "Tr"
        for channel, image in enumerate(case.images):
            _link(image, target / f"images{split}" / f"{name}_{channel:04d}{ending}")
        _link(case.label, target / f"labels{split}" / f"{name}{ending}")
    if len(groups) < len(cases):
        (preprocessed / source.name).mkdir(parents=True, exist_ok=True)
        splits = json.dumps(make_splits(training), indent=2)
        (preprocessed / source.name / "splits_final.json").write_text(splits, encoding="utf-8")
    content = {key: value for key, value in content.items() if key != "dataset"}
    content["numTraining"] = len(cases) - len(test)
    (target / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return identifier


def prepare_phantoms(raw: Path) -> str:
    """Write the embedded phantoms if they are not there yet and return their dataset number."""
    if not (raw / PHANTOM_NAME / "dataset.json").is_file():
        phantoms.write_dataset(raw / PHANTOM_NAME, PHANTOM_CONFIG)
    return dataset_id(PHANTOM_NAME)
