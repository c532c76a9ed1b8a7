import pytest

from pretraining.data.case import Case


@pytest.mark.parametrize(
    ("identifier", "source", "name"),
    [("case_1", "", "case_1"), ("folder-1a2b/case.1", "folder-1a2b", "case.1")],
)
def test_identifier_there_and_back(identifier: str, source: str, name: str) -> None:
    case = Case.of(identifier)
    assert case == Case(source, name)
    assert case.identifier == identifier
    assert case.is_own == (source == "")
