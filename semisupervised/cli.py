"""`kaf-unlabelled`: prepare, check and list unlabelled images once, for all trainings on a dataset."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnunetv2_kaf import console
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.splits import PATIENT_PATTERN

if TYPE_CHECKING:
    from pretraining.task import Task

PROGRAM = "kaf-unlabelled"


def build_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Preprocess unlabelled images with the plans of a dataset, check and list them. "
        "nnUNetTrainerKAFSemi and nnUNetTrainerSemi then use the list; kaf-pretrain --images with the same folders "
        "finds the images preprocessed. No label is opened.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-d",
        "--dataset",
        required=True,
        nargs="+",
        metavar="DATASET",
        help="dataset number or name whose plans are used; of further ones the raw training images are listed",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        type=console.path,
        metavar="DIR",
        help="folders of unlabelled images in nnU-Net's naming (case_0000.nii.gz)",
    )
    parser.add_argument(
        "-c",
        "--configuration",
        nargs="+",
        metavar="NAME",
        help="configurations, e.g. 2d 3d_fullres (default: all of the plans whose images nnU-Net has preprocessed)",
    )
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="plans name (default: nnUNetPlans)")
    parser.add_argument(
        "--patient-pattern",
        default=PATIENT_PATTERN,
        metavar="PATTERN",
        help="regular expression whose first group is the patient in a case identifier (the whole identifier where it "
        "does not match); the trainers leave out all scans of their validation patients by it (default: %(default)s)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="go on without images that cannot be used")
    workers = max(1, min(8, (os.cpu_count() or 2) - 1))
    parser.add_argument("--num-workers", type=int, default=workers, help=f"images at a time (default here: {workers})")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    console.prepare_streams()
    parsed = build_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pretraining").setLevel(logging.INFO)
    return console.run(PROGRAM, lambda: console.say(_run(parsed)), "the same command goes on where it stopped.")


def _run(parsed: argparse.Namespace) -> str:
    """Prepare the images of every configuration, and return the lists in words."""
    if parsed.num_workers < 1:
        raise KAFError(f"--num-workers is {parsed.num_workers}; expected 1 or more.")
    dataset, *others = parsed.dataset
    if not parsed.images and not others:
        raise KAFError("there is nothing to prepare: give folders with --images, or further datasets with --dataset.")
    from pretraining.config import PretrainConfig
    from semisupervised.unlabelled_list import prepare, write_list

    pattern = PretrainConfig(patient_pattern=parsed.patient_pattern).patient_pattern  # checked there

    text = []
    for task in _tasks(dataset, parsed.plans, parsed.configuration):
        files = prepare(task, others, parsed.images, parsed.num_workers, skip_bad=parsed.skip_bad)
        if not files:
            raise KAFError("all images were skipped as bad (see the warnings above).")
        path = write_list(task, files, pattern)
        lines = [f"  {identifier}: {file}" for identifier, file in files.items()]
        text += [f"{task.dataset_name}, {task.configuration}: {len(files)} unlabelled images, listed in {path}", *lines]
    text.append(
        f"Next:       nnUNetv2_train {dataset} {task.configuration} FOLD -tr nnUNetTrainerKAFSemi -p {parsed.plans}"
    )
    return "\n".join(text)


def _tasks(dataset: str, plans_name: str, configurations: Sequence[str] | None) -> list[Task]:
    """The configurations asked for, or all that are preprocessed and no cascade's second stage.

    Raises:
        KAFError: There is none.
    """
    from nnunetv2_kaf.plans import is_kaf, read_plans
    from pretraining.task import find_dataset, resolve_task

    folder = find_dataset(dataset)
    file = folder / f"{plans_name}.json"
    if configurations is None and not file.is_file():
        found = ", ".join(sorted(path.stem for path in folder.glob("*Plans*.json"))) or "none"
        raise KAFError(f"Plans {plans_name} not found for {folder.name} ({file}); found: {found}. Choose with -p.")
    names = configurations or list(read_plans(file)["configurations"])
    tasks = []
    for name in names:
        try:
            network = "kaf" if file.is_file() and is_kaf(read_plans(file), name) else "plain"
            task = resolve_task(dataset, name, plans_name, network)
        except KAFError:
            if configurations is not None:
                raise
            continue
        if configurations is not None or task.image_folder.is_dir():
            tasks.append(task)
    if not tasks:
        raise KAFError(
            f"no configuration of {plans_name} is preprocessed for {folder.name}. Run: nnUNetv2_plan_and_preprocess -d "
            f"{int(folder.name[7:10])}"
        )
    return tasks


if __name__ == "__main__":
    sys.exit(main())
