"""Tables for one's own analysis: the same rows as CSV, Parquet or JSON. What is not known is an empty cell, never 0."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.errors import UsageError

FORMATS = ("csv", "parquet", "json")


@dataclass(frozen=True, slots=True)
class Frame:
    """A named table; every row has a value for each column, None where it is not known."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def dicts(self) -> list[dict[str, Any]]:
        """The rows with their columns' names."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def frame(name: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> Frame:
    """A table of these rows.

    Args:
        columns: in this order; others that rows have come behind them, in the order of their first appearance.
    """
    rows = list(rows)
    found = tuple(dict.fromkeys([*columns, *(column for row in rows for column in row)]))
    return Frame(name, found, tuple(tuple(row.get(column) for column in found) for row in rows))


def formats_of(text: str) -> list[str]:
    """Formats by name, commas between.

    Raises:
        UsageError: one is unknown.
    """
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in FORMATS:
            raise UsageError(f"--format {name!r}: {', '.join(FORMATS)}, or several with commas between")
    return chosen


def write_frames(frames: Iterable[Frame], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write every table in every format; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    writers = {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}
    files = []
    for each in frames:
        for kind in formats:
            files.append(folder / f"{each.name}.{kind}")
            writers[kind](each, files[-1])
    return files


def _write_csv(table: Frame, file: Path) -> None:
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(table.columns)
        writer.writerows([_cell(value) for value in row] for row in table.rows)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def _write_json(table: Frame, file: Path) -> None:
    file.write_text(json.dumps(table.dicts(), indent=0) + "\n")


def _write_parquet(table: Frame, file: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    arrays = []
    for index in range(len(table.columns)):
        values = [_cell(row[index]) for row in table.rows]
        array = pa.array(values)
        arrays.append(array.cast(pa.float64()) if pa.types.is_null(array.type) else array)  # nothing known: still a number
    parquet.write_table(pa.Table.from_arrays(arrays, names=list(table.columns)), file)
