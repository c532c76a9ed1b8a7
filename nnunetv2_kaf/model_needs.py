"""What a model folder, or a zip of nnU-Net's export, needs where it predicts. Reads names only, and no checkpoint."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nnunetv2_kaf.errors import KAFError, one_line

LARGEST = 2**26
"""Bytes of a plans.json in a zip."""
_OURS = ("nnUNetTrainerKAF", "nnUNetTrainerSemi")


@dataclass(frozen=True)
class Needs:
    """One model and what it needs.

    Attributes:
        name: TRAINER__PLANS__CONFIGURATION.
        trainer: Class that nnU-Net looks for by name.
        networks: Dotted names of the network classes in its plans.
    """

    name: str
    trainer: str
    networks: tuple[str, ...]

    @property
    def own_trainer(self) -> bool:
        """Whether its trainer has a name of this package's."""
        return self.trainer.startswith(_OURS)

    @property
    def package(self) -> bool:
        """Whether it needs this package."""
        return self.own_trainer or any(name.startswith("nnunetv2_kaf.") for name in self.networks)


def needs_of(path: Path) -> list[Needs]:
    """The models in a folder or a zip.

    Raises:
        KAFError: There is no such file, it is none of these, or holds no model.
    """
    try:
        found = [_needs(*entry) for entry in _plans_files(path)]
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, RecursionError) as error:
        raise KAFError(
            f"--model {path} cannot be read ({type(error).__name__}: {one_line(error)}); expected a model folder, or a "
            "zip of nnUNetv2_export_model_to_zip. Correct the path, or export again."
        ) from error
    if not found:
        raise KAFError(
            f"--model {path}: found no plans.json in a folder TRAINER__PLANS__CONFIGURATION; expected a model folder, "
            "or a zip of nnUNetv2_export_model_to_zip."
        )
    return found


def _plans_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Folder name and content of every plans.json of a model."""
    if path.is_dir():
        for file in sorted(path.rglob("plans.json")):
            yield file.resolve().parent.name, file.read_bytes()
        return
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if PurePosixPath(record.filename).name == "plans.json":
                if record.file_size > LARGEST:
                    raise ValueError(f"{record.filename} has {record.file_size} bytes, expected at most {LARGEST}")
                yield PurePosixPath(record.filename).parent.name, archive.read(record)


def _needs(folder: str, content: bytes) -> Needs:
    plans = json.loads(content)
    configurations: Any = plans.get("configurations") if isinstance(plans, dict) else None
    known = configurations.values() if isinstance(configurations, dict) else ()
    entries = [entry.get("architecture") for entry in known if isinstance(entry, dict)]
    names = {e["network_class_name"] for e in entries if isinstance(e, dict) and "network_class_name" in e}
    trainer = folder.split("__")[0]
    if not re.fullmatch(r"\w{1,200}", trainer):
        raise ValueError(f"{folder!r} names no trainer")
    return Needs(folder, trainer, tuple(sorted(str(name) for name in names)))
