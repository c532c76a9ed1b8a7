"""Weights as safetensors, by the optional package of this name: nothing but tensors and text, also for other languages.

A tensor that has several names in a network (an encoder convolution has four) is stored under the first; the others are
listed in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError, one_line
from nnunetv2_kaf.files import replacing

SUFFIX = ".safetensors"
_CONTENT, _ALIASES = "nnunetv2_kaf", "aliases"


def write_safetensors(content: Mapping[str, Any], out: Path) -> None:
    """Write a checkpoint: `network_weights` as tensors, everything else as JSON in the metadata.

    Raises:
        KAFError: The package is missing, or the file cannot be written.
    """
    save, _ = _package(f"-o {out}")
    names: dict[tuple[int, torch.Size], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in content["network_weights"].items():
        first = names.setdefault((tensor.data_ptr(), tensor.shape), name)
        if first == name:
            tensors[name] = tensor.contiguous()
        else:
            aliases[name] = first
    rest = {key: value for key, value in content.items() if key != "network_weights"}
    metadata = {"format": "pt", _CONTENT: json.dumps(rest), _ALIASES: json.dumps(aliases)}
    with replacing(out, "Free some space or check the permissions.") as temporary:
        save(tensors, str(temporary), metadata)


def read_safetensors(path: Path, named_by: str = "") -> dict[str, Any]:
    """Read a file of `write_safetensors`, or one of others: its tensors are `network_weights` then.

    Raises:
        KAFError: The package or the file is missing, or it is damaged.
    """
    shown = f"{named_by} {path}".strip()
    _, opened = _package(shown)
    if not path.is_file():
        raise KAFError(f"{shown} does not exist. Correct the path.")
    try:
        with opened(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        rest, aliases = (json.loads(metadata.get(key, "{}")) for key in (_CONTENT, _ALIASES))
        weights.update({name: weights[first] for name, first in aliases.items()})
        return {**rest, "network_weights": weights}
    except Exception as error:  # the package has its own, json and a damaged content others
        raise KAFError(
            f"{shown} cannot be read as safetensors ({type(error).__name__}: {one_line(error)[:200]}); it is truncated "
            "or of another kind. Copy it again, or name another file."
        ) from error


def _package(what: str) -> tuple[Any, Any]:
    """The functions that save and open.

    Raises:
        KAFError: The package is not installed.
    """
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise KAFError(
            f"{what} needs the package safetensors, which cannot be imported ({error}). Run: pip install "
            "'nnunetv2-kaf[hub]'"
        ) from error
    return save_file, safe_open
