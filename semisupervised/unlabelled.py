"""Which unlabelled images a training uses. No label is opened here: only names, and images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing
from nnunetv2_kaf.plans import pretraining_folder
from nnunetv2_kaf.safe_load import read_json
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.config import PretrainConfig
from pretraining.data.bad_images import BadImages
from pretraining.data.images import PreprocessedImages
from pretraining.data.patients import split_by_patients
from pretraining.data.preprocess import cache_folder, preprocess_source
from pretraining.data.raw import find_sources
from pretraining.task import Task, resolve_task
from semisupervised.sampling import Images

VARIABLE = "KAF_UNLABELLED"
RECORD_FILE = "semi_unlabelled.json"


@dataclass(frozen=True)
class Training:
    """The training that asks for unlabelled images.

    Attributes:
        dataset_name: DatasetXXX_Name.
        configuration: 2d, 3d_fullres, ...
        plans_name: Name of the plans.
        network: "kaf" or "plain", what the plans are used for.
        fold: Fold number or "all".
        train: Labelled cases of the fold.
        validation: Cases of the fold that must not be seen; none with fold "all".
        pretraining: Checkpoint whose images are the default.
    """

    dataset_name: str
    configuration: str
    plans_name: str
    network: str
    fold: int | str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    pretraining: Path | None


@dataclass(frozen=True)
class Unlabelled:
    """Unlabelled images, and where they come from.

    Attributes:
        images: Images to draw patches from.
        origin: Origin in words.
        labelled: How many of them are labelled cases of the fold too (their labels are not used here).
        left_out: Cases of validation patients, by source.
    """

    images: Images
    origin: str
    labelled: int
    left_out: dict[str, list[str]]

    def state_dict(self) -> dict[str, Any]:
        """Primitives, for a checkpoint: a continued training uses the same images."""
        return {
            "folder": str(self.images.folder),
            "command": self.images.command,
            "cases": list(self.images.cases),
            "further": {case: str(path) for case, path in self.images.further.items()},
            "origin": self.origin,
            "labelled": self.labelled,
            "left_out": self.left_out,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Unlabelled:
        """Read what `state_dict` returned.

        Raises:
            KAFError: An image is gone.
        """
        further = {case: Path(path) for case, path in state["further"].items()}
        images = Images(Path(state["folder"]), state["command"], tuple(state["cases"]), further)
        reader = images.open()
        missing = [case for case in images.cases if not reader.path(case).is_file()]
        if missing:
            raise KAFError(
                f"{len(missing)} unlabelled image(s) that this training began with are gone: "
                f"{', '.join(str(reader.path(case)) for case in missing[:5])}. Restore them (preprocess again), or "
                "start a new training."
            )
        return cls(images, state["origin"], int(state["labelled"]), dict(state["left_out"]))

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        images = self.images
        return {
            "origin": self.origin,
            "count": len(images.cases),
            "of_these_labelled_in_this_fold": self.labelled,
            "left_out_as_validation_patients": self.left_out,
            "cases": {
                case: str(images.further[case]) if case in images.further else str(images.folder / case)
                for case in images.cases
            },
        }


def find_unlabelled(training: Training, num_workers: int = 1) -> Unlabelled:
    """Find the images, and preprocess those of folders and further datasets that are not.

    Args:
        training: What they are for.
        num_workers: Images at a time that are preprocessed.

    Raises:
        KAFError: There are none, or one cannot be used.
    """
    task = resolve_task(training.dataset_name, training.configuration, training.plans_name, training.network)
    chosen = os.environ.get(VARIABLE, "").strip()
    pretraining = _pretraining(training)
    if chosen:
        images, origin = _chosen(task, training, chosen, num_workers), f"{VARIABLE}={chosen}"
    else:
        images, origin = _default(task, training, pretraining)
    kept, left_out = split_by_patients(images.cases, training.validation, _patient_pattern(pretraining))
    if not kept:
        raise _none(training, f"{origin} names {len(images.cases)} image(s), all of validation patients of the fold")
    further = {case: path for case, path in images.further.items() if case in set(kept)}
    labelled = len(set(kept) & set(training.train))
    return Unlabelled(Images(images.folder, images.command, tuple(kept), further), origin, labelled, left_out)


def _none(training: Training, why: str) -> KAFError:
    return KAFError(
        f"no unlabelled image for {training.dataset_name}, {training.configuration}, fold {training.fold}: {why}. Set "
        f"{VARIABLE} to folders of images (case_0000.nii.gz, ...) or datasets, separated by {os.pathsep!r}; or run "
        f"kaf-unlabelled --dataset {training.dataset_name} --images DIR; or run kaf-pretrain, whose images are used by "
        "default; or train without unlabelled images: nnUNetTrainerKAF, nnUNetTrainer."
    )


def _default(task: Task, training: Training, pretraining: tuple[Path, dict[str, Any]] | None) -> tuple[Images, str]:
    """The images of the pretraining and those that kaf-unlabelled has listed, together, and their origin.

    Raises:
        KAFError: There is neither.
    """
    cases: list[str] = []
    further: dict[str, Path] = {}
    origins = []
    if pretraining is not None:
        used = _of_pretraining(task, *pretraining)
        cases, further = list(used.cases), dict(used.further)
        origins.append(f"the images of the pretraining {pretraining[0]}")
    if list_file(task).is_file():
        listed = read_list(task)
        cases += [case for case in listed if case not in further]
        further |= listed
        origins.append(f"the list of kaf-unlabelled, {list_file(task)}")
    if not origins:
        raise _none(
            training,
            f"{VARIABLE} is not set, kaf-unlabelled has listed none, and no finished pretraining is in {task.folder}",
        )
    return Images(task.image_folder, task.preprocess_command, tuple(cases), further), " and ".join(origins)


def _pretraining(training: Training) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint whose images are the default, and what it says about its run.

    It is the one that the training loads, or else one at the standard place, of either network.
    """
    candidates = [training.pretraining] if training.pretraining is not None else []
    for kind in ("KAFPretraining", "PlainPretraining"):
        for fold in (training.fold, "all"):
            place = (training.dataset_name, training.plans_name, training.configuration, fold, kind)
            candidates.append(pretraining_folder(*place) / "checkpoint_final.pth")
    for path in candidates:
        if path.is_file():
            return path, dict(read_checkpoint(path)["pretraining"])
    return None


def _patient_pattern(pretraining: tuple[Path, dict[str, Any]] | None) -> str:
    """The pattern that finds the patient in a case: the pretraining's, or the default."""
    config = pretraining[1].get("config", {}) if pretraining else {}
    return str(config.get("patient_pattern", PretrainConfig().patient_pattern))


def _of_pretraining(task: Task, path: Path, run: Mapping[str, Any]) -> Images:
    """The images of a pretraining run, which are all preprocessed.

    Raises:
        KAFError: They are of another dataset, or a file is gone.
    """
    theirs = (run.get("dataset"), run.get("configuration"))
    if theirs != (task.dataset_name, task.configuration):
        raise KAFError(
            f"the pretraining {path} used images of {theirs}, this training is of "
            f"{(task.dataset_name, task.configuration)}: their preprocessed files do not fit. Name the unlabelled "
            f"images with {VARIABLE} (folders or datasets)."
        )
    own = set(PreprocessedImages(task.image_folder, task.preprocess_command).identifiers)
    cases = run.get("cases")
    if not isinstance(cases, list) or not cases or not all(isinstance(case, str) for case in cases):
        raise KAFError(
            f"the pretraining {path} does not say which images it used (expected a list of cases). Run kaf-pretrain "
            f"again, or name the unlabelled images with {VARIABLE}."
        )
    further = {case: _cached(task, case) for case in cases if "/" in case}
    missing = [case for case in cases if case not in further and case not in own]
    missing += [case for case, file in further.items() if file is None]
    if missing:
        raise KAFError(
            f"{len(missing)} of {len(cases)} preprocessed images that the pretraining {path} used are gone from "
            f"{task.image_folder.parent}: {', '.join(missing[:5])}. Run the same kaf-pretrain command again with "
            f"--continue, or name the unlabelled images with {VARIABLE}."
        )
    return Images(
        task.image_folder,
        task.preprocess_command,
        tuple(cases),
        {case: file for case, file in further.items() if file is not None},
    )


def _cached(task: Task, identifier: str) -> Path | None:
    """The preprocessed file of `<source>/<case>`."""
    source, _, case = identifier.rpartition("/")
    folder = cache_folder(task) / source
    pattern = re.compile(rf"{re.escape(case)}-[0-9a-f]{{16}}\.b2nd")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _chosen(task: Task, training: Training, text: str, num_workers: int) -> Images:
    """The images that the variable names.

    Raises:
        KAFError: An entry is neither a dataset nor a folder, or an image cannot be used.
    """
    own, datasets, folders = False, [], []
    for entry in (part.strip() for part in text.split(os.pathsep)):
        if entry == task.dataset_name or (entry.isdigit() and int(entry) == task.dataset_id):
            own = True
        elif entry.isdigit() or re.fullmatch(r"Dataset\d{3}_\w+", entry):
            datasets.append(entry)
        elif entry:
            folders.append(Path(entry).expanduser())
    cases: list[str] = []
    if own:
        every = PreprocessedImages(task.image_folder, task.preprocess_command).identifiers
        cases = sorted(set(every) - set(training.train) - set(training.validation))
    further: dict[str, Path] = {}
    if datasets or folders:
        try:
            further = prepare(task, datasets, folders, num_workers, training.validation)
        except KAFError as error:
            names = " ".join(str(folder) for folder in folders) or "DIR"
            raise KAFError(
                f"{error}\n({VARIABLE}={text}. --skip-bad is an option of kaf-unlabelled --dataset {task.dataset_id} "
                f"--images {names}, whose list is used where {VARIABLE} is not set.)"
            ) from error
    if not cases and not further:
        raise _none(training, f"{VARIABLE}={text} names none")
    return Images(task.image_folder, task.preprocess_command, (*cases, *further), further)


def prepare(
    task: Task,
    datasets: Sequence[str],
    folders: Sequence[Path],
    num_workers: int,
    without: Sequence[str] = (),
    skip_bad: bool = False,
) -> dict[str, Path]:
    """Check and preprocess the images of further sources, as kaf-pretrain does; what is done already is kept.

    Args:
        task: Task whose plans are used.
        datasets: Numbers or names, of which imagesTr is used.
        folders: Folders in nnU-Net's naming.
        num_workers: Images at a time.
        without: Cases whose patients are left out.
        skip_bad: Warn of images that cannot be used instead of stopping.

    Returns:
        File by identifier `<source>/<case>`.

    Raises:
        KAFError: A source is missing, or images cannot be used; all of them are listed.
    """
    bad = BadImages()
    further: dict[str, Path] = {}
    for source in find_sources(task, datasets, folders, bad):
        kept, _ = split_by_patients(source.identifiers, without, PretrainConfig().patient_pattern)
        further.update(preprocess_source(task, source.restricted(kept), bad, num_workers))
    bad.finish(skip_bad)
    return further


def list_file(task: Task) -> Path:
    """Where kaf-unlabelled lists the images: beside them, for all plans that preprocess alike."""
    return cache_folder(task) / "unlabelled.json"


def write_list(task: Task, files: Mapping[str, Path]) -> Path:
    """List prepared images; an earlier list is replaced.

    Args:
        task: dataset, plans and configuration.
        files: Files from `prepare`.

    Returns:
        The list's file.
    """
    path, root = list_file(task), cache_folder(task)
    with replacing(path) as file:
        content = {case: image.relative_to(root).as_posix() for case, image in files.items()}
        file.write_text(json.dumps({"images": content}, indent=2) + "\n")
    return path


def read_list(task: Task) -> dict[str, Path]:
    """Read a list of `write_list`.

    Raises:
        KAFError: The file is damaged, or an image of it is gone.
    """
    path, root = list_file(task), cache_folder(task)
    fix = f"Run kaf-unlabelled --dataset {task.dataset_id} --images DIR -p {task.plans_name} again, or delete the list."
    content = read_json(path, fix)
    images = content.get("images") if isinstance(content, dict) else None
    names = images.values() if isinstance(images, dict) else [None]
    if not images or not all(isinstance(name, str) for name in names):
        raise KAFError(f'{path}: expected {{"images": {{case: file}}}}, as kaf-unlabelled writes it. {fix}')
    files = {str(case): root / name for case, name in images.items()}
    missing = [
        str(file) for file in files.values() if not file.is_file() or not file.resolve().is_relative_to(root.resolve())
    ]
    if missing:
        raise KAFError(f"{path}: {len(missing)} of {len(files)} images are gone: {', '.join(missing[:3])}. {fix}")
    return files


def write_record(folder: Path, unlabelled: Unlabelled) -> None:
    """Write which images a training uses beside its checkpoints."""
    with replacing(folder / RECORD_FILE) as file:
        file.write_text(json.dumps(unlabelled.to_dict(), indent=2) + "\n")
