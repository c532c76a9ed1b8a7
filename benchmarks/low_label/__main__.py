"""Segmentation with few labelled patients: a study that anyone can rerun.

    python -m benchmarks.low_label --config benchmarks/low_label/acdc.json --data <raw datasets> --work <scratch>
    python -m benchmarks.low_label --config benchmarks/low_label/acdc.json --data ... --work ... --on test
    python -m benchmarks.low_label --report

from the repository root, with the package and MONAI installed (`pip install -e . monai`). The first command trains
every arm with every number of labelled patients and every draw, and measures on the validation patients. The second
one measures on the test patients, once, after all trainings. The third one writes `docs/evidence.md` and the table of
`README.md` from the results.

The same command continues after an interruption: what is finished is not repeated, a training goes on from its last
checkpoint. A run that fails is reported at the end with its log, the others go on, and the exit code is 1. `--dry-run`
shows the grid, `--only plain,kaf_all` restricts the arms, `--jobs 2` does two trainings at once.

**Patients.** Drawn once with a seed and written to `splits.json`: a share for the test, measured once (`seen.py` counts
those whom earlier studies have used; the patients of studies whose results are removed stay in `removed.json`); some
for validation; of the others 2, 6, 10 or all are labelled, in several draws, which are the same for all arms and nested
within a draw. All images of a patient stay together. Pretraining sees the images of all training patients, and neither
those of the validation nor of the test patients; it keeps a few of its own for its curves. nnU-Net plans on training
and validation patients; for CT it takes the intensities of their labelled voxels.

**Runs** are those of the stock commands: nnUNetv2_plan_and_preprocess, kaf-pretrain, nnUNetv2_train, nnUNetv2_predict
and nnUNetv2_evaluate_folder. Every number of labelled patients and draw is a fold of `splits_final.json`. All arms have
the same number of iterations, batch, patch and augmentation, and are measured at their last checkpoint. The trainers
differ from nnU-Net's and ours in their length and seeds (`trainers.py` says what is paired). A plain network gets its
pretraining through nnU-Net's `-pretrained_weights`, which also takes the untrained decoder of the file; a KAF network
through `KAF_PRETRAINED`, encoder only.

**Config.** One JSON file; a mistake is reported with its key. `comment` and, once there are test results, `conclusion`
stand beside the table. `labelled`, `draws` (one number, or one for each in `labelled`), `epochs` x `iterations`,
`mirror_predictions` (false: no test-time augmentation, for speed); `tasks`: a raw dataset, its configuration,
`batch_size`, `downsample` in the plane, `patch_size`, `features` of the first stage, `n_stages`,
`validation_patients`, `patient_pattern`; `arms`, each with

- `trainer`: plain, kaf, semi, kaf_semi (nnUNetTrainerSemi and nnUNetTrainerKAFSemi, whose unlabelled images are those
  of the training patients that are not labelled in the run) or primus (3D only); `planner`: another planner of
  nnU-Net, such as nnUNetPlannerResEncM;
- `kaf`: options of the plans' kaf block; `pretraining`: options of kaf-pretrain, `preset` among them, or null;
- `training`: initial_lr, weight_decay, oversample_foreground_percent, warmup_epochs, and of the semi-supervised
  trainers confidence_threshold, teacher_decay, unlabelled_weight and the like;
- `tasks`, `labelled`: these only; `note`: what was concluded, for the table; `earlier`: true if the results are of an
  earlier form of the trainer; README and the head of the page then leave them out.

`training` and `pretraining` of the file hold for all arms, an arm's own values win. All arms are compared with
`baseline` (an arm; plain if there is none). With another one than plain, the table has one line per trial and says in
what it differs from the baseline.

**Results** are in `benchmarks/results/low_label/<config>/<task>/`: one JSON per run with every case, `splits.json`,
`validation.md` and `test.md`, figures, and `test_opened.json`, which records that the test set has been used. After
that, only the runs that it names can be measured on it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nnunetv2_kaf.errors import KAFError

from . import evidence, grid
from .config import Arm, Task, load
from .jobs import Job, Processes, processes, run_jobs
from .layout import RESULTS, Layout

T = TypeVar("T", Arm, Task)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 some runs failed, 2 bad input, 130 interrupted."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # A scheduler's SIGTERM ends the workers as Ctrl-C does, instead of leaving them behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(args)
    except KAFError as error:
        sys.stderr.write(f"low_label: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("low_label: interrupted; the same command continues.\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.low_label",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument("--config", type=Path, help="JSON file of the study")
    out.add_argument("--data", type=Path, help="folder with the raw datasets (default: $nnUNet_raw)")
    out.add_argument("--work", type=Path, help="scratch folder; kept, so that the study can continue")
    out.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    out.add_argument("--on", choices=grid.ONS, default="validation", help="patients to measure on")
    out.add_argument("--only", metavar="ARM,...", help="these arms only")
    out.add_argument("--tasks", metavar="TASK,...", help="these tasks only")
    out.add_argument("--jobs", type=int, default=1, help="trainings at once")
    out.add_argument("--threads", type=int, help="of torch, per job (default: cores divided by jobs)")
    out.add_argument("--dry-run", action="store_true", help="show what there is to do, and do nothing")
    out.add_argument("--report", action="store_true", help="only write docs/evidence.md and the table of README.md")
    out.add_argument("--evidence", type=Path, default=evidence.EVIDENCE, help="file that --report writes")
    return out


def _main(args: argparse.Namespace) -> int:
    if args.report:
        evidence.write_evidence(args.out, args.evidence)
        if args.evidence == evidence.EVIDENCE:
            evidence.write_readme(args.out, evidence.README)
        sys.stdout.write(f"{args.evidence}\n")
        return 0
    if args.config is None:
        raise KAFError("--config: missing, expected the JSON file of a study, such as benchmarks/low_label/acdc.json.")
    study = load(args.config)
    arms, tasks = _chosen(args.only, study.arms, "--only"), _chosen(args.tasks, study.tasks, "--tasks")
    chosen = replace(study, arms=arms, tasks=tasks)
    out = args.out.resolve()
    layouts = [Layout(chosen, task, (args.work or Path("unset")).resolve(), out) for task in tasks]
    if args.dry_run:
        sys.stdout.write("\n".join(_overview(layout, args.on) for layout in layouts) + "\n")
        return 0
    data = args.data or (Path(os.environ["nnUNet_raw"]) if os.environ.get("nnUNet_raw") else None)  # noqa: SIM112
    if data is None or args.work is None:
        raise KAFError(f"{'--work' if data else '--data'}: missing; see --help.")
    if args.jobs < 1 or (args.threads is not None and args.threads < 1):
        raise KAFError(f"--jobs {args.jobs}, --threads {args.threads}: expected whole numbers of at least 1.")
    if args.on == "test" and args.only:
        raise KAFError("--on test: found --only; the test set is used once, for all arms. Leave out --only.")
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    failures: list[str] = []
    if _anything_missing(layouts, args.on):
        with processes(args.work / study.name) as launch:
            failures = _run(layouts, data.resolve(), args.on, (args.jobs, threads), launch)
    written = evidence.write_study(study, out)
    sys.stdout.write("".join(f"{path}\n" for path in written))
    for line in failures:
        sys.stderr.write(f"failed: {line}\n")
    return 1 if failures else 0


def _run(
    layouts: Sequence[Layout],
    data: Path,
    on: str,
    size: tuple[int, int],
    launch: Processes,
) -> list[str]:
    """Do what is missing in all tasks; returns the failures."""
    splits = [grid.prepare(layout, data, os.cpu_count() or 1, launch) for layout in layouts]
    jobs: list[Job] = []
    for layout, split in zip(layouts, splits, strict=True):
        if on == "test":
            grid.open_test(layout, split)
            jobs += grid.test_jobs(layout, split)
        else:
            jobs += grid.training_jobs(layout, split)
    return run_jobs(jobs, *size, launch)


def _anything_missing(layouts: Sequence[Layout], on: str) -> bool:
    """Whether a result is missing.

    Raises:
        KAFError: The results are those of another work folder.
    """
    missing = False
    for layout in layouts:
        there, names = grid.finished(layout, on)
        missing = missing or there < names
        if 0 < there < names and not layout.scratch.is_dir():
            raise KAFError(
                f"{layout.results} holds {there} of {names} results, made with another --work. Name that folder to go "
                "on, or give another --out to start anew."
            )
    return missing


def _overview(layout: Layout, on: str) -> str:
    """Say how much there is to do in a task."""
    study = layout.study
    finished, runs = grid.finished(layout, on)
    pretrainings = {
        (layout.plans_name(arm), str(sorted(arm.pretraining.items())), k % study.pretraining_seeds)
        for arm in layout.arms
        if arm.pretraining is not None
        for k in range(max(study.draws[number] for number in arm.labelled))
    }
    names = ", ".join(arm.name for arm in layout.arms)
    return (
        f"{study.name}, {layout.task.name}: {len(layout.arms)} arms ({names}), labelled "
        f"{', '.join(map(str, study.labelled))}, {', '.join(map(str, study.draws.values()))} draws: {runs} trainings "
        f"of {study.epochs * study.iterations} iterations, {len(pretrainings)} pretrainings; measured on {on} "
        f"patients: {finished}"
    )


def _chosen(names: str | None, known: tuple[T, ...], option: str) -> tuple[T, ...]:
    """The arms or tasks of an option.

    Raises:
        KAFError: There is none of that name.
    """
    if names is None:
        return known
    unknown = sorted(set(names.split(",")) - {item.name for item in known})
    if unknown:
        raise KAFError(f"{option}: found {', '.join(unknown)}, expected some of {', '.join(i.name for i in known)}.")
    return tuple(item for item in known if item.name in names.split(","))


if __name__ == "__main__":
    sys.exit(main())
