"""When a connection is pinged and when it is dead, second by second."""

from __future__ import annotations

from edge_agent.keepalive import PING_LEAST_S, KeepAlive


def life(alive: KeepAlive, forgotten_after_s: float | None, seconds: int, heartbeat_s: int = 10) -> tuple[int, str]:
    """A connection with heartbeats through a NAT that forgets flows; returns when it ended, and how (or "" when it did not)."""
    alive.begin(0.0)
    up = down = 100
    moved_s = 0.0
    for now in range(1, seconds):
        passes = forgotten_after_s is None or now - moved_s <= forgotten_after_s
        said = now % heartbeat_s == 0
        up += 80 * said
        down += 4 * (said and passes)
        if said and passes:
            moved_s = now
        step = alive.turn(up, down, float(now))
        if step == "dead":
            alive.lost()
            return now, step
        if step == "ping":
            up += 2
            down += 2 * passes
            moved_s = now if passes else moved_s
    return seconds, ""


def test_quiet_is_pinged_and_silence_is_death() -> None:
    alive = KeepAlive(30)
    alive.begin(0.0)
    steps = {now: step for now in range(1, 100) if (step := alive.turn(50, 50, float(now)))}
    assert (steps[31], steps[61]) == ("ping", "dead")


def test_a_nat_that_forgets_idle_flows_is_learned() -> None:
    """Heartbeats of 10 s, a NAT that remembers for 4 s: each death halves the quiet before a ping, until one stays alive."""
    alive = KeepAlive(30)
    deaths = 0
    while life(alive, 4.0, 600)[1]:
        deaths += 1
    assert deaths == 2
    assert PING_LEAST_S <= alive.ping_s <= 4


def test_an_outage_changes_nothing() -> None:
    alive = KeepAlive(30)
    for _ in range(20):
        assert life(alive, None, 200) == (200, "")
        alive.turn(10_000, 10_000, 200.0)
        alive.turn(10_080, 10_000, 210.0)  # never answered: but it had been quiet for as long before
        alive.lost()
    assert alive.ping_s == 30


def test_a_link_is_never_pinged_more_often_than_is_any_use() -> None:
    alive = KeepAlive(30)
    for _ in range(20):
        life(alive, 0.5, 300, heartbeat_s=5)
    assert alive.ping_s == PING_LEAST_S
