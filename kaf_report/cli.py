"""`kaf-report`: the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_kaf import console
from nnunetv2_kaf.errors import KAFError

PROGRAM = "kaf-report"
MODEL_ONLY = {"images": "-i", "labels": "-l", "folds": "--folds"}


def build_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Write one page, report.html, that shows what a model or a pretraining has learned. It needs no "
        "network and can be copied anywhere. Model folder: what it is, and per case the keypoints, the attention among "
        "them, what the fusion adds, the prediction, where the folds disagree, Dice and Hausdorff distance. "
        "Pretraining folder: pairs of views with their matches, nearest neighbours of the global vectors, curves.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="model folder (TRAINER__PLANS__CONFIGURATION in nnUNet_results) or folder of a pretraining "
        "(KAFPretraining__PLANS__CONFIGURATION/fold_N, or the one given to --output)",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("kaf_report"), help="folder (default: %(default)s)")
    model = parser.add_argument_group("for a model")
    model.add_argument("-i", "--images", type=Path, help="folder of images in nnU-Net's naming (CASE_0000.nii.gz, ...)")
    model.add_argument("-l", "--labels", type=Path, help="folder of their labels (CASE.nii.gz); cases may lack one")
    model.add_argument("--folds", nargs="+", help="names of the folds (default: all, without fold all)")
    model.add_argument("--checkpoint", default="checkpoint_final.pth", help="file in the folds (default: %(default)s)")
    model.add_argument(
        "--keypoints", type=int, default=8, help="keypoints per case whose attention is shown (default: %(default)s)"
    )
    model.add_argument("--disable-mirroring", action="store_true", help="predict without test-time mirroring, faster")
    run = parser.add_argument_group("for a pretraining")
    run.add_argument("--pairs", type=int, default=6, help="pairs of views to show (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    console.prepare_streams()
    parsed = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    return console.run(PROGRAM, lambda: console.say(f"Report: {_run(parsed)}"), "run it again.")


def _run(parsed: argparse.Namespace) -> Path:
    """Find out what the folder is, and report on it; returns the page.

    Raises:
        KAFError: It is neither a model nor a pretraining, or an option is wrong.
    """
    folder: Path = parsed.folder
    if parsed.keypoints < 1 or parsed.pairs < 1:
        raise KAFError(f"--keypoints is {parsed.keypoints} and --pairs is {parsed.pairs}; expected 1 or more.")
    if parsed.labels is not None and parsed.images is None:
        raise KAFError("-l was given without -i: name the folder of the images that the labels belong to.")
    kind, found = find_kind(folder)
    # Here and not at the top: --help and a mistyped folder need not wait for torch.
    from pretraining.cli import choose_device

    device = str(choose_device(parsed.device))
    if kind == "model":
        from kaf_report.model_report import Options, report_model

        options = Options(
            folder=found,
            images=parsed.images,
            labels=parsed.labels,
            out=parsed.output,
            folds=parsed.folds,
            checkpoint=parsed.checkpoint,
            keypoints=parsed.keypoints,
            device=device,
            mirror=not parsed.disable_mirroring,
        )
        return report_model(options)
    given = [option for name, option in MODEL_ONLY.items() if getattr(parsed, name) is not None]
    if given:
        raise KAFError(f"{folder} is a pretraining; {', '.join(given)} are for models. Leave them out.")
    from kaf_report.pretraining_report import report_pretraining

    return report_pretraining(found, parsed.output, parsed.pairs, device)


def find_kind(folder: Path) -> tuple[str, Path]:
    """What a folder is: ("model" or "pretraining", the folder to read).

    Raises:
        KAFError: It is neither, or several pretrainings.
    """
    if not folder.is_dir():
        raise KAFError(f"{folder} does not exist or is no folder. Give a model folder or the folder of a pretraining.")
    if (folder / "plans.json").is_file():
        return "model", folder
    names = ("checkpoint_final.pth", "checkpoint_latest.pth")
    if (folder.parent / "plans.json").is_file() and folder.name.startswith("fold_"):
        raise KAFError(f"{folder} is one fold of a model. Give {folder.parent} and --folds {folder.name[5:]}.")
    if any((folder / name).is_file() for name in names):
        return "pretraining", folder
    runs = sorted({path.parent for name in names for path in folder.glob(f"fold_*/{name}")})
    if len(runs) > 1:
        raise KAFError(f"{folder} holds several pretrainings: {', '.join(p.name for p in runs)}. Give one of them.")
    if runs:
        return "pretraining", runs[0]
    content = sorted(p.name for p in folder.iterdir())
    raise KAFError(
        f"{folder} holds neither a model (plans.json, dataset.json, fold_*) nor a pretraining (checkpoint_final.pth or "
        f"checkpoint_latest.pth): found {', '.join(content[:5]) or 'nothing, the folder is empty'}. Give the folder "
        "TRAINER__PLANS__CONFIGURATION of a training, or that of a pretraining, in nnUNet_results."
    )


if __name__ == "__main__":
    sys.exit(main())
