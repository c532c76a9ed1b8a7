from __future__ import annotations

import base64
from pathlib import Path

import pytest
from markupsafe import escape

from kaf_report import page
from kaf_report.page import Album
from nnunetv2_kaf.errors import KAFError

NASTY = """</script><script>alert(1)</script><img src="https://example.org/x.png" onerror='alert(2)'>{{ 7 * 7 }}"""


def content(**changes: object) -> dict[str, object]:
    empty: dict[str, object] = {
        "title": NASTY, "subtitle": NASTY, "notes": [NASTY], "run_facts": [(NASTY, NASTY)], "curves": None, "pairs": [],
        "neighbours": None, "colors": {}, "written": "today", "versions": "1",
    }  # fmt: skip
    return {**empty, **changes}


def test_names_from_files_are_text_and_nothing_else() -> None:
    text = page.render("pretraining.html", content())
    assert text.count("<script") == 1
    assert "<img" not in text
    assert text.count(str(escape(NASTY))) == 6  # title twice, subtitle, note, name and value of a fact
    assert "49" not in text.replace("#57606a", "")


def test_scripts_need_the_nonce_of_this_page_and_nothing_is_loaded() -> None:
    first, second = (page.render("pretraining.html", content()) for _ in range(2))
    assert "default-src 'none'" in first
    assert first != second  # another nonce
    assert first.count("nonce") == 2


def test_a_full_page_links_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "FULL", 200)
    album = Album(tmp_path)
    first, second = (album.embed(album.save(name, bytes(120)), "text") for name in ("a", "b"))
    assert first.source == f"data:image/png;base64,{base64.b64encode(bytes(120)).decode()}"
    assert second.source == ""
    assert (tmp_path / second.file).read_bytes() == bytes(120)
    text = page.render("pretraining.html", content(curves=second))
    assert 'href="pictures/b.png"' in text
    assert "this page is full" in text


def test_a_folder_with_other_files_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(KAFError, match=r"thesis\.tex"):
        page.prepare_folder(tmp_path)
    (tmp_path / "thesis.tex").rename(tmp_path / "report.html")  # of somebody else
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.png").touch()
    with pytest.raises(KAFError, match="holds other files"):
        page.prepare_folder(tmp_path)
    (tmp_path / "report.html").unlink()
    with pytest.raises(KAFError, match="holds other files"):
        page.prepare_folder(tmp_path)
    assert (tmp_path / "pictures" / "holiday.png").exists()


def test_a_report_that_was_interrupted_can_be_made_again(tmp_path: Path) -> None:
    page.prepare_folder(tmp_path / "out")
    Album(tmp_path / "out").save("a", b"x")
    assert "not finished" in (tmp_path / "out" / "report.html").read_text()
    page.prepare_folder(tmp_path / "out")
    assert not list((tmp_path / "out" / "pictures").iterdir())


def test_a_new_report_removes_the_pictures_of_the_one_before(tmp_path: Path) -> None:
    album = Album(tmp_path)
    album.save("old", b"x")
    page.write(tmp_path, "pretraining.html", content())
    page.prepare_folder(tmp_path)
    assert not list((tmp_path / "pictures").iterdir())


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.12345, "0.123"), (1.0, "1.000")])
def test_numbers(value: float | None, text: str) -> None:
    assert page.number(value) == text
