"""What the agent counts of its link: kinds, rows that never overlap, and what is saved; on a link that the test makes up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.link_facts import TcpFacts, Unknown
from edge_agent.state import StateFolder
from edge_agent.traffic import IDLE_LINK_S, SMALL_S, Traffic, what_of
from regrow import topics
from regrow.machine import Acknowledged, Publish, Received
from regrow.observations import LinkSeen, Row, TransferSeen, UplinkSeen

RUN = topics.Run("task", "run")
UPDATE, CHUNK, BEAT = RUN.update("d1", 3, 0), RUN.chunk(7, 0), RUN.telemetry("d1")
UNIX_S = 1.7e9  # the wall clock when the monotonic one says 0


class MadeUp:
    """A link whose facts the test sets."""

    def __init__(self) -> None:
        self.connected = self.unacknowledged = True
        self.tcp: TcpFacts | Unknown = TcpFacts(0.05, 0.04, 2, 1000, "cubic")
        self.peer = "127.0.0.1"


@pytest.fixture
def rows() -> list[Row]:
    return []


@pytest.fixture
def link() -> MadeUp:
    return MadeUp()


@pytest.fixture
def traffic(tmp_path: Path, link: MadeUp, rows: list[Row]) -> Iterator[Traffic]:
    with StateFolder(tmp_path / "state") as folder:
        one = Traffic(folder, link, observe=rows.append, wall_s=lambda: UNIX_S + 1000.0)
        one.run, one.number = "run", 5
        yield one


def acknowledge(traffic: Traffic, topic: str, size: int, started_s: float, acked_s: float, token: int | None = 1) -> bool:
    effect = traffic.leaves(Publish(topic, bytes(size), token=token))
    assert effect.token is not None
    return traffic.acknowledged(Acknowledged(effect.token, started_s, acked_s, size), 1000.0)


@pytest.mark.parametrize(
    ("topic", "what"),
    [
        (UPDATE, "update"),
        (RUN.probe("d1"), "probe"),
        (BEAT, "telemetry"),
        (topics.hello("d1"), "telemetry"),
        (topics.status("d1"), "telemetry"),
        (topics.observations("d1"), "observations"),
        (topics.Run("measure", "uplink").probe("d1"), "measurement"),
        (CHUNK, "model"),
        (RUN.manifest(1), "model"),
        (RUN.order(1, 2, 3), "model"),
        (RUN.program(bytes(16), 0), "model"),
        (RUN.assignment("d1"), "other"),
        (topics.claim("task"), "other"),
        (topics.promotion("task"), "other"),
        ("", "other"),
        ("regrow/v1/device", "other"),
    ],
)
def test_every_topic_has_its_kind(topic: str, what: str) -> None:
    assert what_of(topic) == what


def test_rows_of_overlapping_chunks_share_the_seconds(traffic: Traffic, link: MadeUp, rows: list[Row]) -> None:
    acknowledge(traffic, UPDATE, 50_000, 900.0, 902.0)
    link.tcp = TcpFacts(0.06, 0.04, 5, 2000, "cubic")
    acknowledge(traffic, UPDATE, 50_000, 901.0, 904.0, token=2)
    seen = [row for row in rows if isinstance(row, TransferSeen)]
    assert [(row.at_s - UNIX_S, row.seconds, row.retransmitted) for row in seen] == [(900.0, 2.0, 2), (902.0, 2.0, 3)]
    assert {(row.up, row.what, row.payload_bytes, row.run, row.number) for row in seen} == {(True, "update", 50_000, "run", 5)}
    assert all(row.packet_bytes > row.payload_bytes for row in seen)
    assert seen[1].rtt_s == 0.06


def test_own_messages_are_told_from_the_machines(traffic: Traffic) -> None:
    assert not acknowledge(traffic, BEAT, 100, 900.0, 900.1, token=None)
    assert acknowledge(traffic, UPDATE, 100, 901.0, 901.1, token=7)
    assert traffic.payload_bytes == {(True, "telemetry"): 100, (True, "update"): 100}


def test_each_own_message_counts_as_its_own_kind(traffic: Traffic) -> None:
    """Two under way at once: the later one must not lend the earlier one its topic."""
    beat, hello = (traffic.leaves(Publish(topic, bytes(100))) for topic in (BEAT, topics.observations("d1")))
    for effect in (beat, hello):
        traffic.acknowledged(Acknowledged(effect.token or 0, 900.0, 900.1, 100), 1000.0)
    assert traffic.payload_bytes == {(True, "telemetry"): 100, (True, "observations"): 100}


def test_telemetry_is_summed_up_apart(traffic: Traffic, rows: list[Row]) -> None:
    traffic.turn(900.0, busy=False)
    for second in range(6):
        acknowledge(traffic, BEAT, 100, 900.0 + 10 * second, 900.1 + 10 * second, token=None)
    traffic.turn(900.0 + SMALL_S, busy=False)
    (row,) = [row for row in rows if isinstance(row, TransferSeen)]
    assert (row.what, row.payload_bytes, row.up) == ("telemetry", 600, True)
    assert row.seconds == pytest.approx(0.6)
    assert row.packet_bytes > 600


def test_parts_of_a_model_are_timed_from_the_asking(traffic: Traffic, rows: list[Row]) -> None:
    traffic.asked((CHUNK, RUN.chunk(7, 1)), 950.0)
    traffic.arrived(Received(CHUNK, bytes(40_000)), 952.0)
    traffic.arrived(Received(RUN.chunk(7, 1), bytes(20_000)), 953.0)
    traffic.asked((RUN.assignment("d1"),), 970.0)  # no part of a model
    seen = [row for row in rows if isinstance(row, TransferSeen)]
    assert [(row.seconds, row.payload_bytes, row.up, row.what) for row in seen] == [
        (2.0, 40_000, False, "model"),
        (1.0, 20_000, False, "model"),
    ]


def test_the_estimate_is_told_kept_and_there_again(traffic: Traffic, rows: list[Row], link: MadeUp) -> None:
    for second in range(12):
        acknowledge(traffic, UPDATE, 25_000, 900.0 + second - 1e-3, 901.0 + second, token=second + 1)
    seen = [row for row in rows if isinstance(row, UplinkSeen)]
    assert seen
    assert seen[-1].low_bps <= seen[-1].mean_bps <= seen[-1].high_bps
    assert traffic.news_bps() == pytest.approx(200e3, rel=0.01)
    assert traffic.news_bps() is None
    state = traffic.link_state()
    assert state is not None
    assert state.rtt_s == 0.05
    again = Traffic(traffic._folder, link)
    assert again.meter.estimate_bps == pytest.approx(200e3, rel=0.01)
    assert again.news_bps() is None


def test_a_lost_connection_takes_what_was_under_way_with_it(traffic: Traffic) -> None:
    effect = traffic.leaves(Publish(UPDATE, bytes(50_000), token=9))
    traffic.lost()
    assert traffic.acknowledged(Acknowledged(effect.token or 0, 900.0, 901.0, 50_000), 1000.0)  # the machine knows by itself
    assert not traffic.payload_bytes
    assert traffic.link_state() is None


def test_the_link_is_looked_at_seldom_and_says_what_is_known(traffic: Traffic, link: MadeUp, rows: list[Row]) -> None:
    for now in (900.0, 905.0, 900.0 + IDLE_LINK_S):
        traffic.turn(now, busy=False)
    (row,) = [row for row in rows if isinstance(row, LinkSeen)]
    assert (row.interface, row.seconds, row.congestion, row.rtt_s, row.retransmitted) == ("lo", IDLE_LINK_S, "cubic", 0.05, 0)
    assert row.sent_bytes is not None
    assert (row.signal_dbm, row.technology) == (None, "")
    link.tcp = Unknown("not connected")
    traffic.turn(900.0 + 2 * IDLE_LINK_S, busy=False)
    assert isinstance(rows[-1], LinkSeen)
    assert (rows[-1].rtt_s, rows[-1].retransmitted) == (None, None)
