"""The in-memory link behaves as a broker does where the machines rely on it."""

from __future__ import annotations

import pytest

from regrow import topics, wire
from regrow.device import Device
from regrow.machine import Acknowledged, Connected, Disconnected, Effect, Event, Publish, Received, SetTimer, Subscribe, Unsubscribe, Woken
from testbed.memory import OVERHEAD_BYTES, World, matches
from tests.regrow.fleet import identity, task, train
from tests.regrow.harness import TWO, begin


class Puppet(Device):
    """A device that does only what the test says, and remembers what it hears."""

    def __init__(self, *first: Effect) -> None:
        super().__init__(identity("p"), {})
        self.heard: list[tuple[float, Event]] = []
        self._first = list(first)

    def step(self, event: Event, now: float) -> list[Effect]:
        self.heard.append((now, event))
        return self._first if isinstance(event, Connected) else []

    def of(self, kind: type[Event]) -> list[tuple[float, Event]]:
        return [(at, event) for at, event in self.heard if isinstance(event, kind)]


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("+/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("a/b", "a/c", False),
    ],
)
def test_filters(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected


def test_retained_messages_come_at_once_and_an_empty_one_clears() -> None:
    world = World(train)
    world.add("writer", Puppet(Publish("a/1", b"x", retain=True), Publish("a/2", b"y", retain=True), Publish("a/2", b"", retain=True)))
    world.run(1)
    reader = Puppet(Subscribe(("a/+",)))
    world.add("reader", reader)
    world.run(2)
    assert [event for _, event in reader.of(Received)] == [Received("a/1", b"x")]
    assert world.retained == {"a/1": b"x"}


def test_a_message_that_is_not_retained_reaches_only_who_listens_now() -> None:
    world = World(train)
    early, late = Puppet(Subscribe(("a",))), Puppet(Subscribe(("a",)))
    world.add("early", early)
    world.run(0.5)
    world.add("writer", Puppet(Publish("a", b"x")))
    world.run(1)
    world.add("late", late)
    world.run(2)
    assert len(early.of(Received)) == 1
    assert late.of(Received) == []


def test_rates_latency_and_acknowledgements_take_their_time() -> None:
    world = World(train, latency_s=0.25)
    writer, reader = Puppet(Publish("a", bytes(920), token=4), Publish("a", bytes(920), token=5)), Puppet(Subscribe(("a",)))
    world.add("reader", reader, down_bps=16_000)
    world.run(1)
    world.add("writer", writer, up_bps=8_000)
    world.run(60)
    sent_s = (920 + OVERHEAD_BYTES) * 8 / 8_000
    assert [at for at, _ in writer.of(Acknowledged)] == pytest.approx([1 + sent_s + 0.5, 1 + 2 * sent_s + 0.5])
    assert [at for at, _ in reader.of(Received)] == pytest.approx([1 + sent_s + 0.25 + sent_s / 2, 1 + 2 * sent_s + 0.25 + sent_s / 2])


def test_a_cut_loses_what_is_under_way_and_the_subscriptions() -> None:
    world = World(train, latency_s=1.0)
    reader = Puppet(Subscribe(("a",)))
    world.add("reader", reader)
    world.run(0.5)
    world.add("writer", Puppet(Publish("a", b"x"), Unsubscribe(("a",))))
    world.run(1.0)
    world.cut("reader")
    world.run(5.0)
    assert reader.of(Received) == []
    assert len(reader.of(Disconnected)) == 1
    assert world.clients["reader"].filters == set()


def test_a_killed_process_hears_nothing_of_its_earlier_life() -> None:
    world = World(train, latency_s=1.0)
    first = Puppet(Subscribe(("a",)), SetTimer(3.0), Publish("b", b"x", token=1))
    world.add("p", first)
    world.run(0.5)
    world.kill("p")
    second = Puppet()
    world.add("p", second)
    world.run(10)
    assert [type(event) for _, event in first.heard] == [Connected]
    assert [type(event) for _, event in second.heard] == [Connected]


def test_a_newer_timer_replaces_an_older_one() -> None:
    world = World(train)
    puppet = Puppet(SetTimer(3.0), SetTimer(5.0))
    world.add("p", puppet)
    world.run(10)
    assert [at for at, _ in puppet.of(Woken)] == [5.0]


def test_a_restarted_broker_has_forgotten_everything_and_everybody_comes_back() -> None:
    world = begin(task(), TWO)
    world.run(1.0)
    assert world.retained
    world.restart_broker()
    assert not world.retained
    world.run(3.0)
    assert all(client.connected for client in world.clients.values())
    assert topics.claim("toy") in world.retained


def test_the_same_inputs_give_the_same_run() -> None:
    runs = []
    for _ in range(2):
        world = begin(task(fleet={"min_devices": 2}, stop={"aggregations": 5}), TWO)
        world.finish()
        runs.append((world.now, world.sent, [(record.kind, record.header, record.payload) for record in world.log]))
    assert runs[0] == runs[1]
    assert any(topic.endswith("/hello") and wire.decode(payload, wire.Hello) for _, _, topic, payload in runs[0][1])
