"""Encoder weights from the files that `kaf-pretrain --init` accepts, loaded without running code from them.

Three kinds: nnssl checkpoints (`network_weights` and `nnssl_adaptation_plan`), also as a folder of three files
or on the Hugging Face hub, checkpoints of nnU-Net trainings, and our own pretraining checkpoints; all also as
safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.fitting import CONVOLUTIONAL, LAYERS
from nnunetv2_kaf.safe_load import load_safely, read_json
from nnunetv2_kaf.tensors import check_weights
from nnunetv2_kaf.weights import FORMAT, check_checkpoint
from pretraining.exchange.safetensors_file import SUFFIX, read_safetensors

CHECKPOINT, PLAN, CONFIG = "checkpoint_final.pth", "adaptation_plan.json", "config.json"
"""Files of a folder as nnU-Net's finetuning expects it."""


class Source(NamedTuple):
    """Encoder weights of a file.

    Attributes:
        kind: What the file is, in words.
        weights: Tensors under the names of our encoder: `encoder.stem.*`, `encoder.stages.*`, `encoder.layers.*`.
    """

    kind: str
    weights: dict[str, Tensor]


def located(path: str | Path) -> Path:
    """The file with the weights: of a folder in the layout of nnssl its checkpoint, else the path itself.

    Raises:
        KAFError: The folder holds no checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    file = path / CHECKPOINT
    if not file.is_file():
        raise KAFError(
            f"--init {path}: found a folder without {CHECKPOINT}, expected one with {CHECKPOINT}, {PLAN} and {CONFIG} "
            "(as kaf-export and nnssl write it), or a file. Name the file itself."
        )
    return file


def read_weights(path: str | Path) -> Source:
    """Read the encoder weights of a file of any supported kind.

    Raises:
        KAFError: The file is missing, truncated, unsafe to load, of an unknown kind, or holds no UNet encoder.
    """
    path = Path(path)
    checkpoint = read_safetensors(path, "--init") if path.suffix == SUFFIX else load_safely(path, "--init")
    plan = path.with_name(PLAN)
    if path.name == CHECKPOINT and "nnssl_adaptation_plan" not in checkpoint and plan.is_file():
        checkpoint["nnssl_adaptation_plan"] = read_json(plan, "Download or export the folder again.")
    kind = _kind(checkpoint, path)
    fix = "Name another file."
    given = check_weights(checkpoint["network_weights"], f"--init {path}: network_weights", fix)
    weights = {_unwrapped(k): v for k, v in given.items()}
    if "nnssl_adaptation_plan" in checkpoint:
        weights = _from_nnssl(weights, checkpoint["nnssl_adaptation_plan"], path)
    weights = {k: v for k, v in weights.items() if k.startswith((*CONVOLUTIONAL, LAYERS))}
    if not any(re.match(r"encoder\.stages\.\d+\.", name) for name in weights):
        raise KAFError(
            f"--init {path} ({kind}) holds no encoder of nnU-Net's UNets: found no tensors encoder.stages.0.* (for an "
            "nnssl checkpoint: none under its key_to_encoder). Give a checkpoint of a PlainConvUNet, a "
            "ResidualEncoderUNet (ResEnc-L) or a KAFUNet."
        )
    return Source(kind, weights)


def _kind(checkpoint: Mapping[str, Any], path: Path) -> str:
    """What a checkpoint is, in words.

    Raises:
        KAFError: It is none of the supported kinds.
    """
    if not isinstance(checkpoint.get("network_weights"), Mapping):
        unfinished = checkpoint.get("format") == "nnunetv2_kaf.pretraining_run"
        fix = "finish that run with --continue and give its checkpoint_final.pth" if unfinished else "name another file"
        raise KAFError(
            f"--init {path}: found no network_weights (its entries: {sorted(map(str, checkpoint))[:8]}). Expected an "
            f"nnssl checkpoint, a checkpoint of an nnU-Net training or checkpoint_final.pth of kaf-pretrain; {fix}."
        )
    if isinstance(checkpoint.get("nnssl_adaptation_plan"), Mapping):
        architecture = _mapping(checkpoint["nnssl_adaptation_plan"].get("architecture_plans"))
        name = architecture.get("arch_class_name")
        return f"an nnssl checkpoint of {name if isinstance(name, str) else 'an unnamed architecture'}"
    if checkpoint.get("format") == FORMAT:
        check_checkpoint(checkpoint, f"--init {path}")
        origin = checkpoint
        what = "a pretraining checkpoint"
    else:
        origin = _mapping(checkpoint.get("init_args"))
        trainer = checkpoint.get("trainer_name")
        what = f"an nnU-Net checkpoint of {trainer if isinstance(trainer, str) else 'an unknown trainer'}"
    plans = _mapping(origin.get("plans"))
    names = (plans.get("dataset_name"), plans.get("plans_name"), origin.get("configuration"))
    named = [name for name in names if isinstance(name, str) and name]
    return ", ".join([what, *named]) if len(named) == len(names) else what


def _mapping(value: Any) -> Mapping[str, Any]:
    """An entry that only serves to say in words what a file is."""
    return value if isinstance(value, Mapping) else {}


def _from_nnssl(weights: Mapping[str, Tensor], plan: Any, path: Path) -> dict[str, Tensor]:
    """Rename the encoder of an nnssl checkpoint, wherever its plan says it is, to our names.

    `key_to_encoder` names the stages (`encoder.stages`), or the module that holds stages and stem; `key_to_stem`
    the stem, which is a part of the stages in a plain network.
    """
    keys = {key: plan.get(key) for key in ("key_to_encoder", "key_to_stem")} if isinstance(plan, Mapping) else {}
    if not keys or not all(isinstance(value, str) for value in keys.values()):
        raise KAFError(
            f"--init {path}: its nnssl_adaptation_plan must name key_to_encoder and key_to_stem, found "
            f"{keys or plan!r}. Write the checkpoint again with a complete plan (nnssl has add_adaptation_plan.py)."
        )
    encoder, stem = (_unwrapped(f"{keys[key]}.") for key in ("key_to_encoder", "key_to_stem"))
    if any(name.startswith(f"{encoder}stages.") for name in weights):
        encoder = f"{encoder}stages."
    renamed = {encoder: "encoder.stages.", re.sub(r"stages\.$", "layers.", encoder): LAYERS}
    if not stem.startswith(encoder):
        renamed[stem] = "encoder.stem."
    return {
        ours + k[len(theirs) :]: v
        for theirs, ours in renamed.items()
        for k, v in weights.items()
        if k.startswith(theirs)
    }


def _unwrapped(name: str) -> str:
    """The name without the prefixes that DistributedDataParallel and torch.compile add."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)
