from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nnunetv2_kaf.errors import KAFError
from pretraining import cli
from pretraining.exchange.hub import fetched


class Hub:
    """Stands for the hub: answers with a folder, or fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None, list[str]]] = []
        self.error: Exception | None = None

    def snapshot_download(self, repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repository, revision, allow_patterns))
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    module: Any = ModuleType("huggingface_hub")
    module.snapshot_download = made.snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return made


def test_three_files_of_a_repository_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    assert fetched("hf://owner/name") == tmp_path
    assert fetched("hf://owner/name@v1.0") == tmp_path
    three = ["checkpoint_final.pth", "adaptation_plan.json", "config.json"]
    assert hub.asked == [("owner/name", None, three), ("owner/name", "v1.0", three)]


@pytest.mark.parametrize("name", ["hf://", "hf://owner", "hf://a/b/c", "hf://../x", "hf://a b/c", "hf:///etc/passwd"])
def test_odd_names_ask_for_nothing(name: str, hub: Hub) -> None:
    if name == "hf://../x":
        hub.error = ValueError("no such name")
    with pytest.raises(KAFError, match="--init"):
        fetched(name)
    assert len(hub.asked) == (name == "hf://../x")


def test_what_the_hub_raises_is_one_line(hub: Hub) -> None:
    hub.error = RuntimeError("404:\nnot found")
    with pytest.raises(KAFError, match=r"hf://owner/name: .*404: not found.*name their folder"):
        fetched("hf://owner/name")


def test_without_the_package(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, fast: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["-d", "123", "-c", "2d", "--fold", "all", *fast, "--init", "hf://owner/name"]) == 2
    assert "pip install 'nnunetv2-kaf[hub]'" in capsys.readouterr().err


def test_a_run_starts_from_the_hub(hub: Hub, tiny: Any, fast: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-d", "123", "-c", "2d", "--fold", "all", *fast, "--init", "hf://owner/name"]) == 2
    assert "found a folder without checkpoint_final.pth" in capsys.readouterr().err
    assert len(hub.asked) == 1


def test_init_adapt_needs_init(tiny: Any, fast: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-d", "123", "-c", "2d", *fast, "--init-adapt"]) == 2
    assert "expected --init beside it" in capsys.readouterr().err
