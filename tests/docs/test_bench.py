"""The commands that the pages name for their numbers can find what they import."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "bench").glob("*.py"))]
NAMED = re.compile(r"python (?:bench/(?P<file>\w+)\.py|-m bench\.(?P<module>\w+))")
SAID = sorted({(found["file"] or found["module"], bool(found["module"])) for page in PAGES for found in NAMED.finditer(page.read_text())})


@pytest.mark.parametrize(("name", "as_module"), SAID, ids=lambda part: str(part))
def test_a_command_finds_its_imports(name: str, as_module: bool) -> None:
    """A file finds its neighbours, a module what lies in the root; the kit's own packages are installed for both."""
    tree = ast.parse((ROOT / "bench" / f"{name}.py").read_text())
    rooms = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    neighbours = {file.stem for file in (ROOT / "bench").glob("*.py")}
    assert not rooms & (neighbours if as_module else {"bench", "tests"})
