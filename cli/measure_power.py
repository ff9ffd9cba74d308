"""`regrow measure power`, `baseline`, `pulse`, `align` and `fit`: what devices draw."""

from __future__ import annotations

import argparse
import csv
import json
import sqlite3
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cli.arguments import GATEWAY_HOME
from edge_agent.board import board_name
from edge_agent.energy.account import SAMPLE_HZ, Energy
from edge_agent.energy.board_file import Baseline, BoardFile, read_board_file, write_board_file
from edge_agent.energy.choose import open_meter
from edge_agent.energy.external import MqttMeter
from edge_agent.energy.meter import NoMeter
from edge_agent.energy.pulse import make_pulse
from regrow import power_model
from regrow.errors import LocalError, UsageError
from regrow.intervals import half_interval
from regrow.observations import PowerSeen, Row
from regrow.power_model import Example
from regrow.pulse import PULSE_S, find_pulse

LEAST_BASELINE_S = 60.0
LEAST_KNOWN = 0.9
LATE_S = 2.0  # of the last second's row
LONGEST_ROW_S = 60.0
MOST_TRACE_LINES = 5_000_000


# ---- power ---------------------------------------------------------------------------------------------------------------------------


def power(options: argparse.Namespace) -> int:
    """Show power until the time is over.

    Raises:
        LocalError: nothing was measured.
    """
    joules = known_s = told_s = 0.0
    why = "the time was too short"
    began_s = time.monotonic()
    board = board_name()
    known = None if options.calibration is None else read_board_file(options.calibration, board)
    with _sampling(options.meter, known, options.hz) as (energy, rows):
        while options.seconds is None or (
            told_s <= max(options.seconds - 0.5, 0.0) and time.monotonic() - began_s < options.seconds + LATE_S
        ):
            for row in _next_second(rows):
                told_s += row.seconds
                joules += (row.watts or 0.0) * row.seconds
                known_s += row.seconds if row.watts is not None else 0.0
                why = energy.why or why
                said = _as_json(row, board, joules, known_s, energy) if options.json else _in_words(row, joules, known_s, energy)
                print(said, flush=True)
    if not known_s:
        raise LocalError(f"nothing was measured: {why}")
    return 0


def _as_json(row: PowerSeen, board: str, joules: float, known_s: float, energy: Energy) -> str:
    said: dict[str, Any] = {name: getattr(row, name) for name in row.__struct_fields__}
    said |= {"meter": row.meter if row.watts is not None else energy.why}
    said |= {"board": board, "joules": joules if known_s else None, "measured_s": known_s, "overhead": round(energy.overhead, 5)}
    return json.dumps(said)


def _in_words(row: PowerSeen, joules: float, known_s: float, energy: Energy) -> str:
    watts = "unmeasured" if row.watts is None else f"{row.watts:.2f} W"
    total = f"{joules:.1f} J in {known_s:.0f} s" if known_s else "no joules"
    heat = "temperature unknown" if row.temperature_c is None else f"{row.temperature_c:.0f} C"
    said = f"{row.meter} ({row.certainty})" if row.watts is not None else energy.why
    return f"{watts}; {total}; {heat}; {row.marked or 'not slowed'}; {said}; sampling {energy.overhead:.2%} of a core"


@contextmanager
def _sampling(said: str, known: BoardFile | None, hz: float) -> Iterator[tuple[Energy, list[PowerSeen]]]:
    """An `Energy` that gathers a row of power a second."""
    meter = open_meter(said)
    if isinstance(meter, MqttMeter):
        raise UsageError("--meter mqtt:... needs the agent's link: give it to `regrow agent`")
    rows: list[PowerSeen] = []

    def take(row: Row) -> None:
        if isinstance(row, PowerSeen):
            rows.append(row)

    energy = Energy(meter, take, known=known)
    energy.record(hz, row_s=1.0)
    energy.start()
    try:
        yield energy, rows
    finally:
        energy.close()


def _next_second(rows: list[PowerSeen]) -> list[PowerSeen]:
    """Wait for what has come since the last time."""
    time.sleep(0.25)
    new = rows[:]
    del rows[: len(new)]
    return new


# ---- baseline ------------------------------------------------------------------------------------------------------------------------


def baseline(options: argparse.Namespace) -> int:
    """Measure and keep the idle baseline; Ctrl-C keeps nothing."""
    if options.seconds < LEAST_BASELINE_S:
        raise UsageError(f"--seconds {options.seconds:g}: a baseline takes {LEAST_BASELINE_S:g} s at least")
    file, board = options.calibration, board_name()
    before = read_board_file(file, board) if file.exists() else BoardFile(board=board)
    gathered: list[PowerSeen] = []
    began_s = time.monotonic()
    with _sampling(options.meter, before, SAMPLE_HZ) as (energy, rows):
        if isinstance(energy.meter, NoMeter):
            raise LocalError(f"there is nothing to measure with: {energy.meter.reason}")
        name = energy.meter.name
        print(f"{name}: keep this board idle for {options.seconds:g} s; Ctrl-C keeps nothing", flush=True)
        while time.monotonic() - began_s < options.seconds + 1.5:  # the last second's row comes after it
            new = _next_second(rows)
            gathered += new
            for row in new[-1:]:
                watts = f"{row.watts:.2f} W" if row.watts is not None else row.meter
                print(f"{min(time.monotonic() - began_s, options.seconds):3.0f} of {options.seconds:g} s: {watts}", flush=True)
    found = baseline_of(gathered, options.seconds, energy.why)
    write_board_file(file, BoardFile(board=board, calibrations=before.calibrations, baselines={**before.baselines, name: found}))
    marked = f"; slowed for {found.marked_s:.0f} s, which are left out" if found.marked_s else ""
    print(f"{found.watts:.3f} W idle (95 %: {found.low_w:.3f} to {found.high_w:.3f}) over {found.seconds:.0f} s{marked}; kept in {file}")
    return 0


def baseline_of(rows: list[PowerSeen], wanted_s: float, unknown: str) -> Baseline:
    """Mean and interval over the seconds that were measured while nothing slowed the board.

    The interval is over means of ten seconds, since neighbouring seconds are alike.

    Args:
        rows: of power, a second each.
        wanted_s: that should have been measured.
        unknown: why some were not, if any.

    Raises:
        LocalError: too little was measured.
    """
    known = [row for row in rows if row.watts is not None and not row.marked]
    seconds = sum(row.seconds for row in known)
    if seconds < LEAST_KNOWN * wanted_s:
        why = unknown or ", ".join(sorted({row.marked for row in rows if row.marked}))
        raise LocalError(f"only {seconds:.0f} of {wanted_s:g} s were measured undisturbed{': ' + why if why else ''}; nothing was kept")
    watts = _mean_w(known)
    blocks = [known[first : first + 10] for first in range(0, len(known), 10)]
    means = [_mean_w(block) for block in blocks if len(block) >= 5]
    half = half_interval(means) or 0.0
    heats = [row.temperature_c for row in known if row.temperature_c is not None]
    return Baseline(
        watts=watts,
        low_w=max(watts - half, 0.0),
        high_w=watts + half,
        seconds=seconds,
        marked_s=sum(row.seconds for row in rows if row.marked),
        temperature_c=sum(heats) / len(heats) if heats else None,
        on=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _mean_w(rows: list[PowerSeen]) -> float:
    return sum((row.watts or 0.0) * row.seconds for row in rows) / sum(row.seconds for row in rows)


# ---- sync pulse ----------------------------------------------------------------------------------------------------------------------


def pulse(options: argparse.Namespace) -> int:
    """Make a sync pulse now."""
    if not options.json:
        print(f"loading every core in a pattern for {PULSE_S:g} s", flush=True)
    offset_s = time.time() - time.monotonic()
    began_s = make_pulse() + offset_s
    print(json.dumps({"began_s": began_s}) if options.json else f"the pulse began at {began_s:.3f} (unix seconds): --pulse-s {began_s:.3f}")
    return 0


def align(options: argparse.Namespace) -> int:
    """Find the pulse in a trace."""
    times, watts = read_trace(options.trace)
    try:
        found = find_pulse(times, watts)
    except LocalError as error:
        raise LocalError(f"{options.trace}: {error}") from error
    offset_s = found.offset_s(options.pulse_s)
    if options.json:
        print(json.dumps({"offset_s": offset_s, "began_s": found.began_s, "match": found.match, "rise_w": found.rise_w}))
    else:
        where = f"the pulse begins at {found.began_s:.3f} in the trace (match {found.match:.2f}, {found.rise_w:.2f} W above rest)"
        print(f"{where}: the meter's clock is {abs(offset_s):.3f} s {'ahead of' if offset_s >= 0 else 'behind'} the device's")
    return 0


def read_trace(path: Path) -> tuple[list[float], list[float]]:
    """(seconds, watts) of a CSV file with these two first columns.

    Raises:
        UsageError: it is absent, or a line holds something else.
    """
    times: list[float] = []
    watts: list[float] = []
    try:
        with path.open(newline="", encoding="utf-8", errors="strict") as stream:
            for number, line in enumerate(csv.reader(stream), 1):
                if number > MOST_TRACE_LINES:
                    raise UsageError(f"{path}: more than {MOST_TRACE_LINES} lines; cut it to the minutes around the pulse")
                try:
                    at_s, power_w = float(line[0]), float(line[1])
                except (IndexError, ValueError) as error:
                    if number == 1 or not "".join(line).strip():
                        continue  # the head, or an empty line
                    raise UsageError(f"{path}:{number}: {','.join(line)[:40]!r} is not `seconds,watts`") from error
                times.append(at_s)
                watts.append(power_w)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: {error}; expected a CSV file, lines of `seconds,watts`") from error
    return times, watts


# ---- model ---------------------------------------------------------------------------------------------------------------------------


def fit(options: argparse.Namespace) -> int:
    """Make a power model and say how it does on each unit that is held out."""
    database = options.runs / GATEWAY_HOME / "observations.sqlite"
    if not database.is_file():
        raise UsageError(f"{database}: there is none; --runs names the folder of a gateway that has observed devices")
    kind, examples = read_examples(database, options.device, options.kind)
    model = power_model.fit(options.board, kind, examples)
    options.out.write_bytes(model.to_json())
    for phase, known in model.phases.items():
        print(f"{phase:9} {known.watts:7.3f} W; {known.unit_sd_w:.3f} W between {known.units} units, {known.row_sd_w:.3f} W within one")
    for held in model.held_out:
        error = held.modelled_j / held.joules - 1
        said = f"{held.modelled_j:.0f} J modelled ({held.low_j:.0f} to {held.high_j:.0f}), {held.joules:.0f} J measured: {error:+.1%}"
        print(f"without {held.unit}: {said}; {held.inside} of {held.rows} stretches inside their interval")
    print(f"{options.out}: from {model.rows} stretches of {len(model.units)} units ({kind})")
    return 0


def read_examples(database: Path, devices: list[str] | None, kind: str | None) -> tuple[str, list[Example]]:
    """(the kind of meter, what was measured of each device), throttled and overlapping stretches left out.

    Raises:
        LocalError: the database cannot be read.
        UsageError: there is nothing of that kind, or meters of several kinds.
    """
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(
                "SELECT device, at_s, seconds, phase, joules, meter FROM phases "
                "WHERE joules > 0 AND seconds > 0 AND certainty IN ('measured', 'estimated') AND marked = '' ORDER BY device, at_s"
            ).fetchall()
            heat: dict[str, tuple[list[float], list[float]]] = {}
            for device, at_s, degrees in connection.execute(
                "SELECT device, at_s, temperature_c FROM power WHERE temperature_c IS NOT NULL ORDER BY device, at_s"
            ):
                times, values = heat.setdefault(device, ([], []))
                times.append(at_s)
                values.append(degrees)
    except sqlite3.Error as error:
        raise LocalError(f"{database}: {error}; is it a gateway's observations.sqlite of this version?") from error
    wanted = [row for row in rows if (not devices or row[0] in devices) and (kind is None or row[5].split(" ")[0] == kind)]
    kinds = sorted({row[5].split(" ")[0] for row in wanted})
    if len(kinds) != 1:
        what = f"meters of the kinds {', '.join(kinds)}; choose one with --kind" if kinds else "no measured stretches of such devices"
        raise UsageError(f"{database}: {what}")
    examples = [
        Example(device, phase, seconds, joules, _mean_between(heat.get(device), at_s, at_s + seconds))
        for device, at_s, seconds, phase, joules, _ in wanted
    ]
    return kinds[0], examples


def _mean_between(series: tuple[list[float], list[float]] | None, began_s: float, ended_s: float) -> float | None:
    """Rows of power are at their ends; for a short stretch the first one after it will do."""
    if series is None:
        return None
    times, values = series
    first, last = bisect_left(times, began_s), bisect_right(times, ended_s)
    if first == last and last < len(times) and times[last] - ended_s < LONGEST_ROW_S:
        last += 1
    inside = values[first:last]
    return sum(inside) / len(inside) if inside else None
