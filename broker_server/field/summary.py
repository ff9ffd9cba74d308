"""The tables of a field run's report: means over repetitions with 95 % intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import mean

from broker_server.field.observed import ORDER, TELLING, Energy, added, length_of
from broker_server.field.record import FieldRecord, Recorded, reach, time_mean
from broker_server.html_report import Table
from regrow.intervals import half_interval

PHASES = ("train", "transmit", "receive", "idle")
UNKNOWN = "-"
UNMEASURED = "unmeasured"


def default_target(record: FieldRecord) -> float:
    """95 % of the best method's mean final score, in steps of one point; that score itself where it is not above 0."""
    best = max((mean(finals) for finals in (_finals(record.of(method)) for method in record.methods) if finals), default=0.0)
    return math.floor(95 * best) / 100 if best > 0 else best


def _finals(runs: Sequence[Recorded]) -> list[float]:
    return [curve[-1].score for curve in (run.curve for run in runs) if curve]


def with_interval(values: Sequence[float], digits: int) -> str:
    """mean ± half of the 95 % interval; one value has none."""
    if not values:
        return UNKNOWN
    half = half_interval(values)
    return f"{mean(values):.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def energy_text(energies: Sequence[Energy | None]) -> str:
    """Mean joules over repetitions; said of what kind they are, with the model's own interval, and how much of the time they cover."""
    there = [energy for energy in energies if energy is not None]
    known = [energy for energy in there if energy.joules is not None]
    if not known:
        return UNMEASURED
    text = with_interval([energy.joules or 0.0 for energy in known], 1)
    certainty = max((energy.certainty for energy in known), key=ORDER.index)
    if certainty != "measured":
        text += f", {certainty}"
    ranged = [energy for energy in known if energy.low_j is not None and energy.high_j is not None]
    if ranged:
        low, high = mean(energy.low_j or 0.0 for energy in ranged), mean(energy.high_j or 0.0 for energy in ranged)
        text += f" {low:.1f} to {high:.1f}"
    covered = sum(energy.known_s for energy in there) / max(sum(energy.seconds for energy in there), 1e-9)
    return text if covered > 0.995 else f"{text} ({100 * covered:.0f} % of the time, else {UNMEASURED})"


def overview(record: FieldRecord, target: float) -> Table:
    """A line a method."""
    head = ["method", "runs", f"final {record.score}", f"s to {target:g}", f"MB to {target:g}", f"J to {target:g}",
            "versions", "updates", "staleness", "mean density", "MB in all", "J in all"]  # fmt: skip
    lines = []
    for method in record.methods:
        runs = record.of(method)
        found = [reach(run.curve, target) for run in runs]
        staleness = [value for value in (_staleness(run) for run in runs) if value is not None]
        lines.append(
            [
                method,
                str(len(runs)),
                with_interval(_finals(runs), 3),
                _to_target([None if point is None else point.elapsed_s for point in found], 0),
                _to_target([None if point is None else point.bytes / 1e6 for point in found], 2),
                _joules_to([None if point is None else (point.joules,) for point in found]),
                with_interval([run.course.points[-1].version if run.course.points else 0 for run in runs], 0),
                with_interval([sum(len(device.updates) for device in run.course.devices.values()) for run in runs], 0),
                with_interval(staleness, 2),
                with_interval([value for value in (run.mean_density() for run in runs) if value is not None], 2),
                with_interval([run.bytes_in_all / 1e6 for run in runs], 2),
                _energy_in_all(runs),
            ]
        )
    return Table(f"Methods: means over repetitions ± half of a 95 % interval; the target is {record.score} {target:g}", head, lines)


def _energy_in_all(runs: Sequence[Recorded]) -> str:
    """Of all devices, over the runs in which each of them knows its own; where that is none, how many do in which run."""
    energies = [energy for energy in (run.energy() for run in runs) if energy is not None]
    if not energies:
        known, there = (
            _from_to([len(names) for names in found]) for found in zip(*((run.metered, run.devices) for run in runs), strict=True)
        )
        return f"{UNMEASURED} (known of {known} of {there} devices)"
    return energy_text(energies) + ("" if len(energies) == len(runs) else f" (in {len(energies)} of {len(runs)})")


def _from_to(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _staleness(run: Recorded) -> float | None:
    values = [update.staleness for device in run.course.devices.values() for update in device.updates]
    return mean(values) if values else None


def _to_target(values: Sequence[float | None], digits: int) -> str:
    reached = [value for value in values if value is not None]
    if len(reached) == len(values):
        return with_interval(reached, digits)
    return f"{with_interval(reached, digits)} (in {len(reached)} of {len(values)})" if reached else "never"


def _joules_to(values: Sequence[tuple[float | None] | None]) -> str:
    reached = [value for value in values if value is not None]
    if not reached:
        return "never"
    known = [joules for (joules,) in reached if joules is not None]
    if not known:
        return UNMEASURED
    return with_interval(known, 1) + ("" if len(known) == len(values) else f" (in {len(known)} of {len(values)})")


def differences(record: FieldRecord, target: float) -> Table | None:
    """Each method against the plan's first one within the blocks, where drift hits both; None with one method."""
    first, *others = record.methods
    if not others:
        return None
    base = {run.repetition.block: run for run in record.of(first)}
    lines = []
    for method in others:
        pairs = [(run, base[run.repetition.block]) for run in record.of(method) if run.repetition.block in base]
        cells = [method, str(len(pairs))]
        for value, digits in _compared(target):
            both = [(value(run), value(other)) for run, other in pairs]
            cells.append(with_interval([mine - theirs for mine, theirs in both if mine is not None and theirs is not None], digits))
        lines.append(cells)
    head = ["method", "blocks", f"final {record.score}", f"s to {target:g}", f"MB to {target:g}", f"J to {target:g}"]
    return Table(f"Differences to {first} within the same block: mean ± half of a 95 % interval", head, lines)


def _compared(target: float) -> list[tuple[Callable[[Recorded], float | None], int]]:
    def final(run: Recorded) -> float | None:
        curve = run.curve
        return curve[-1].score if curve else None

    def seconds(run: Recorded) -> float | None:
        point = reach(run.curve, target)
        return None if point is None else point.elapsed_s

    def megabytes(run: Recorded) -> float | None:
        point = reach(run.curve, target)
        return None if point is None else point.bytes / 1e6

    def joules(run: Recorded) -> float | None:
        point = reach(run.curve, target)
        return None if point is None else point.joules

    return [(final, 3), (seconds, 0), (megabytes, 2), (joules, 1)]


def by_device(record: FieldRecord, method: str) -> Table:
    """A line a device of one method's repetitions."""
    head = ["device", "up kbit/s", "down kbit/s", "density", "staleness", "updates", *(f"J {phase}" for phase in PHASES), "idle W before",
            "telemetry kB", "missing s"]  # fmt: skip
    runs, lines = record.of(method), []
    for name in record.devices:
        mine = [run for run in runs if name in run.devices]
        if not mine:
            lines.append([name, *["took no part"], *[UNKNOWN] * (len(head) - 2)])
            continue
        rates = {up: [bps / 1000 for bps in (goodput_bps(run, name, up) for run in mine) if bps is not None] for up in (True, False)}
        courses = [run.course.devices[name] for run in mine if name in run.course.devices]
        densities = [time_mean(run.course.devices[name].densities, run.step.end_s) for run in mine if name in run.course.devices]
        energies = [run.observed[name].energy() if name in run.observed else {} for run in mine]
        lines.append(
            [
                name,
                with_interval(rates[True], 0),
                with_interval(rates[False], 0),
                with_interval([value for value in densities if value is not None], 2),
                with_interval([course.staleness for course in courses if course.staleness is not None], 2),
                with_interval([len(course.updates) for course in courses], 0),
                *(energy_text([energy.get(phase) for energy in energies]) for phase in PHASES),
                _baseline_watts(mine, name),
                _telling(mine, name),
                _missing(mine, name),
            ]
        )
    caption = f"{method}: devices, means over {len(runs)} {'repetition' if len(runs) == 1 else 'repetitions'}"
    return Table(caption, head, lines)


def goodput_bps(run: Recorded, name: str, up: bool) -> float | None:
    """Observed goodput; where no transfer was observed, what the device told of its uplink."""
    observed = run.observed[name].goodput_bps(up) if name in run.observed else None
    if observed is not None or not up or name not in run.course.devices:
        return observed
    told = run.course.devices[name].uplinks
    return told[-1][1] if told else None


def _baseline_watts(runs: Sequence[Recorded], name: str) -> str:
    watts = []
    for run in runs:
        total = added(run.baseline[name].energy().values()) if name in run.baseline else None
        if total is not None and total.joules is not None and total.known_s > 0:
            watts.append(total.joules / total.known_s)
    return with_interval(watts, 2) if watts else UNMEASURED


def _telling(runs: Sequence[Recorded], name: str) -> str:
    """Packets of telemetry and observations, which are counted apart."""
    mine = [run.observed[name] for run in runs if name in run.observed]
    known = [observed.bytes_until("packet_bytes", TELLING, [observed.end_s])[0] / 1000 for observed in mine if observed.rows["transfers"]]
    return with_interval(known, 1)


def _missing(runs: Sequence[Recorded], name: str) -> str:
    seconds = [length_of(run.observed[name].unknown()) if name in run.observed else run.step.end_s - run.step.start_s for run in runs]
    return with_interval(seconds, 0)


def repetitions(record: FieldRecord) -> Table:
    """A line a run, in order."""
    lines = []
    for run in record.runs:
        curve, step = run.curve, run.step
        lines.append(
            [
                str(run.repetition.number),
                str(run.repetition.block),
                run.repetition.method,
                step.run,
                _clock(step.start_s),
                f"{step.end_s - step.start_s:.0f}",
                f"{curve[-1].score:.3f}" if curve else UNKNOWN,
                ", ".join(step.absent) or UNKNOWN,
                step.reason,
            ]
        )
    lines += [
        [str(step.number), UNKNOWN, UNKNOWN, step.run, _clock(step.start_s), f"{step.end_s - step.start_s:.0f}", UNKNOWN, UNKNOWN,
         f"not counted: {step.reason}"]
        for step in record.interrupted
    ]  # fmt: skip
    head = ["number", "block", "method", "run", "began", "seconds", f"final {record.score}", "did not answer before it", "ended by"]
    return Table("Runs in their order (interrupted ones last)", head, lines)


def clocks(record: FieldRecord) -> Table:
    """Of each device: its clock against the gateway's, over all runs."""
    lines = []
    for name in record.devices:
        found = [run.observed[name].offset for run in record.runs if name in run.observed]
        known = [offset for offset in found if offset.known]
        if not known:
            lines.append([name, "unknown, taken as 0", UNKNOWN, UNKNOWN])
            continue
        best = min(known, key=lambda offset: math.inf if offset.error_s is None else offset.error_s)
        error = "one way only" if best.error_s is None else f"{1000 * best.error_s:.1f}"
        spread = max(offset.seconds for offset in known) - min(offset.seconds for offset in known)
        lines.append([name, f"{1000 * best.seconds:+.1f}", error, f"{1000 * spread:.1f}"])
    return Table("Clocks: device minus gateway, ms", ["device", "offset", "error at most", "change over the runs"], lines)


def gaps(record: FieldRecord) -> Table:
    """Every stretch in which nothing is known of a device."""
    lines = []
    for run in record.runs:
        for name in record.devices:
            if name not in run.observed:
                lines.append([name, run.step.run, "the whole run", "no observations came from it"])
                continue
            lost = run.observed[name].lost()
            for begin, end in run.observed[name].unknown():
                why = "its journal was full" if any(a < end and b > begin for a, b in lost) else "no row tells of it"
                lines.append([name, run.step.run, f"{begin - run.step.start_s:.0f} to {end - run.step.start_s:.0f} s", why])
    return Table("Missing intervals", ["device", "run", "when", "why"], lines)


def marks(record: FieldRecord) -> Table:
    """What people typed and devices marked."""
    return Table("Annotations and marks", ["time", "by", "what"], [[_clock(at), who or "a person", text] for at, who, text in record.marks])


def _clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
