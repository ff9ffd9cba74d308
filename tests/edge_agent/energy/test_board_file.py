"""The board's file: written whole or not at all, read with one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.energy.board_file import Baseline, BoardFile, Calibration, read_board_file, write_board_file
from regrow.errors import LocalError, UsageError

SAID = BoardFile(
    board="pi",
    calibrations={"ina219 hwmon2": Calibration(gain=1.02, offset_w=-0.03, by="Ann", on="2026-11-21")},
    baselines={"ina219 hwmon2": Baseline(watts=2.7, low_w=2.6, high_w=2.8, seconds=60.0, temperature_c=41.5, on="2026-11-21")},
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "energy.json"
    write_board_file(file, BoardFile(board="pi"))
    write_board_file(file, SAID)
    assert read_board_file(file, "pi") == SAID
    assert [path.name for path in tmp_path.iterdir()] == ["energy.json"]
    assert SAID.calibrations["ina219 hwmon2"].watts(2.0) == pytest.approx(2.01)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "truncated"),
        ('{"format": 1}', "missing required field `board`"),
        ('{"board": "pi", "calibration": {}}', "unknown field `calibration`"),
        ('{"board": "pi", "calibrations": {"x": {"gain": 0, "by": "A", "on": "B"}}}', r"`float` > 0.* at `\$.calibrations"),
        ('{"board": "pi", "calibrations": {"x": {"gain": 1.1}}}', "missing required field `by`"),
        ('{"board": "pi", "format": 2}', "format 2, this version reads 1"),
        ('{"board": "jetson"}', "is of the board jetson, this one is pi"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "energy.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_board_file(file, "pi")


def test_a_file_that_is_absent_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; `regrow measure baseline"):
        read_board_file(tmp_path / "none.json", "pi")
    with pytest.raises(LocalError, match="cannot write"):
        write_board_file(tmp_path / "none" / "energy.json", SAID)
