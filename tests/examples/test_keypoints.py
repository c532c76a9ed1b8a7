import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "keypoints.py"


def test_runs_a_volume_and_draws_its_keypoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "keypoints.png"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(picture)])
    names = runpy.run_path(str(SCRIPT))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert names["logits"].shape == (1, 4, 20, 64, 64)
    assert 20 < len(names["points"]) <= 256
    assert capsys.readouterr().out.startswith(f"{len(names['points'])} keypoints")
