"""`kaf-export`: write a pretraining checkpoint in a format that other tools read."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nnunetv2_kaf import console
from nnunetv2_kaf.errors import KAFError

PROGRAM = "kaf-export"
logger = logging.getLogger("pretraining")


def build_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Write a checkpoint of kaf-pretrain, or a trained model, in a format that other tools read. nnssl: "
        "network_weights and a complete nnssl_adaptation_plan, for nnU-Net's finetuning from nnssl checkpoints, as a "
        "file or as the folder of three files that it downloads; safetensors: the same without pickles. The names of "
        "the cases that were pretrained on are left out. nnunet: a trained model that predicts with nnU-Net alone, "
        "where its network allows it; onnx: the network of a trained model, for one patch, compared with torch.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        type=console.path,
        metavar="CHECKPOINT",
        help="checkpoint_final.pth of kaf-pretrain; for nnunet and onnx the folder TRAINER__PLANS__CONFIGURATION",
    )
    parser.add_argument(
        "--format",
        choices=("nnssl", "safetensors", "nnunet", "onnx"),
        default="nnssl",
        help="format to write (default: nnssl)",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=console.path,
        metavar="OUT",
        help="file to write; nnssl: with the ending .pth a file, else a folder; nnunet: a folder",
    )
    parser.add_argument("--fold", help="onnx: the fold whose network is written, if there are several")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="write the convolutional part alone, as nnU-Net's own PlainConvUNet or ResidualEncoderUNet, for tools "
        "that build the network without this package; needs add fusion (default: the whole keypoint-augmented network)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 2 bad input, 130 interrupted)."""
    console.prepare_streams()
    parsed = build_parser().parse_args(arguments)

    def export() -> None:
        with _log_to_stderr():
            message = _run(parsed)
        console.say(message)

    return console.run(PROGRAM, export, "nothing was written.")


def _run(parsed: argparse.Namespace) -> str:
    """Export, and say what was written."""
    # Here and not at the top: --help and a mistyped option need not wait for torch.
    from pretraining.exchange.nnssl import export_folder, export_nnssl
    from pretraining.exchange.safetensors_file import SUFFIX
    from pretraining.exchange.trained import export_nnunet, export_onnx

    if parsed.format in ("nnunet", "onnx") and parsed.plain:
        raise KAFError("--plain is for pretraining checkpoints (--format nnssl or safetensors); leave it out.")
    if parsed.fold is not None and parsed.format != "onnx":
        raise KAFError("--fold is for --format onnx; leave it out.")
    if parsed.format == "nnunet":
        return export_nnunet(parsed.checkpoint, parsed.output, force=parsed.force)
    if parsed.format == "onnx":
        return export_onnx(parsed.checkpoint, parsed.output, fold=parsed.fold, force=parsed.force)
    if (parsed.format == "safetensors") != (parsed.output.suffix == SUFFIX):
        raise KAFError(f"-o {parsed.output}: files of --format safetensors end in {SUFFIX}, others do not.")
    if parsed.format == "nnssl" and parsed.output.suffix != ".pth":
        plan = export_folder(parsed.checkpoint, parsed.output, force=parsed.force)
    else:
        plan = export_nnssl(parsed.checkpoint, parsed.output, plain=parsed.plain, force=parsed.force)
    return (
        f"Checkpoint: {parsed.output}\n"
        f"Network:    {plan['architecture_plans']['arch_class_name']}, "
        f"{plan['pretrain_num_input_channels']} input channel(s)\n"
        f"Encoder:    {plan['key_to_encoder']}, stem {plan['key_to_stem']}"
    )


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Send the log of this package to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
