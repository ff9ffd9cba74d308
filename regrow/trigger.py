"""When the coordinator aggregates. Only live devices with an unexpired lease are ever waited for, so no dead device stops a run."""

from __future__ import annotations

from regrow.task import Trigger


def due_s(
    trigger: Trigger,
    *,
    arrived: int,
    outstanding: int,
    fastest_class: int,
    quorum_s: float | None,
    last_s: float,
    now_s: float,
) -> float | None:
    """The monotonic time of the next aggregation, or None while it depends on something that has not happened.

    Args:
        trigger: kind, count (K; 0 means the size of the fastest class) and interval_s (dt).
        arrived: updates since the last aggregation.
        outstanding: live devices whose lease has not expired.
        fastest_class: devices in the fastest class.
        quorum_s: when the K-th update arrived, if it has.
        last_s: time of the last aggregation.
        now_s: now.

    Source: algorithms.md section 6; `fastest` is FedGMR's and PR-FL's, `count` FedBuff's, `interval` FedFix's.
    """
    if arrived == 0:
        return None
    if trigger.kind == "arrival" or outstanding == 0:
        return now_s
    if trigger.kind == "interval":
        return last_s + trigger.interval_s
    if not has_quorum(trigger, arrived, outstanding, fastest_class):
        return None
    if trigger.kind == "fastest":
        return (now_s if quorum_s is None else quorum_s) + trigger.interval_s
    return now_s


def has_quorum(trigger: Trigger, arrived: int, outstanding: int, fastest_class: int) -> bool:
    """Whether enough updates have arrived; K never exceeds what can still come."""
    if trigger.kind == "all":
        return arrived > 0 and outstanding == 0
    wanted = trigger.count or max(fastest_class, 1)
    return arrived >= min(wanted, arrived + outstanding)
