"""Imports run in one direction: semisupervised -> pretraining -> nnunetv2_kaf."""

import ast
from pathlib import Path

import pytest

import semisupervised
from semisupervised import trainer

ROOT = Path(semisupervised.__file__).parents[1]
ORDER = ("nnunetv2_kaf", "pretraining", "semisupervised")


@pytest.mark.parametrize("package", ORDER[:2])
def test_no_package_imports_from_a_later_one(package):
    later = set(ORDER[ORDER.index(package) + 1 :])
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert not later & {name.split(".")[0] for name in names}, path


def test_short_schedules_exist_for_both_trainers():
    for base in (trainer.nnUNetTrainerSemi, trainer.nnUNetTrainerKAFSemi):
        for epochs in (1, 5, 20, 50, 100, 250):
            cls = getattr(trainer, f"{base.__name__}_{epochs}epoch{'s' if epochs > 1 else ''}")
            assert issubclass(cls, base)
            assert cls.schedule_epochs == epochs
