"""How long a device waits before it tries its broker again: soon, spread, and not at all like a fight."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from edge_agent.retry import ALONE_S, FIRST_CEILING_S, OUTAGE_SHARE, RIVAL_WAIT_MAX_S, STABLE_S, TAKEOVERS, WAIT_MAX_S, Retry


def back_after(retry: Retry, lost_s: float, back_s: float) -> float:
    """When a device that lost a lasting connection at `lost_s` has one again, the broker being back at `back_s`."""
    now = lost_s + retry.lost(lost_s, 1000.0, closed_by_broker=True)
    while now < back_s:
        now += retry.failed(now)
    return now


@pytest.mark.parametrize("outage_s", [0.5, 2.0, 10.0, 60.0, 600.0, 86_400.0])
def test_the_wait_is_short_after_a_short_outage(outage_s: float) -> None:
    for seed in range(300):
        late_s = back_after(Retry(random.Random(seed), 0.0), 5000.0, 5000.0 + outage_s) - 5000.0 - outage_s
        assert late_s <= min(max(FIRST_CEILING_S, OUTAGE_SHARE * outage_s), WAIT_MAX_S) <= 15.0


def test_a_broker_that_stays_away_is_asked_about_eight_times_a_minute() -> None:
    """And not so seldom in the beginning."""
    retry, now, waits = Retry(random.Random(1), 0.0), 0.0, []
    while now < 4 * 3600:
        wait_s = retry.failed(now)
        waits.append((now, wait_s))
        now += wait_s
    late = [wait_s for at, wait_s in waits if at > 300]
    assert WAIT_MAX_S / 2 < sum(late) / len(late) < WAIT_MAX_S * 0.6
    assert 0.9 * WAIT_MAX_S < max(late) <= WAIT_MAX_S
    assert max(wait_s for at, wait_s in waits if at < 30) <= WAIT_MAX_S / 2


@pytest.mark.parametrize("outage_s", [5.0, 60.0])
def test_a_thousand_devices_do_not_come_back_in_one_burst(outage_s: float) -> None:
    backs = [back_after(Retry(random.Random(seed), 0.0), 100.0, 100.0 + outage_s) for seed in range(1000)]
    spread_s = min(max(FIRST_CEILING_S, OUTAGE_SHARE * outage_s), WAIT_MAX_S)
    tenths = Counter(int(10 * (back - 100.0 - outage_s) / spread_s) for back in backs)
    assert max(tenths.values()) < 250


def test_a_connection_that_lasted_ends_the_outage_and_a_short_one_does_not() -> None:
    def wait_after(lasted_s: float) -> float:
        retry = Retry(random.Random(3), 0.0)
        retry.failed(900.0)
        return retry.lost(1000.0, lasted_s, closed_by_broker=False)

    assert wait_after(STABLE_S) <= FIRST_CEILING_S
    assert wait_after(STABLE_S - 1) > FIRST_CEILING_S


def test_only_connections_that_the_broker_ends_soon_and_in_a_row_are_a_takeover() -> None:
    def taken_over(*losses: tuple[float, bool] | None) -> bool:
        retry = Retry(random.Random(4), 0.0)
        for loss in losses:
            if loss is None:
                retry.failed(0.0)
            else:
                retry.lost(0.0, loss[0], closed_by_broker=loss[1])
        return retry.taken_over

    quick = (1.0, True)
    assert taken_over(*TAKEOVERS * [quick])
    assert not taken_over(*(TAKEOVERS - 1) * [quick])
    assert not taken_over(*(TAKEOVERS - 1) * [quick], None, quick), "the broker was away"
    assert not taken_over(*TAKEOVERS * [(STABLE_S, True)]), "a broker that restarts now and then"
    assert not taken_over(*TAKEOVERS * [(1.0, False)]), "we gave up, not the broker"
    assert taken_over(quick, *(TAKEOVERS - 1) * [(RIVAL_WAIT_MAX_S, True)]), "the other one waits, and we say so too"
    assert not taken_over(*TAKEOVERS * [quick], (ALONE_S, True)), "the other one has gone"


def test_two_with_one_bundle_take_turns() -> None:
    """The newer connection wins: in ten minutes of it there are some twenty changes, not a thousand, and both know."""
    retries = [Retry(random.Random(seed), 0.0) for seed in (5, 6)]
    now, holder, since, changes = 0.0, 0, 0.0, 0
    comes = 0.5
    while comes < 600:
        now = comes
        comes = now + retries[holder].lost(now, now - since, closed_by_broker=True)
        holder, since, changes = 1 - holder, now, changes + 1
    assert 10 < changes < 30
    assert all(retry.taken_over for retry in retries)
