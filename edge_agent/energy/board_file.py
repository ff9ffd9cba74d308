"""What is known of one board's meters, in a file that a person may write too: calibrations and idle baselines, by the meter's name.

    {"format": 1,
     "board": "raspberry-pi-5-model-b",
     "calibrations": {"ina219 hwmon2": {"gain": 1.021, "offset_w": -0.03, "by": "Ann", "on": "2026-11-21"}},
     "baselines": {"ina219 hwmon2": {"watts": 2.71, "low_w": 2.69, "high_w": 2.73, "seconds": 60.0, "marked_s": 0.0,
                                     "temperature_c": 41.5, "on": "2026-11-21T09:30:00Z"}}}

True watts are gain x what the meter says + offset_w. baselines are written by `regrow measure baseline`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from edge_agent.state import sync_folder
from regrow.errors import LocalError, UsageError
from regrow.message import Celsius

FORMAT = 1
_Gain = Annotated[float, msgspec.Meta(gt=0, le=1000)]
_Offset = Annotated[float, msgspec.Meta(ge=-1000, le=1000)]
_Watts = Annotated[float, msgspec.Meta(gt=0, le=10_000)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e7)]
_Said = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a meter errs. by: whoever found that out; on: the day."""

    gain: _Gain = 1.0
    offset_w: _Offset = 0.0
    by: _Said
    on: _Said

    def watts(self, said_w: float) -> float:
        """The true watts, as far as is known."""
        return self.gain * said_w + self.offset_w


class Baseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the board draws when it does nothing: mean and its 95 % interval; marked_s: of the seconds, those throttled."""

    watts: _Watts
    low_w: Annotated[float, msgspec.Meta(ge=0, le=10_000)]
    high_w: _Watts
    seconds: _Seconds
    marked_s: _Seconds = 0.0
    temperature_c: Celsius | None = None
    on: _Said


class BoardFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One board's file."""

    format: int = FORMAT
    board: _Said
    calibrations: dict[str, Calibration] = {}
    baselines: dict[str, Baseline] = {}


def read_board_file(path: Path, board: str) -> BoardFile:
    """The file of this board.

    Raises:
        UsageError: it is absent, no such file, or of another board.
    """
    try:
        said = msgspec.json.decode(path.read_bytes(), type=BoardFile)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; `regrow measure baseline --calibration {path}` begins one") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}; docs/energy.md shows what stands in it") from error
    if said.format != FORMAT:
        raise UsageError(f"{path}: format {said.format}, this version reads {FORMAT}")
    if said.board != board:
        raise UsageError(f"{path} is of the board {said.board}, this one is {board}: every board has a file of its own")
    return said


def write_board_file(path: Path, said: BoardFile) -> None:
    """Replace the file; when this returns it survives a power cut.

    Raises:
        LocalError: the disk failed; the old file then stays.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("wb") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode({**msgspec.structs.asdict(said)}), indent=1) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)  # noqa: PTH105 - as in edge_agent.state
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise LocalError(f"cannot write {path}: {error.strerror or error}; name another file with --calibration") from error
