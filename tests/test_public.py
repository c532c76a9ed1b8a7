"""What users import, and the examples in the documentation of it."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nnunetv2_kaf
import pretraining

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("nnunetv2_kaf", "pretraining")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
}


@pytest.mark.parametrize("package", [nnunetv2_kaf, pretraining], ids=lambda package: package.__name__)
def test_public_names_are_there_and_imported_when_asked_for(package) -> None:
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        value = getattr(package, name)
        home = getattr(value, "__module__", package.__name__)
        assert getattr(importlib.import_module(home), name) is value
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = package.Missing


def test_importing_the_packages_imports_no_torch() -> None:
    code = (
        "import sys, nnunetv2_kaf, pretraining\n"
        "assert not {'torch', 'numpy', 'nnunetv2'} & set(sys.modules)\n"
        "from pretraining import PretrainConfig\n"
        "from nnunetv2_kaf import KAFConfig\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(WITH_EXAMPLES))
def test_examples_in_docstrings(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_public_classes_and_the_losses_have_examples() -> None:
    classes = ("nnunetv2_kaf.unet", "nnunetv2_kaf.keypoints")
    losses = ("pretraining.objectives.losses", "pretraining.objectives.transport")
    assert {*classes, *losses} <= WITH_EXAMPLES
