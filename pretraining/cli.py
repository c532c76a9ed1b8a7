"""`kaf-pretrain`: self-supervised pretraining on the images of a group's datasets and folders."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from nnunetv2_kaf import console
from nnunetv2_kaf.errors import KAFError
from pretraining.config import PRESETS, PretrainConfig, flag

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from pretraining.task import Task

PROGRAM = "kaf-pretrain"
logger = logging.getLogger("pretraining")


def build_parser() -> argparse.ArgumentParser:
    """The parser; the training options are the fields of `PretrainConfig`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Pretrain the keypoint-augmented encoder without labels on a dataset that nnU-Net has "
        "preprocessed, and on further unlabelled images. nnUNetTrainerKAF then starts from the result by itself. "
        "Several GPUs: torchrun --nproc-per-node N -m pretraining ...",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to pretrain on")
    what.add_argument(
        "-d",
        "--dataset",
        required=True,
        nargs="+",
        metavar="DATASET",
        help="dataset number or name, e.g. 4 or Dataset004_Hippocampus; of further ones the raw training images are "
        "preprocessed with the plans of the first",
    )
    what.add_argument(
        "--images",
        nargs="+",
        default=[],
        type=console.path,
        metavar="DIR",
        help="folders of more unlabelled images in nnU-Net's naming (case_0000.nii.gz), preprocessed with the plans",
    )
    what.add_argument(
        "--skip-bad", action="store_true", help="go on without images that cannot be used, instead of stopping"
    )
    what.add_argument("-c", "--configuration", required=True, help="configuration, e.g. 2d or 3d_fullres")
    what.add_argument("-p", "--plans", default="nnUNetPlans", help="plans name (default: nnUNetPlans)")
    what.add_argument(
        "--fold",
        default="0",
        help="leave out the validation patients of this fold of nnU-Net's split; 'all' uses every case (default: 0)",
    )
    what.add_argument(
        "--init",
        type=_init,
        metavar="PATH",
        help="start the convolutional part from this checkpoint of nnssl (a file, a folder or hf://owner/name), of an "
        "nnU-Net training or of kaf-pretrain",
    )
    what.add_argument(
        "--init-adapt",
        action="store_true",
        help="with --init: also take weights of other kernel sizes, and of an encoder with more or fewer stages; the "
        "log says what was adapted, what was not used and what stays fresh",
    )
    how = parser.add_argument_group("how to run")
    how.add_argument("--device", default=None, help="cuda, mps or cpu (default: the first of these that is available)")
    how.add_argument(
        "--continue",
        dest="resume",
        action="store_true",
        help="go on from checkpoint_latest.pth of the same run; without one, start a new run",
    )
    how.add_argument(
        "--output",
        type=console.path,
        metavar="DIR",
        help="write here instead of the place where nnUNetTrainerKAF looks",
    )
    how.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    workers = max(1, min(8, (os.cpu_count() or 2) - 1))
    how.add_argument(
        "--num-workers",
        type=int,
        default=workers,
        help=f"threads that prepare pairs; 0 = none besides the main one (default here: {workers})",
    )
    options = parser.add_argument_group("training options")
    options.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="kaf",
        help="set of objectives that the options below change: kaf (this package's: global and local ones), paper (the "
        "paper's recipe), or simclr, gcl, pcl (a global one alone, which the paper compares with; they also work with "
        "--network plain) (default: kaf)",
    )
    for item in fields(PretrainConfig):
        text = item.metadata["help"].replace("%", "%%")
        default = "" if item.default is None else f" (default: {item.default})"
        options.add_argument(
            flag(item.name),
            dest=item.name,
            type=item.metadata["kind"],
            default=argparse.SUPPRESS,
            metavar=item.metadata["kind"].__name__.upper(),
            choices=item.metadata["choices"],
            help=text + default,
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done or stopped by a cluster's signal, 2 bad input, 130 interrupted."""
    console.prepare_streams()
    parsed = build_parser().parse_args(arguments)
    goes_on = "the same command with --continue goes on from what was saved last."
    return console.run(PROGRAM, lambda: _main(parsed), goes_on)


def _main(parsed: argparse.Namespace) -> None:
    """Check the options, pretrain, and say what comes next."""
    config = _config(parsed)
    # Here and not at the top: --help and a mistyped option need not wait for torch.
    from pretraining import distributed
    from pretraining.signals import PreemptedError

    try:
        with _log_to_stderr(), distributed.process_group(choose_device(parsed.device)) as device:
            first = distributed.rank() == 0
            logger.setLevel(logging.INFO if first else logging.WARNING)
            message = _run(parsed, config, device)
            if first:
                console.say(message)
    except PreemptedError as stop:
        console.complain(f"{PROGRAM}: {stop}")


def _config(parsed: argparse.Namespace) -> PretrainConfig:
    """Check the options that need no data."""
    given = {item.name: getattr(parsed, item.name) for item in fields(PretrainConfig) if hasattr(parsed, item.name)}
    _parse_fold(parsed.fold)
    if parsed.init_adapt and parsed.init is None:
        raise KAFError("--init-adapt changes how --init is taken; expected --init beside it.")
    if parsed.num_workers < 0:
        raise KAFError(f"--num-workers is {parsed.num_workers}; expected 0 or more.")
    return PretrainConfig.from_preset(parsed.preset, given)


def _run(parsed: argparse.Namespace, config: PretrainConfig, device: torch.device) -> str:
    """Resolve the input, pretrain, and return the closing message."""
    fold = _parse_fold(parsed.fold)
    from pretraining.prepare import DataOptions
    from pretraining.run import RunOptions, pretrain
    from pretraining.task import resolve_task

    dataset, *others = parsed.dataset
    task = resolve_task(dataset, parsed.configuration, parsed.plans, config.network)
    data = DataOptions(
        fold=fold,
        datasets=others,
        folders=parsed.images,
        skip_bad=parsed.skip_bad,
        num_workers=parsed.num_workers,
    )
    options = RunOptions(
        device=device,
        data=data,
        resume=parsed.resume,
        folder=parsed.output,
        init=_init_file(parsed.init),
        init_adapt=parsed.init_adapt,
        compiled=parsed.compile,
    )
    return _closing(task, fold, pretrain(task, config, options), parsed.output is not None)


def _init(text: str) -> str | Path:
    """The type of `--init`: a path, or a place on the hub."""
    return text if text.startswith("hf://") else console.path(text)


def _init_file(given: str | Path | None) -> Path | None:
    """The file that `--init` names, downloaded if need be."""
    from pretraining.exchange.hub import fetched
    from pretraining.exchange.sources import located

    if given is None:
        return None
    return located(fetched(given) if isinstance(given, str) else given)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best one available.

    Raises:
        KAFError: If the name is unknown or the device is not available.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [kind for kind, there in available.items() if there]
    if name is None:
        logger.info("Device: %s (available: %s; choose with --device).", usable[0], ", ".join(usable))
        return torch.device(usable[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise KAFError(f"--device is {name}; expected one of {', '.join(available)}.")
    if not available[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise KAFError(f"--device {name} is not available on this machine (available: {', '.join(usable)}).")
    return device


def _parse_fold(text: str) -> int | str:
    """`"all"` or the fold number."""
    if text == "all":
        return text
    if text.isdecimal():
        return int(text)
    raise KAFError(f"--fold is {text!r}; expected a fold number (0, 1, ...) or 'all'.")


def _closing(task: Task, fold: int | str, checkpoint: Path, elsewhere: bool) -> str:
    """Say where everything is and what comes next."""
    plans = "" if task.plans_name == "nnUNetPlans" else f" -p {shlex.quote(task.plans_name)}"
    target: Any = "FOLD" if fold == "all" else fold
    train, file = (
        f"nnUNetv2_train {task.dataset_id} {shlex.quote(task.configuration)} {target}",
        shlex.quote(str(checkpoint)),
    )
    if task.network == "plain":
        train += f"{plans} -pretrained_weights {file}"
    else:
        train = f"{f'KAF_PRETRAINED={file} ' if elsewhere else ''}{train} -tr nnUNetTrainerKAF{plans}"
    return f"Checkpoint: {checkpoint}\nCurves:     {checkpoint.with_name('progress.png')}\nNext:       {train}"


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Send the log of this package to stderr; of several processes the first one tells what all have in common."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
