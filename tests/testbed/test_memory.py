"""The in-memory link behaves as a broker does where the machines rely on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow import topics, wire
from regrow.device import Device
from regrow.errors import LocalError
from regrow.machine import (
    Acknowledged,
    Connected,
    Disconnected,
    Effect,
    Event,
    Measured,
    Publish,
    Received,
    SetTimer,
    Subscribe,
    Unsubscribe,
    Woken,
)
from testbed.conditions import Attendance, attend, heterogeneity, paper_links, paper_server_links
from testbed.links import Latency, LogNormal, Trace, WithOutages
from testbed.memory import _WOKEN, COORDINATOR, OVERHEAD_BYTES, Client, World
from testbed.subscriptions import Subscriptions, matches
from tests.regrow.fleet import identity, new_coordinator, task, train
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


def test_a_meter_says_what_it_is_told_whatever_the_link_carries() -> None:
    world = World(train)
    puppet = Puppet(Publish("a", b"x", token=1))
    world.add("p", puppet, up_bps=8_000)
    world.at(5.0, lambda: world.measure("p", 123.0))
    world.run(10)
    assert puppet.of(Measured)[0][1] == Measured(8_000)
    assert puppet.of(Measured)[1:] == [(5.0, Measured(123.0))]


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


class Restless(Puppet):
    """Sets a timer with every step, as the machines do, and says when it was woken."""

    def __init__(self, name: str, times: list[float]) -> None:
        super().__init__()
        self.name, self.times = name, times

    def step(self, event: Event, now: float) -> list[Effect]:
        self.heard.append((now, event))
        told = [Publish("woken", self.name.encode())] if isinstance(event, Woken) else []
        wait_s = self.times.pop(0) if self.times else math.inf
        return [Subscribe(("woken",)), *told, SetTimer(now + wait_s)]


class EveryTimer(World):
    """The oracle: every timer is an event of its own."""

    def _set_timer(self, name: str, client: Client, at_s: float) -> None:
        client.timer = self._later(max(at_s - self.now, 0.0), name, _WOKEN) if at_s != math.inf else 0

    def _early(self, name: str, client: Client, number: int) -> bool:  # noqa: ARG002 (as in World)
        return number != client.timer


@settings(max_examples=150)
@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5, 4.0, math.inf]), max_size=12), min_size=1, max_size=3), st.booleans())
def test_timers_that_are_put_off_wake_as_if_each_were_an_event(times: list[list[float]], killed: bool) -> None:
    heard = []
    for kind in (World, EveryTimer):
        world = kind(train, latency_s=0.25)
        puppets = [Restless(f"p{index}", list(mine)) for index, mine in enumerate(times)]
        for puppet in puppets:
            world.add(puppet.name, puppet)
        world.run(2.0)
        if killed:
            world.kill("p0")
            world.connect("p0")
        world.run(60.0)
        heard.append([[(at, type(event), getattr(event, "payload", b"")) for at, event in puppet.heard] for puppet in puppets])
    assert heard[0] == heard[1]


def test_a_timer_that_is_put_off_again_and_again_does_not_fill_the_queue() -> None:
    world = World(train, latency_s=0.0)
    world.add("p", Restless("p", [100.0] * 500))
    for _ in range(400):
        world.measure("p", 1.0)
    world.run(50.0)
    assert len(world._events) == 1


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


# ---- who listens ---------------------------------------------------------------------------------------------------------------------

LEVELS = st.sampled_from(["a", "b", "", "+"])
FILTERS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join)
CHANGES = st.lists(st.tuples(st.booleans(), st.sampled_from(["x", "y", "z"]), FILTERS), max_size=20)


@settings(max_examples=300)
@given(CHANGES, st.lists(FILTERS, min_size=1, max_size=10))
def test_the_index_finds_whom_a_scan_finds(changes: list[tuple[bool, str, str]], published: list[str]) -> None:
    index, held = Subscriptions(), {name: set[str]() for name in ("x", "y", "z")}
    for there, name, pattern in changes:
        if there:
            index.add(name, pattern)
            held[name].add(pattern)
        else:
            index.remove(name, pattern)
            held[name].discard(pattern)
    for topic in published:
        naive = {name for name, patterns in held.items() if any(matches(pattern, topic) for pattern in patterns)}
        assert index.listeners(topic) == naive


@settings(max_examples=100)
@given(st.lists(st.lists(FILTERS, max_size=4), min_size=1, max_size=4), st.lists(FILTERS, min_size=1, max_size=6))
def test_deliveries_are_those_of_a_scan_in_the_order_of_the_clients(filters: list[list[str]], published: list[str]) -> None:
    heard: list[tuple[str, str]] = []

    class Listener(Puppet):
        def __init__(self, called: str, *first: Effect) -> None:
            super().__init__(*first)
            self.called = called

        def step(self, event: Event, now: float) -> list[Effect]:
            if isinstance(event, Received):
                heard.append((self.called, event.topic))
            return super().step(event, now)

    world, called = World(train), [f"c{9 - number}" for number in range(len(filters))]
    for name, patterns in zip(called, filters, strict=True):
        world.add(name, Listener(name, Subscribe(tuple(patterns))))
    world.run(1)
    world.add("writer", Puppet(*(Publish(topic, b"x", retain=True) for topic in published)))
    world.run(2)
    held = list(zip(called, filters, strict=True))
    wanted = [(name, topic) for topic in published for name, patterns in held if any(matches(pattern, topic) for pattern in patterns)]
    assert heard == wanted
    late = Puppet(Subscribe(tuple(filters[0])))
    world.add("late", late)
    world.run(3)
    retained = [topic for topic in sorted(set(published)) if any(matches(pattern, topic) for pattern in filters[0])]
    assert [event.topic for _, event in late.of(Received) if isinstance(event, Received)] == retained


def test_who_comes_back_listens_to_nothing_of_before() -> None:
    world = World(train)
    world.add("reader", Puppet(Subscribe(("a", "+"))))
    world.run(1)
    again = Puppet()
    world.add("reader", again)  # in the place of the first, which nobody has unplugged
    world.add("writer", Puppet(Publish("a", b"x")))
    world.run(2)
    assert again.of(Received) == []


def test_a_cut_sender_takes_back_only_what_has_not_left() -> None:
    world = World(train, latency_s=2.0)
    reader = Puppet(Subscribe(("a",)))
    world.add("reader", reader)
    world.run(1)
    chunk = bytes(1_000 - OVERHEAD_BYTES)
    world.add("writer", Puppet(Publish("a", chunk), Publish("a", chunk)), up_bps=8_000)
    world.run(2.5)
    world.cut("writer")
    world.run(9)
    assert [at for at, _ in reader.of(Received)] == pytest.approx([4.0])
    assert world.now == 9


# ---- links, and a broker that stores and forwards ------------------------------------------------------------------------------------


def test_a_link_that_changes_is_integrated_and_its_goodput_is_measured() -> None:
    world = World(train, latency_s=0.0)
    up = Trace((0.0, 5.0), (8_000.0, 2_000.0), repeat=False)
    writer = Puppet(Publish("a", bytes(9_000 - OVERHEAD_BYTES), token=1))
    world.add("writer", writer, up=up)
    world.run(60)
    sent_s = 5.0 + 4_000 * 8 / 2_000
    assert [at for at, _ in writer.of(Acknowledged)] == [sent_s]
    assert [event for _, event in writer.of(Measured)] == [Measured(9_000 * 8 / sent_s)]
    assert (world.clients["writer"].up_bps, world.clients["writer"].sent_bytes) == (None, 9_000 - OVERHEAD_BYTES)


def test_a_link_and_a_constant_rate_for_one_direction_are_refused() -> None:
    with pytest.raises(LocalError, match="p: a direction"):
        World(train).add("p", Puppet(), up_bps=1.0, up=LogNormal(1.0))


def test_a_message_that_never_leaves_never_arrives() -> None:
    world = World(train)
    reader, writer = Puppet(Subscribe(("a",))), Puppet(Publish("a", b"x", token=1))
    world.add("reader", reader)
    world.run(1)
    world.add("writer", writer, up=Trace((0.0, 1.0), (8.0, 0.0), repeat=False))
    world.run(1e9)
    assert (reader.of(Received), writer.of(Acknowledged), writer.of(Measured)) == ([], [], [])


def test_a_retained_message_crosses_the_senders_uplink_once_and_every_downlink() -> None:
    world = World(train, latency_s=0.0, store_and_forward=True)
    payload = bytes(1_000 - OVERHEAD_BYTES)
    world.add("server", Puppet(Publish("a", payload, retain=True)), up_bps=1_000)  # 8 s
    early, late = Puppet(Subscribe(("a",))), Puppet(Subscribe(("a",)))
    world.add("early", early, down_bps=8_000)
    world.run(4)
    assert world.retained == {}
    world.run(20)
    world.add("late", late, down_bps=2_000)
    world.run(60)
    assert [at for at, _ in early.of(Received)] == pytest.approx([9.0])
    assert [at for at, _ in late.of(Received)] == pytest.approx([24.0])
    assert world.clients["server"].sent_bytes == world.clients["late"].received_bytes == len(payload)


@pytest.mark.parametrize(("faithful", "heard_s"), [(False, 8.2), (True, 1.2)])
def test_only_a_broker_that_forwards_on_arrival_lets_the_quick_pass_the_slow(faithful: bool, heard_s: float) -> None:
    world = World(train, latency_s=0.1, store_and_forward=faithful)
    server = Puppet(Subscribe(("+",)))
    world.add("server", server)
    world.run(0.1)
    world.add("slow", Puppet(Publish("slow", bytes(1_000 - OVERHEAD_BYTES))), up_bps=1_000, latency=Latency(0.0))
    world.run(1.0)
    world.add("quick", Puppet(Publish("quick", b"")))
    world.run(60)
    heard = {event.topic: at for at, event in server.of(Received) if isinstance(event, Received)}
    assert heard == {"quick": pytest.approx(heard_s), "slow": pytest.approx(8.2)}


def test_a_cut_upload_gives_neither_message_nor_measurement() -> None:
    world = World(train, store_and_forward=True)
    writer = Puppet(Publish("a", bytes(1_000), retain=True, token=1))
    world.add("writer", writer, up_bps=1_000)
    world.run(3)
    world.cut("writer")
    world.run(60)
    assert (world.retained, writer.of(Measured), writer.of(Acknowledged)) == ({}, [], [])


def test_jitter_never_changes_the_order_of_a_senders_messages() -> None:
    world = World(train, store_and_forward=True)
    reader = Puppet(Subscribe(("+",)))
    world.add("reader", reader, latency=Latency(0.01, 0.5, period_s=0.1, seed=1))
    world.run(0.1)
    writer = Puppet(*(Publish(f"{number:02}", bytes(100), token=number) for number in range(40)))
    world.add("writer", writer, up_bps=8_000, latency=Latency(0.01, 2.0, period_s=0.1, seed=2))
    world.run(60)
    assert [event.topic for _, event in reader.of(Received) if isinstance(event, Received)] == [f"{number:02}" for number in range(40)]
    assert [event.token for _, event in writer.of(Acknowledged) if isinstance(event, Acknowledged)] == list(range(40))


# ---- what is planned -----------------------------------------------------------------------------------------------------------------


def test_callbacks_come_in_the_order_of_time_and_then_of_asking() -> None:
    world = World(train)
    heard: list[tuple[float, str]] = []

    def note(what: str) -> Any:
        return lambda: heard.append((world.now, what))

    for at_s, what in ((2.0, "b"), (1.0, "a"), (2.0, "c"), (5.0, "late")):
        world.at(at_s, note(what))
    world.at(1.0, lambda: world.at(1.0, note("again")))
    world.run(4)
    assert heard == [(1.0, "a"), (1.0, "again"), (2.0, "b"), (2.0, "c")]
    for at_s in (3.0, float("inf"), float("nan")):
        with pytest.raises(LocalError, match="planned"):
            world.at(at_s, note("never"))


def test_a_device_comes_goes_and_leaves_for_good() -> None:
    world = World(train)
    puppet = Puppet(Subscribe(("a",)), SetTimer(1_000.0))
    attend(world, "p", Attendance(5.0, 250.0, ((0.0, 10.0), (50.0, 60.0)), 100.0), lambda: world.add("p", puppet))
    world.run(400)
    assert [at for at, _ in puppet.of(Connected)] == [5.0, 50.0, 100.0, 150.0, 200.0]
    assert [at for at, _ in puppet.of(Disconnected)] == [10.0, 60.0, 110.0, 160.0, 210.0]
    assert puppet.of(Woken) == []
    assert not world.clients["p"].connected


def test_a_device_that_leaves_before_its_first_window_never_joins() -> None:
    world = World(train)
    attend(world, "p", Attendance(0.0, 20.0, ((30.0, 40.0),), 100.0), lambda: world.add("p", Puppet()))
    world.run(400)
    assert world.clients == {}


def test_a_fleet_on_the_papers_links_with_outages_and_leavers_ends_and_repeats() -> None:
    def once(seed: int) -> tuple[float, list[Any], int]:
        settings_ = task(fleet={"min_devices": 3}, stop={"aggregations": 8})
        world = World(train, store_and_forward=True, keep_log=False, keep_published=False)
        model_bytes = 40_000
        up, down = paper_server_links(COORDINATOR, model_bytes, seed=seed, period_s=5.0)
        world.add(COORDINATOR, new_coordinator(settings_), up=up, down=down, latency=Latency(0.0))
        for number, density in enumerate(heterogeneity("low", 5)):
            name = f"d{number}"
            up, down = paper_links(name, density, model_bytes, seed=seed, period_s=5.0)
            spotty = WithOutages(up, 20.0, 2.0, seed, f"{name}/outages")
            there = Attendance(joins_s=float(number), leaves_s=25.0 if number == 4 else float("inf"))
            device = Device(identity(name), {})
            attend(world, name, there, lambda n=name, d=device, u=spotty, r=down: world.add(n, d, up=u, down=r))  # type: ignore[misc]
        world.run(3_000.0, stop=lambda: COORDINATOR in world.finished)
        assert COORDINATOR in world.finished
        assert (world.log, world.published) == ([], [])
        return world.now, world.notes, world.clients["d0"].sent_bytes

    assert once(1) == once(1)
    assert once(1) != once(2)
