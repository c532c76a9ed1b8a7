"""Which unlabelled images a training uses. No label is opened here: only names, and images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing
from nnunetv2_kaf.splits import PATIENT_PATTERN
from pretraining.data.case import Case
from pretraining.data.images import PreprocessedImages
from pretraining.data.patients import split_by_patients
from pretraining.data.preprocess import cached_file
from pretraining.task import Task, resolve_task
from semisupervised.pretraining_images import PretrainingRun, find_run, images_of_run, is_of, patient_pattern
from semisupervised.sampling import Images
from semisupervised.unlabelled_list import list_file, listed_pattern, prepare, read_list

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
        """Primitives, for a checkpoint: a continued training uses the same images, also if the dataset has moved."""
        dataset = self.images.folder.parent
        return {
            "folder": self.images.folder.name,
            "command": self.images.command,
            "cases": list(self.images.cases),
            "further": {case: path.relative_to(dataset).as_posix() for case, path in self.images.further.items()},
            "origin": self.origin,
            "labelled": self.labelled,
            "left_out": self.left_out,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dataset_folder: Path) -> Unlabelled:
        """Read what `state_dict` returned.

        Args:
            state: The state; one of an earlier version has absolute paths.
            dataset_folder: `$nnUNet_preprocessed/DatasetXXX` of today.

        Raises:
            KAFError: An image is gone.
        """
        folder, further, again = dataset_folder / state["folder"], dict[str, Path](), 0
        for case, relative in state["further"].items():
            path = further[case] = dataset_folder / relative
            if not path.is_file():  # its name changes with the time of the raw file
                found = cached_file(path.parents[1], Case.of(case))
                further[case], again = found or path, again + (found is not None)
        images = Images(folder, state["command"], tuple(state["cases"]), further)
        origin = state["origin"] + (f" ({again} of them preprocessed again since then)" if again else "")
        reader = images.open()
        missing = [case for case in images.cases if not reader.path(case).is_file()]
        if missing:
            raise KAFError(
                f"{len(missing)} unlabelled image(s) that this training began with are gone: "
                f"{', '.join(str(reader.path(case)) for case in missing[:5])}. Restore them (preprocess again), or "
                "start a new training."
            )
        return cls(images, origin, int(state["labelled"]), dict(state["left_out"]))

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
    place = (training.dataset_name, training.plans_name, training.configuration, training.fold)
    run = find_run(training.pretraining, *place)
    if chosen:
        images, origin = _chosen(task, training, chosen, num_workers), f"{VARIABLE}={chosen}"
    else:
        images, origin = _default(task, training, run, read_list(task))
    known = (None if run is None else patient_pattern(run), listed_pattern(task))
    patterns = dict.fromkeys(pattern for pattern in known if pattern is not None) or (PATIENT_PATTERN,)
    kept, left_out = list(images.cases), dict[str, list[str]]()
    for pattern in patterns:
        kept, out = split_by_patients(kept, training.validation, pattern)
        for source, names in out.items():
            left_out.setdefault(source, []).extend(names)
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


def _default(
    task: Task, training: Training, run: PretrainingRun | None, listed: Mapping[str, Path] | None
) -> tuple[Images, str]:
    """The images of the pretraining and those that kaf-unlabelled has listed, together, and their origin.

    A pretraining on another dataset has none that fit, which is no error if there is a list.

    Raises:
        KAFError: There is neither.
    """
    cases: list[str] = []
    further: dict[str, Path] = {}
    origins = []
    if run is not None and (listed is None or is_of(task, run)):
        used = images_of_run(task, run)
        cases, further = list(used.cases), dict(used.further)
        origins.append(f"the images of the pretraining {run.path}")
    if listed is not None:
        cases += [case for case in listed if case not in further]
        further |= listed
        origins.append(f"the list of kaf-unlabelled, {list_file(task)}")
    if not origins:
        raise _none(
            training,
            f"{VARIABLE} is not set, kaf-unlabelled has listed none, and no finished pretraining is in {task.folder}",
        )
    return Images(task.image_folder, task.preprocess_command, tuple(cases), further), " and ".join(origins)


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


def write_record(folder: Path, unlabelled: Unlabelled) -> None:
    """Write which images a training uses beside its checkpoints."""
    with replacing(folder / RECORD_FILE) as file:
        file.write_text(json.dumps(unlabelled.to_dict(), indent=2) + "\n")
