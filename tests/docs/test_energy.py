"""What docs/energy.md shows is what the code reads and what the bench measured."""

import json

import msgspec

from broker_server.credentials import may_read, may_write
from edge_agent.energy.board_file import BoardFile
from tests.docs.blocks import blocks
from tests.docs.generate import ROOT

PAGE = ROOT / "docs" / "energy.md"


def test_the_boards_file_of_the_page_is_one() -> None:
    (shown,) = [block.text for block in blocks(PAGE) if block.text.startswith("{")]
    said = msgspec.json.decode(shown, type=BoardFile)
    assert said.baselines.keys() == said.calibrations.keys() == {"ina219 hwmon2"}


def test_sampling_costs_what_the_page_says_and_at_most_one_percent() -> None:
    result = json.loads((ROOT / "bench" / "results" / "energy.json").read_text())
    text = PAGE.read_text()
    assert result["command"] in text
    shares = [meter["share_of_a_core"] for meter in result["meters"]]
    assert (result["hz"], result["limit"], result["worst"]) == (10.0, 0.01, max(shares))
    assert max(shares) <= result["limit"]
    assert len(shares) >= 10
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.endswith(" % |")]
    assert [row.rsplit("|", 2)[1].strip() for row in rows][: len(shares)] == [f"{share:.2%}".replace("%", " %") for share in shares]


def test_a_meter_with_a_login_of_its_own_speaks_where_the_page_says_and_another_device_listens() -> None:
    topic = "regrow/v1/device/pi-07-meter/meter"
    assert f"--meter mqtt:{topic}" in PAGE.read_text()
    assert may_write("pi-07-meter", topic)
    assert may_read("pi-07", topic)
    assert not may_write("pi-07", topic)
