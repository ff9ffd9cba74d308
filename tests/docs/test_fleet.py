"""The table of attacks names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.generate import ROOT

PAGE = (ROOT / "docs" / "fleet.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)(?:::(\w+)(?:\[(\w+)\])?)?`", PAGE)


def test_attacks_are_named() -> None:
    assert len([name for name in NAMED if name[0] == "test_tls.py"]) >= 13


@pytest.mark.parametrize(("file", "function", "attack"), NAMED)
def test_each_of_them_is_a_test(file: str, function: str, attack: str) -> None:
    text = "".join(path.read_text() for path in Path(ROOT / "tests").rglob(file))
    assert text
    assert not function or f"def {function}(" in text
    if attack:
        doors = (ROOT / "tests" / "attacks" / "doors.py").read_text()
        assert f"def {attack}(rig" in doors
        listed = doors[doors.index("BOTH = [") :] + text
        assert re.search(rf"\b{attack}\b", listed)
