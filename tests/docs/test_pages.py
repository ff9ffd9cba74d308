"""The pages are what the code says, their links lead somewhere, and every block is run or says why not."""

import argparse
import re
from pathlib import Path

import pytest

from regrow.task import Task, parse_task
from tests.docs.blocks import blocks
from tests.docs.generate import PAGES, ROOT, commands, regenerated
from tests.docs.terminals import Reader

HAND_WRITTEN = (
    "README.md",
    "docs/bring-your-own.md",
    "docs/deploy.md",
    "docs/energy.md",
    "docs/field.md",
    "docs/fleet.md",
    "docs/images.md",
    "docs/measuring.md",
    "docs/gateway.md",
    "docs/models.md",
    "docs/page.md",
    "docs/simulate.md",
    "docs/store.md",
    "docs/updates.md",
    "docs/using-the-model.md",
    "docs/zoo.md",
)
ALL = sorted(page.relative_to(ROOT) for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
RUN_BY_A_TEST = ("README.md", "docs/bring-your-own.md")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_generated_parts_are_current(page: Path) -> None:
    text = (ROOT / page).read_text()
    assert "<!-- generated: " in text
    assert text == regenerated(text), "run: python -m tests.docs.generate"


@pytest.mark.parametrize("page", ALL, ids=str)
def test_every_generated_part_has_an_end(page: Path) -> None:
    text = (ROOT / page).read_text()
    marks = re.findall(r"^<!-- (generated|end)\b", text, re.MULTILINE)
    assert marks == ["generated", "end"] * (len(marks) // 2)
    assert not marks or page in PAGES


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("page", ALL, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        file, _, fragment = target.partition("#")
        place = (ROOT / page).parent / file if file else ROOT / page
        assert place.is_file(), f"{page}: {target}"
        assert not fragment or fragment in headings(place), f"{page}: no heading for {target}"


@pytest.mark.parametrize("page", ALL, ids=str)
def test_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).is_file(), f"{page}: {target}"


@pytest.mark.parametrize("page", ALL, ids=str)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(ROOT / page):
        if block.language in ("sh", "python") and str(page) not in RUN_BY_A_TEST:
            assert block.how == "not executed", f"{page}:{block.line}"
        assert block.how != "not executed" or len(block.what) > 10, f"{page}:{block.line}: no reason"
        assert block.language in ("sh", "python", "toml", "ini", "text", "golden"), f"{page}:{block.line}: {block.language}"


def test_the_blocks_of_the_readme_run(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for block in blocks(ROOT / "README.md"):
        reader.follow(block)
    assert "no runs in runs" in reader.output


def test_task_files_in_the_pages_are_tasks() -> None:
    for page in ("docs/task.md", "docs/bring-your-own.md"):
        found = [block for block in blocks(ROOT / page) if block.language == "toml"]
        assert found
        for block in found:
            parse_task(block.text, f"{page}:{block.line}")


def test_every_section_of_a_task_has_its_table() -> None:
    text = (ROOT / "docs" / "task.md").read_text()
    sections = [name for name in Task.__struct_fields__ if name not in ("name", "model", "seed")]
    assert re.findall(r"^<!-- generated: task:(\w*) -->$", text, re.MULTILINE) == ["", *sections]


def leaves() -> list[str]:
    return [name for name, parser in commands() if not any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)]


@pytest.mark.parametrize("command", leaves())
def test_every_command_is_spoken_of_where_people_read(command: str) -> None:
    assert any(command in (ROOT / page).read_text() for page in HAND_WRITTEN)
