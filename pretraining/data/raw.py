"""Further sources of images: folders of raw, unlabelled images in nnU-Net's naming. Only names are read here."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.safe_load import read_json
from pretraining.data.bad_images import BadImages
from pretraining.data.case import Case
from pretraining.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawSource:
    """A folder of raw images.

    Attributes:
        key: Readable name and a hash of the folder's place; the prefix of the identifiers.
        folder: The folder; never written.
        cases: Image files by case, in the order of their channels.
    """

    key: str
    folder: Path
    cases: Mapping[str, tuple[Path, ...]]

    @property
    def identifiers(self) -> list[str]:
        """Identifiers that are unique over all sources: `<key>/<case>`."""
        return [Case(self.key, case).identifier for case in self.cases]

    def restricted(self, identifiers: Sequence[str]) -> RawSource:
        """The source with some of its cases only."""
        wanted = set(identifiers)
        kept = {name: files for name, files in self.cases.items() if Case(self.key, name).identifier in wanted}
        return replace(self, cases=kept)


def find_sources(
    task: Task, extra_datasets: Sequence[str], folders: Sequence[Path], bad: BadImages
) -> tuple[RawSource, ...]:
    """List the cases of all further sources.

    Args:
        task: The first dataset; its dataset.json names the file ending of `folders`.
        extra_datasets: Numbers or names of datasets in `$nnUNet_raw`, whose imagesTr are used.
        folders: Folders of images.
        bad: Collects image files with wrong names.

    Raises:
        KAFError: A dataset or folder does not exist, has no image, or is the first dataset's own.
    """
    first_ending = _file_ending(task.dataset_folder / "dataset.json")
    places: dict[Path, tuple[str, Path, str]] = {}
    for dataset in extra_datasets:
        raw = _raw_dataset(dataset)
        ending = _file_ending(raw / "dataset.json")
        _add_place(places, task, raw.name, raw / "imagesTr", ending, f"--dataset {dataset}")
    for folder in folders:
        _add_place(places, task, folder.resolve().name, folder, first_ending, f"--images {folder}")
    return tuple(
        RawSource(_key(name, resolved), folder, _list_cases(folder, ending, bad))
        for resolved, (name, folder, ending) in places.items()
    )


def _add_place(
    places: dict[Path, tuple[str, Path, str]], task: Task, name: str, folder: Path, ending: str, option: str
) -> None:
    """Add a folder unless it is there already.

    Raises:
        KAFError: The folder does not exist or is the first dataset's own.
    """
    if not folder.is_dir():
        raise KAFError(f"{option}: found no folder {folder}; expected a folder of images such as case_0000{ending}.")
    resolved = folder.resolve()
    own = Path(os.environ.get("nnUNet_raw", "")) / task.dataset_name / "imagesTr"  # noqa: SIM112 - nnU-Net's spelling
    if resolved == own.resolve() or name == task.dataset_name:
        raise KAFError(
            f"{option}: {folder} holds the images of {task.dataset_name}, the first dataset, which are used anyway. "
            "Leave this option out."
        )
    if resolved in places:
        logger.warning("%s: the folder is given twice; its images are used once.", option)
        return
    places[resolved] = (name, folder, ending)


def _key(name: str, resolved: Path) -> str:
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name) or "images"
    return f"{readable}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:8]}"


def _list_cases(folder: Path, ending: str, bad: BadImages) -> dict[str, tuple[Path, ...]]:
    """Group the image files of a folder by case.

    Files whose ending belongs to images of the same kind, but whose name is not nnU-Net's, are bad; all other files are
    ignored.

    Raises:
        KAFError: There is no image at all.
    """
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    image_endings = _image_endings(ending)
    cases: dict[str, list[Path]] = {}
    ignored = misnamed = 0
    for name in sorted(os.listdir(folder)):
        hidden = name.startswith(".")
        match = pattern.fullmatch(name)
        if match and not hidden:
            cases.setdefault(match.group(1), []).append(folder / name)
        elif name.lower().endswith(image_endings) and not hidden and not (folder / name).is_dir():
            misnamed += 1
            bad.add(folder / name, "an image file of this name", f"case_0000{ending} (case, channel, ending)")
        else:
            ignored += 1
    if not cases and not misnamed:
        raise KAFError(
            f"{folder} holds no image: found {ignored} other file(s) or folder(s), expected names such as "
            f"case_0000{ending}. Subfolders are not searched; name the folder that holds the files."
        )
    if ignored:
        logger.info("%s: %d file(s) or folder(s) that are no images are ignored.", folder, ignored)
    return {case: tuple(files) for case, files in cases.items()}


def _image_endings(ending: str) -> tuple[str, ...]:
    """Endings of the same kind: volumes or pictures. A picture among volumes is a preview, not an image of the set."""
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    found = {ending.lower()}
    for reader in LIST_OF_IO_CLASSES:
        if ending.lower() in reader.supported_file_endings:
            found.update(reader.supported_file_endings)
    return tuple(found)


def _raw_dataset(dataset: str) -> Path:
    """The folder of a dataset in `$nnUNet_raw`.

    Raises:
        KAFError: The variable is not set, or no (or more than one) dataset fits.
    """
    value = os.environ.get("nnUNet_raw")  # noqa: SIM112 - nnU-Net's own spelling
    if not value or not Path(value).is_dir():
        raise KAFError(
            f"--dataset {dataset}: the raw images of further datasets are needed, but nnUNet_raw is "
            f"{value or 'not set'}; expected the folder of the raw datasets."
        )
    existing = sorted(p for p in Path(value).iterdir() if re.match(r"Dataset\d{3}_", p.name) and p.is_dir())
    fitting = [p for p in existing if p.name == dataset or (dataset.isdecimal() and int(p.name[7:10]) == int(dataset))]
    if len(fitting) != 1:
        found = ", ".join(p.name for p in fitting or existing) or "none"
        problem = "is ambiguous" if fitting else "not found"
        raise KAFError(f"--dataset {dataset} {problem} in {value}; found: {found}. Give the full name of one of them.")
    return fitting[0]


def _file_ending(dataset_json: Path) -> str:
    """The ending of a dataset's image files.

    Raises:
        KAFError: dataset.json is missing or damaged.
    """
    fix = "Restore nnU-Net's dataset.json."
    content = read_json(dataset_json, fix)
    ending = content.get("file_ending") if isinstance(content, dict) else None
    if not isinstance(ending, str) or not ending.startswith("."):
        raise KAFError(f"{dataset_json}: file_ending is {ending!r}; expected an ending such as .nii.gz. {fix}")
    return ending
