"""Gradual model restoration: when training stalls, or when it costs no more, somebody gets a larger part of the model.

One early-stopping counter per client and one for the global model. The state is a frozen value that msgspec writes
as JSON, because the coordinator snapshots it; `evaluate` is called once every `every` aggregations, `planned` whenever a planned point has
passed in between.

Where the paper leaves it open, ours: a raise of rho_min resets every counter completely, also the pause after a raise;
a scheduled point raises rho_min and every client by one rung; the `fixed` trigger finishes like `plateau` does, by the
global model's counter, which runs only when the last point has passed.

The `pace` trigger is ours. Learning curves are about straight over the logarithm of time: what a model gains in a round of tau seconds at
time t is a share of tau / t. An update is late by its round, so what it loses by that depends on tau / t alone, and a round may become
longer as t grows, at no cost. So a client has the largest density whose round takes at most 1 / PACE_ROUNDS of the time that training
has lasted: rho_i(t) = t / (PACE_ROUNDS * tbar_i), tbar_i being its measured round time normalised to full density, as in PR-FL's rule.
16, 32 and 64 were compared by validation on seeds that no committed run has. Nobody waits for a stall, and nothing is to be tuned: another
link, model or local work changes tbar_i. A stall of the global model, for the final patience, still raises rho_min and at last ends
training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from regrow.errors import LocalError

GRID = 64  # densities that no ladder gives are rounded to 1/64, which bounds the number of levels
MAX_FINAL_PATIENCE = 50  # evaluations
PACE_ROUNDS = 32  # rounds of its length that training must have lasted before a client gets it


@dataclass(frozen=True)
class RestorationConfig:
    """How the model is restored.

    Args:
        trigger: `none`; `plateau` by the counters; `fixed` at the planned points; `mixed` by both; `pace` by round times.
        step: to the next rung of the `ladder`, or by a `fixed` delta_density (PR-FL: 0.2), rounded to 1/64.
        delta_density: size of a fixed step, (0, 1].
        patience: p, evaluations without progress that a counter bears, >= 1.
        min_delta: by how much a score must beat the best one, >= 0.
        every: I, aggregations between evaluations, >= 1; the caller counts them.
        ladder: densities, ascending, the last 1.0.
        planned: fractions of the planned duration at which everybody is raised, ascending.

    Raises:
        LocalError: a value is out of range.
    """

    trigger: Literal["none", "plateau", "pace", "fixed", "mixed"] = "plateau"
    step: Literal["ladder", "fixed"] = "ladder"
    delta_density: float = 0.2
    patience: int = 5
    min_delta: float = 0.001
    every: int = 5
    ladder: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    planned: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)

    def __post_init__(self) -> None:
        if self.trigger not in ("none", "plateau", "pace", "fixed", "mixed") or self.step not in ("ladder", "fixed"):
            raise LocalError(f"restoration: unknown trigger {self.trigger!r} or step {self.step!r}")
        if not 0.0 < self.delta_density <= 1.0 or self.patience < 1 or self.every < 1:
            raise LocalError("restoration: needs delta_density in (0, 1], patience >= 1 and every >= 1")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0.0):
            raise LocalError(f"restoration: min_delta = {self.min_delta} must be finite and >= 0")
        if list(self.ladder) != sorted({*self.ladder, 1.0}) or self.ladder[0] <= 0.0:
            raise LocalError(f"restoration: ladder {self.ladder} must ascend from above 0 to 1.0")
        if list(self.planned) != sorted(set(self.planned)):
            raise LocalError(f"restoration: planned points {self.planned} must ascend")


@dataclass(frozen=True)
class Counter:
    """Early stopping: the best score yet, evaluations since, and evaluations still to sit out."""

    best: float | None = None
    stalled: int = 0
    left_alone: int = 0


@dataclass(frozen=True)
class RestorationState:
    """Everything that restoration remembers.

    rho_min 0.0 means the ladder's first rung; `minimum` is each raised client's own lower bound (PR-FL's rho_min_i);
    `points` counts the planned points that have passed.
    """

    rho_min: float = 0.0
    points: int = 0
    whole: Counter = field(default_factory=Counter)
    clients: dict[str, Counter] = field(default_factory=dict)
    minimum: dict[str, float] = field(default_factory=dict)


def evaluate(
    state: RestorationState,
    config: RestorationConfig,
    densities: Mapping[str, float],
    level_scores: Mapping[float, float],
    global_score: float | None,
    progress: float,
    *,
    elapsed_s: float = 0.0,
    full_round_s: Mapping[str, float] | None = None,
    limits: Mapping[str, float] | None = None,
) -> tuple[RestorationState, dict[str, float], bool, list[str]]:
    """One evaluation: who is raised to which density, and whether training is finished.

    Args:
        state: what the last evaluation returned. Not modified.
        config: the rules.
        densities: client -> its density now.
        level_scores: density -> score of the global model's prefix, higher is better; a level without reports is
            absent and leaves its clients' counters as they are.
        global_score: of the global model, or None when nobody reported.
        progress: elapsed / planned duration, 0 without a plan.
        elapsed_s: since the first aggregation, for `pace`.
        full_round_s: client -> tbar_i, for `pace`; clients without a measured round stay where they are.
        limits: client -> what its memory holds, for those that do not hold the whole model; nothing ever raises them above it.

    Returns:
        The new state; client -> density for every client; whether training is finished; a reason for each change.

    Source: FedGMR section on GMR, PR-FL's recovery; algorithms.md section 5.
    """
    clients = {who: state.clients.get(who, Counter()) for who in densities}  # who left is forgotten
    limits = limits or {}
    state = replace(state, rho_min=max(state.rho_min, config.ladder[0]), clients=clients)
    # Who came late is as far as everybody; before the first raise a continuous rule may be below the first rung.
    raised = _at_least(densities, state.rho_min if state.rho_min > config.ladder[0] else 0.0, limits)
    reasons = [f"{who}: joined below {state.rho_min:g}" for who in raised if raised[who] > densities[who]]
    if config.trigger in ("fixed", "mixed"):
        state, raised = _planned(state, config, raised, progress, limits, reasons)
    finished = False
    if config.trigger == "pace":
        state, raised = _paced(state, config, raised, elapsed_s, full_round_s or {}, limits, reasons)
    if config.trigger in ("plateau", "mixed"):
        state, raised = _clients_plateau(state, config, raised, densities, level_scores, limits, reasons)
    plans_done = state.points == len(config.planned)
    if config.trigger in ("plateau", "mixed", "pace") or (config.trigger == "fixed" and plans_done):
        state, raised, finished = _whole_plateau(state, config, raised, global_score, limits, reasons)
    return state, raised, finished, reasons


def planned(
    state: RestorationState, config: RestorationConfig, densities: Mapping[str, float], progress: float, limits: Mapping[str, float]
) -> tuple[RestorationState, dict[str, float], list[str]]:
    """The planned points that have passed, between two evaluations: the new state, client -> density for every client, the reasons.

    No counter moves but by what a raise resets. Arguments as for `evaluate`; without a plan, or before its next point, nothing changes.
    """
    reasons: list[str] = []
    if config.trigger not in ("fixed", "mixed"):
        return state, dict(densities), reasons
    begun = replace(state, rho_min=max(state.rho_min, config.ladder[0]))
    after, raised = _planned(begun, config, dict(densities), progress, limits, reasons)
    return after if reasons else state, raised, reasons


def next_point(state: RestorationState, config: RestorationConfig) -> float | None:
    """The fraction of the planned duration at which everybody is raised next, if any is left."""
    return next(iter(config.planned[state.points :]), None) if config.trigger in ("fixed", "mixed") else None


def next_density(config: RestorationConfig, density: float) -> float:
    """The density one step up, at most 1.0."""
    if config.step == "ladder":
        return next((rung for rung in config.ladder if rung > density + 1e-9), 1.0)
    steps = max(round((density + config.delta_density) * GRID), math.floor(density * GRID) + 1)
    return min(steps / GRID, 1.0)


def _raised(config: RestorationConfig, density: float, limit: float) -> float:
    """One step up, as far as the client's memory goes."""
    return max(min(next_density(config, density), limit), density)


def _planned(
    state: RestorationState,
    config: RestorationConfig,
    densities: dict[str, float],
    progress: float,
    limits: Mapping[str, float],
    reasons: list[str],
) -> tuple[RestorationState, dict[str, float]]:
    """One rung for everybody at each planned point that has passed since the last evaluation."""
    for point in config.planned[state.points :]:
        if progress < point - 1e-9:
            break
        reasons.append(f"{point:.0%} of the planned duration: one rung for everybody")
        densities = {who: _raised(config, density, limits.get(who, 1.0)) for who, density in densities.items()}
        state = _with_rho_min(state, next_density(config, state.rho_min), densities)
        state = replace(state, points=state.points + 1, minimum={**state.minimum, **densities})
        densities = _at_least(densities, state.rho_min, limits)
    return state, densities


def _paced(
    state: RestorationState,
    config: RestorationConfig,
    densities: dict[str, float],
    elapsed_s: float,
    full_round_s: Mapping[str, float],
    limits: Mapping[str, float],
    reasons: list[str],
) -> tuple[RestorationState, dict[str, float]]:
    """Every client at the largest density whose round is short against the time that training has lasted; nobody is lowered."""
    raised = dict(densities)
    for who, density in densities.items():
        limit = limits.get(who, 1.0)
        if density >= limit or who not in full_round_s:
            continue
        bearable = elapsed_s / (PACE_ROUNDS * full_round_s[who])
        while raised[who] < limit and _raised(config, raised[who], limit) <= bearable:
            raised[who] = _raised(config, raised[who], limit)
        if raised[who] > density:
            reasons.append(f"{who}: after {elapsed_s:.0f} s a round at density {raised[who]:g} is short enough")
    minimum = {who: value for who, value in raised.items() if value > densities[who]}
    return replace(state, minimum={**state.minimum, **minimum}), raised


def _clients_plateau(
    state: RestorationState,
    config: RestorationConfig,
    raised: dict[str, float],
    densities: Mapping[str, float],
    level_scores: Mapping[float, float],
    limits: Mapping[str, float],
    reasons: list[str],
) -> tuple[RestorationState, dict[str, float]]:
    """A rung for every client whose level has stalled; those raised already in this evaluation wait for the next."""
    clients, minimum, raised = dict(state.clients), dict(state.minimum), dict(raised)
    for who, density in densities.items():
        limit = limits.get(who, 1.0)
        if density >= limit or raised[who] != density:
            continue
        counter, stalled = _count(clients[who], config, level_scores.get(density), config.patience)
        if stalled:
            raised[who] = minimum[who] = _raised(config, density, limit)
            reasons.append(f"{who}: no progress at density {density:g}, raised to {raised[who]:g}")
            counter = Counter(left_alone=2 * config.patience)
        clients[who] = counter
    return replace(state, clients=clients, minimum=minimum), raised


def _whole_plateau(
    state: RestorationState,
    config: RestorationConfig,
    densities: dict[str, float],
    score: float | None,
    limits: Mapping[str, float],
    reasons: list[str],
) -> tuple[RestorationState, dict[str, float], bool]:
    """A rung for the smallest density when the global model has stalled; the end when there is none left."""
    last = state.rho_min >= 1.0 or config.trigger == "fixed"  # a plan without further points raises no more
    patience = min(5 * config.patience, MAX_FINAL_PATIENCE) if last or config.trigger == "pace" else config.patience
    whole, stalled = _count(state.whole, config, score, patience)
    if not stalled:
        return replace(state, whole=whole), densities, False
    if last:
        reasons.append(f"the global model made no progress in {patience} evaluations")
        return replace(state, whole=whole), densities, True
    state = _with_rho_min(state, next_density(config, state.rho_min), densities)
    reasons.append(f"the global model stalled: everybody at least {state.rho_min:g}")
    return state, _at_least(densities, state.rho_min, limits), False


def _count(counter: Counter, config: RestorationConfig, score: float | None, patience: int) -> tuple[Counter, bool]:
    """The counter after one evaluation, and whether it has run out of patience."""
    if counter.left_alone:
        return replace(counter, left_alone=counter.left_alone - 1), False
    if score is None:
        return counter, False
    if counter.best is None or score > counter.best + config.min_delta:
        return Counter(best=score), False
    counter = replace(counter, stalled=counter.stalled + 1)
    return counter, counter.stalled >= patience


def _with_rho_min(state: RestorationState, rho_min: float, densities: Mapping[str, float]) -> RestorationState:
    return replace(state, rho_min=rho_min, whole=Counter(), clients={who: Counter() for who in densities})


def _at_least(densities: Mapping[str, float], rho_min: float, limits: Mapping[str, float]) -> dict[str, float]:
    return {who: max(density, min(rho_min, limits.get(who, 1.0))) for who, density in densities.items()}
