"""The notebook runs from top to bottom and ends with its pictures."""

from __future__ import annotations

import base64
import io
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "few_labels.ipynb"


def test_the_committed_notebook_has_no_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.integration
def test_the_notebook_ends_with_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("few_labels.ipynb", "phantoms.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    for name in [name for name in os.environ if name.startswith(("nnUNet_", "KAF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    notebook = nbformat.read(tmp_path / "few_labels.ipynb", as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = []
    for cell in code[-4:]:
        (output,) = cell.outputs
        pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")))
    assert all(picture.std() > 10 for picture in pictures)
    assert code[1].outputs[0].data["text/plain"] == "'2 labelled, 8 unlabelled'"
    scores = code[-5].outputs[0].data["text/plain"]
    assert "'LV'" in scores
