"""Joules of devices that have no meter, from devices of the same board that have one: a mean with its 95 % prediction interval.

The model of a board type is one power for each phase, and a slope over temperature that all phases share. Units differ from each other, and
stretches of one unit do; the interval is for a unit that was never measured, so it holds both, and few units make it wide. Every unit is
held out once: what a model of the others says of it stands beside what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError, PeerError
from regrow.intervals import t_quantile
from regrow.message import Count, Positive, Rate, Text
from regrow.observations import Phase

FORMAT = 1
REFERENCE_C = 50.0
FEWEST_UNITS = 3  # two to fit and one to hold out
LEAST_SPREAD_C = 2.0  # of temperature within phases, below which no slope can be told
LEAST_ROW_S = 1.0
MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Example:
    """What was measured of one unit over one stretch of one phase."""

    unit: str
    phase: Phase
    seconds: float
    joules: float
    temperature_c: float | None = None


class PhasePower(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Watts of a phase at the reference temperature: mean over units, and standard deviations between units and within one."""

    watts: Rate
    unit_sd_w: Rate
    row_sd_w: Rate
    units: Annotated[int, msgspec.Meta(ge=2, le=100_000)]


class HeldOut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A unit that a model of the others was tried on. inside: of its rows, those within their interval."""

    unit: Text
    joules: Rate
    modelled_j: Rate
    low_j: Rate
    high_j: Rate
    rows: Positive
    inside: Count


class PowerModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model of one board type, as it is kept in a file: JSON of these fields.

    meter: the kind of meter of its units; watts_a_degree: the slope, 0 where none could be told.
    """

    format: int = FORMAT
    board: Text
    meter: Text
    units: Annotated[list[Text], msgspec.Meta(min_length=2, max_length=100_000)]
    rows: Positive
    watts_a_degree: Annotated[float, msgspec.Meta(ge=-10, le=10)]
    phases: dict[Phase, PhasePower]
    held_out: list[HeldOut] = []

    @property
    def name(self) -> str:
        """For the rows that it makes."""
        return f"model of {self.board}"[:64]

    def joules(self, phase: Phase, seconds: float, temperature_c: float | None = None) -> tuple[float, float, float] | None:
        """(mean, low, high) of a stretch on a unit that was never measured; None for a phase that the model does not know.

        Intervals of several stretches add up end by end: they are one unit's, and err together.
        """
        known = self.phases.get(_key(phase))
        if known is None:
            return None
        watts = known.watts + self.watts_a_degree * (0.0 if temperature_c is None else temperature_c - REFERENCE_C)
        half = t_quantile(known.units - 1) * math.sqrt(known.unit_sd_w**2 * (1 + 1 / known.units) + known.row_sd_w**2)
        low, high = max(watts - half, 0.0), max(watts + half, 0.0)
        return max(watts, 0.0) * seconds, low * seconds, high * seconds

    def watts(self, phases: Collection[Phase], temperature_c: float | None = None) -> float | None:
        """What a unit draws while all these go on: idle, and what each adds to it."""
        idle = self.joules("idle", 1.0, temperature_c)
        each = [self.joules(phase, 1.0, temperature_c) for phase in phases]
        known = [said[0] for said in each if said is not None]
        if len(known) < len(each) or not known:
            return None
        if len(known) == 1:
            return known[0]
        return None if idle is None else idle[0] + sum(max(watts - idle[0], 0.0) for watts in known)

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def from_json(data: bytes) -> PowerModel:
    """The model in a file.

    Raises:
        PeerError: it is none, or of another format.
    """
    if len(data) > MAX_JSON_BYTES:
        raise PeerError(f"a power model has at most {MAX_JSON_BYTES} bytes, not {len(data)}")
    try:
        model = msgspec.json.decode(data, type=PowerModel)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(f"no power model: {error}") from error
    if model.format != FORMAT:
        raise PeerError(f"a power model of format {model.format}, this version reads {FORMAT}")
    return model


def fit(board: str, meter: str, examples: Sequence[Example]) -> PowerModel:
    """The model of a board, checked by holding out each unit once.

    Args:
        board: the type, as `edge_agent.board.board_name` says it.
        meter: the kind of meter of all these units.
        examples: stretches of one phase each, none throttled.

    Raises:
        LocalError: fewer than three units, a number that cannot be, or no phase that two units have.
    """
    usable = _checked(examples)
    units = sorted({example.unit for example in usable})
    if len(units) < FEWEST_UNITS:
        have = f"{len(units)} ({', '.join(units)})" if units else "none"
        raise LocalError(f"a power model needs {FEWEST_UNITS} measured units of a board, one of them to hold out; there are {have}")
    held_out = []
    for unit in units:
        rest = [example for example in usable if example.unit != unit]
        held_out += _try(_fit(board, meter, rest), unit, [example for example in usable if example.unit == unit])
    model = _fit(board, meter, usable)
    return msgspec.structs.replace(model, held_out=held_out)


def _checked(examples: Sequence[Example]) -> list[Example]:
    for example in examples:
        numbers = (example.seconds, example.joules, example.temperature_c or 0.0)
        if not all(map(math.isfinite, numbers)) or example.seconds <= 0 or example.joules <= 0:
            raise LocalError(f"{example.unit}, {example.phase}: {example.joules} J in {example.seconds} s cannot be")
    return [example for example in examples if example.seconds >= LEAST_ROW_S]


def _fit(board: str, meter: str, examples: Sequence[Example]) -> PowerModel:
    slope = _slope(examples)
    phases: dict[Phase, PhasePower] = {}
    for phase in sorted({_key(example.phase) for example in examples}):
        found = _phase_power([example for example in examples if _key(example.phase) == phase], slope)
        if found is not None:
            phases[phase] = found
    if not phases:
        raise LocalError("no phase was measured on two units: let the instrumented devices train in one run")
    units = sorted({example.unit for example in examples})
    return PowerModel(board=board, meter=meter, units=units, rows=len(examples), watts_a_degree=slope, phases=phases)


def _slope(examples: Sequence[Example]) -> float:
    """Watts a degree within one phase of one unit, so that neither is taken for the effect of heat."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for example in examples:
        if example.temperature_c is not None:
            groups.setdefault((example.unit, _key(example.phase)), []).append((example.temperature_c, example.joules / example.seconds))
    pairs = [np.asarray(group) - np.mean(group, axis=0) for group in groups.values()]
    degrees = np.concatenate([pair[:, 0] for pair in pairs]) if pairs else np.zeros(0)
    if degrees.size < 10 or float(degrees.std()) < LEAST_SPREAD_C:
        return 0.0
    watts = np.concatenate([pair[:, 1] for pair in pairs])
    return float(np.clip(degrees @ watts / (degrees @ degrees), -10, 10))


def _phase_power(examples: Sequence[Example], slope: float) -> PhasePower | None:
    """None where only one unit has this phase: how units differ cannot be told."""
    of_unit: dict[str, list[float]] = {}
    for example in examples:
        warm_c = 0.0 if example.temperature_c is None else example.temperature_c - REFERENCE_C
        of_unit.setdefault(example.unit, []).append(example.joules / example.seconds - slope * warm_c)
    if len(of_unit) < 2:
        return None
    rows: list[NDArray[np.float64]] = [np.asarray(watts) for watts in of_unit.values()]
    means = np.asarray([watts.mean() for watts in rows])
    freedom = sum(watts.size - 1 for watts in rows)
    within = sum(float(((watts - watts.mean()) ** 2).sum()) for watts in rows) / freedom if freedom else 0.0
    mean_w = max(float(means.mean()), 0.0)
    return PhasePower(watts=mean_w, unit_sd_w=float(means.std(ddof=1)), row_sd_w=math.sqrt(within), units=len(of_unit))


def _try(model: PowerModel, unit: str, examples: Sequence[Example]) -> list[HeldOut]:
    """What the model says of a unit that it never saw; nothing where it knows none of its phases."""
    said = [(example.joules, model.joules(example.phase, example.seconds, example.temperature_c)) for example in examples]
    known = [(joules, guess) for joules, guess in said if guess is not None]
    if not known:
        return []
    mean, low, high = (sum(guess[place] for _, guess in known) for place in range(3))
    inside = sum(guess[1] <= joules <= guess[2] for joules, guess in known)
    total = sum(joules for joules, _ in known)
    return [HeldOut(unit=unit, joules=total, modelled_j=mean, low_j=low, high_j=high, rows=len(known), inside=inside)]


def _key(phase: Phase) -> Phase:
    """A baseline is idleness on purpose."""
    return "idle" if phase == "baseline" else phase
