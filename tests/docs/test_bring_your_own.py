"""docs/bring-your-own.md, followed by somebody who does exactly what it says."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import INTERRUPTED
from tests.docs.blocks import blocks
from tests.docs.generate import ROOT
from tests.docs.terminals import Reader


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    follower = Reader(tmp_path)
    yield follower
    follower.kill()


@pytest.mark.timeout(120)
def test_the_page_leads_to_a_trained_and_verified_model(reader: Reader) -> None:
    for block in blocks(ROOT / "docs" / "bring-your-own.md"):
        reader.follow(block)
    statuses = reader.leave()
    assert set(statuses.values()) <= {0, INTERRUPTED}, {name: terminal.output for name, terminal in reader.terminals.items()}
    assert "restored device=right" in reader.terminals["serve"].output
    accuracy = re.search(r"accuracy on the left device's data: ([0-9.]+)", reader.output)
    assert accuracy is not None, reader.output
    assert float(accuracy[1]) > 0.8
    simulated = re.search(r"links 4000000,400000: accuracy ([0-9.]+)", reader.output)
    assert simulated is not None, reader.output
    assert float(simulated[1]) > 0.8
    assert re.search(r"[1-9]\d* receipted updates, [1-9]\d* aggregations", reader.output), reader.output
