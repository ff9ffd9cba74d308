"""The owner's limits on a device: sensors as boards have them, the count through restarts, training that stands still, the agent."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.agent import Agent
from edge_agent.budgets import BUDGET, LEAST_AHEAD_BYTES, SETTLE_S, Budgets, RoundJoules, budget_of, in_words, limits_in
from edge_agent.bundle import Bundle
from edge_agent.conditions import InBackground, Reading, Sensors, battery_percent, is_metered
from edge_agent.data.source import DataSource
from edge_agent.link_facts import Unknown
from edge_agent.senses import Senses
from edge_agent.state import StateFolder
from edge_agent.worker import Worker
from regrow.budget import BYTES, HOURS, JOULES, UNMEASURED_MOST, Budget, Hours
from regrow.errors import LocalError, UsageError
from regrow.machine import Limited, Note, Steer, Train, Trained, TrainingFailed
from regrow.observations import Mark, PhaseSeen
from regrow.watchdog import Patience, Progress

NOON_S = time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, -1))
WELL = Reading(80.0, 40.0, False)
BROKER = "mqtt://127.0.0.1:1883"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StateFolder]:
    with StateFolder(tmp_path / "state") as folder:
        yield folder


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# ---- sensors -------------------------------------------------------------------------------------------------------------------------


def battery(name: str, **fields: str | bytes) -> dict[str, str | bytes]:
    return {f"sys/class/power_supply/{name}/{field}": content for field, content in fields.items()}


def test_the_emptiest_battery_that_feeds_the_machine_counts(tmp_path: Path) -> None:
    assert battery_percent(tmp_path) is None
    mains, mouse = battery("AC", type="Mains\n", online="1\n"), battery("hid", type="Battery\n", scope="Device\n", capacity="3\n")
    assert battery_percent(tree(tmp_path, mains | mouse)) is None
    two = battery("BAT0", type="Battery\n", capacity="81\n") | battery("BAT1", type="Battery\n", scope="System\n", capacity="42\n")
    assert battery_percent(tree(tmp_path, two)) == 42.0


@given(st.one_of(st.binary(max_size=12), st.integers(-10, 1000).map(lambda number: f"{number}\n".encode())))
def test_whatever_a_gauge_says_it_is_a_percentage_or_unknown(tmp_path_factory: pytest.TempPathFactory, said: bytes) -> None:
    root = tree(tmp_path_factory.mktemp("gauge"), battery("BAT0", type="Battery\n", capacity=said))
    found = battery_percent(root)
    assert found is None or (0.0 <= found <= 100.0 and said.strip() == str(int(found)).encode().rjust(len(said.strip()), b"0"))


def manager(metered: str, device: str = 'o "/org/freedesktop/NetworkManager/Devices/3"\n') -> Callable[..., str]:
    """NetworkManager as busctl shows it."""

    def ask(*words: str) -> str:
        assert words[0] == "busctl"
        if "GetDeviceByIpIface" in words:
            return device
        return 's "1.42.4"\n' if words[-1] == "Version" else metered

    return ask


def test_networkmanager_says_what_is_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    way: list[str | Unknown] = ["wlan0"]
    monkeypatch.setattr("edge_agent.conditions.interface_to", lambda _: way[0])
    answers = {"u 0\n": None, "u 1\n": True, "u 2\n": False, "u 3\n": True, "u 4\n": False, "u 9\n": None, "": None, "nonsense": None}
    assert {said: is_metered("wlan0", manager(said)) for said in answers} == answers
    assert is_metered("wlan0", manager("u 2\n", device="")) is None
    assert is_metered("lo", manager("u 1\n")) is False, "the broker is on this machine"
    budget = Budget(unmetered_only=True)
    assert Sensors(budget, BROKER, frozenset({"wlan0"}), ask=manager("u 2\n")).read().metered is True, "the owner knows better"
    assert Sensors(budget, BROKER, frozenset(), ask=manager("u 1\n")).read().metered is False
    sensors = Sensors(budget, BROKER, ask=manager("u 2\n"))
    assert sensors.read().metered is False
    sensors.ask = manager("u 1\n")
    assert sensors.read().metered is False, "it is not asked all the time"
    way[0] = "wwan0"
    assert sensors.read().metered is True, "but when the way is another"
    way[0] = Unknown("no route")
    assert sensors.read().metered is None


def test_a_limit_that_cannot_be_judged_here_is_an_error_with_its_cure(tmp_path: Path, folder: StateFolder) -> None:
    nothing = lambda *_: ""  # noqa: E731
    for budget, cure in (
        (Budget(battery_floor=20.0), "--battery-floor: no battery .* leave the option out"),
        (Budget(max_temperature_c=70.0), "--max-temperature: no thermal zone .* leave the option out"),
        (Budget(unmetered_only=True), "--unmetered-only: NetworkManager does not answer here, .* --metered wwan0"),
    ):
        with pytest.raises(LocalError, match=cure):
            Sensors(budget, BROKER, None, tmp_path, nothing).check()
    with pytest.raises(LocalError, match="--max-joules-per-round: nothing here measures energy"):
        Budgets(Budget(joules_per_round=1.0), folder, Reading)
    Sensors(Budget(unmetered_only=True), BROKER, frozenset(), tmp_path, nothing).check()
    Sensors(Budget(unmetered_only=True), BROKER, None, tmp_path, manager("u 0\n")).check()
    files = battery("BAT0", type="Battery\n", capacity="55\n") | {
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/class/thermal/thermal_zone1/temp": "51000\n",
    }
    sensors = Sensors(Budget(battery_floor=20.0, max_temperature_c=70.0), BROKER, None, tree(tmp_path, files), nothing)
    sensors.check()
    assert sensors.read() == Reading(55.0, 51.0, None)


def test_sensors_that_have_fallen_silent_are_unknown() -> None:
    sensors = InBackground(lambda: WELL)
    assert sensors() == WELL
    sensors._latest = (time.monotonic() - 61.0, WELL)
    assert sensors() == Reading()


# ---- options -------------------------------------------------------------------------------------------------------------------------


def options(**said: Any) -> Budget:
    none = dict.fromkeys(("max_bytes_per_day", "max_joules_per_round", "battery_floor", "max_temperature", "hours"))
    return budget_of(**{**none, "unmetered_only": False, **said})


def test_options_make_limits_and_words() -> None:
    assert not options()
    assert in_words(options()) == ""
    numbers = {"max_bytes_per_day": 10**8, "max_joules_per_round": 20.0, "battery_floor": 30.0, "max_temperature": 75.0}
    everything = options(**numbers, hours="22:00-06:00", unmetered_only=True)
    assert everything == Budget(10**8, 20.0, 30.0, 75.0, Hours(1320, 360), True)
    assert in_words(everything) == (
        "100000000 bytes a day, 20 J a round, battery from 30 %, below 75 C, hours 22:00-06:00, unmetered networks only"
    )
    with pytest.raises(UsageError, match=r"^--hours 'at night' are no hours"):
        options(hours="at night")
    with pytest.raises(UsageError, match=r"^--max-temperature 200\.0"):
        options(max_temperature=200.0)


# ---- the count -----------------------------------------------------------------------------------------------------------------------


class Life:
    """One life of an agent's limits: time passes and bytes travel."""

    def __init__(self, folder: StateFolder, budget: Budget, *, at_s: float = NOON_S, **more: Any) -> None:
        self.now_s, self.bytes, self.reading = at_s, 0, WELL
        self.budgets = Budgets(budget, folder, lambda: self.reading, clock=lambda: self.now_s, **more)

    def done(self, run: str, number: int, share: float) -> None:
        self.budgets.round_done(run, number, share, self.now_s - NOON_S)

    def look(self, more: int = 0, seconds: float = 1.0) -> Any:
        self.now_s += seconds
        self.bytes += more
        return self.budgets.look(self.now_s - NOON_S, self.bytes)


def test_bytes_are_counted_through_restarts_and_begin_anew_at_midnight(folder: StateFolder) -> None:
    limit = Budget(bytes_per_day=10_000_000)
    first = Life(folder, limit)
    assert first.look().bytes_left == 9_500_000
    assert first.look(4_000_000).bytes_left == 5_500_000
    first.budgets.close()
    second = Life(folder, limit, at_s=first.now_s)
    assert second.look(1_000_000).bytes_left == 4_500_000
    third = Life(folder, limit, at_s=second.now_s)  # the second was cut off
    left = third.look().bytes_left
    assert 4_500_000 - 2 * 100_000 <= left <= 4_500_000, "too much is counted by what was written ahead, never too little"
    said = third.look(5_000_000)
    assert (said.link, said.bytes_left) == (False, 0)
    assert said.said.startswith(f"{BYTES}: ")
    assert said.until_s == pytest.approx(12 * 3600.0)
    fourth = Life(folder, limit, at_s=NOON_S + 12 * 3600.0)
    assert fourth.look().bytes_left == 9_500_000


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 300_000), st.booleans(), st.booleans()), max_size=15))
def test_no_way_to_end_makes_the_count_too_low(tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, bool, bool]]) -> None:
    limit, used, cuts = 3_000_000, 0, 0
    with StateFolder(tmp_path_factory.mktemp("lives")) as folder:
        life = Life(folder, Budget(bytes_per_day=limit))
        life.look()
        for more, restarts, orderly in turns:
            life.look(more)
            used += more
            counted = life.budgets.used.sent_received_bytes
            assert used <= counted <= used + cuts * max(limit // 100, LEAST_AHEAD_BYTES)
            if restarts:
                cuts += not orderly
                if orderly:
                    life.budgets.close()
                life = Life(folder, Budget(bytes_per_day=limit), at_s=life.now_s)
                life.look()


def test_a_start_that_sends_nothing_uses_nothing(folder: StateFolder) -> None:
    Life(folder, Budget(bytes_per_day=10**7)).look(10)
    counted = Life(folder, Budget(bytes_per_day=10**7)).budgets.used.sent_received_bytes
    for _ in range(50):
        Life(folder, Budget(bytes_per_day=10**7)).look()
    assert Life(folder, Budget(bytes_per_day=10**7)).budgets.used.sent_received_bytes == counted


def test_a_card_is_written_a_hundred_times_a_day_not_with_every_byte(folder: StateFolder) -> None:
    life = Life(folder, Budget(bytes_per_day=100_000_000))
    life.look()
    before = folder.bytes_written
    for _ in range(1000):
        life.look(50_000)
    assert folder.bytes_written - before < 60 * 400


def test_a_look_costs_nothing_where_little_has_passed(folder: StateFolder) -> None:
    life = Life(folder, Budget(bytes_per_day=10**7))
    assert life.look() is not None
    assert life.look(99_999, seconds=0.5) is None
    assert life.look(1, seconds=0.1).bytes_left == 9_400_000, "but many bytes in less"
    assert life.look(50_000, seconds=0.5) is None
    assert life.look(seconds=0.6).bytes_left == 9_350_000
    assert life.look() is None, "nothing has changed but the time"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"day": "soon"}', b"\xff", b'{"day": "2026-11-21", "counted_s": -1}'])
def test_a_count_that_does_not_check_out_is_told(folder: StateFolder, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    folder.put(BUDGET, content)
    unread(folder, caplog)


@pytest.mark.parametrize("content", [b"", b"torn", b"REGROW1\n", b"REGROW9\n" + bytes(40)])
def test_a_file_that_does_not_check_out_is_told(folder: StateFolder, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (folder.path / BUDGET).write_bytes(content)
    unread(folder, caplog)


def unread(folder: StateFolder, caplog: pytest.LogCaptureFixture) -> None:
    """What was used today is unknown, so the owner's limits hold until tomorrow, through every restart."""
    limit, joules = Budget(bytes_per_day=10**7, joules_per_round=5.0), RoundJoules()
    Life(folder, limit, joules=joules)  # cut off at once
    assert ["hold until tomorrow" in message for message in caplog.messages] == [True]
    for _ in range(2):
        life = Life(folder, limit, joules=joules)
        told = life.look(1000)
        assert (told.train, told.link, told.bytes_left) == (False, False, 0)
        assert told.until_s == pytest.approx(12 * 3600.0)
        for words in ("bytes a day: today's count was damaged", "joules a round: what rounds took was damaged"):
            assert words in told.said
        found = limits_in(folder.path)
        assert (found.state, "count was damaged" in found.said) == ("warn", True)
    assert len(caplog.messages) == 1
    next_day = Life(folder, limit, at_s=NOON_S + 12 * 3600.0, joules=joules)
    told = next_day.look()
    assert (told.train, told.bytes_left, told.density, told.said) == (True, 9_500_000, 1.0, "")


def test_what_was_lost_stays_lost_while_the_clock_is_not_set(folder: StateFolder) -> None:
    (folder.path / BUDGET).write_bytes(b"torn")
    life = Life(folder, Budget(bytes_per_day=10**7), at_s=86_400.0)
    for now, wall_s in ((1.0, 86_401.0), (2.0, NOON_S)):  # set by NTP in between
        life.now_s = wall_s
        life.budgets.look(now, 0)
        assert not life.budgets.allowed.link
    assert (life.budgets.used.day, life.budgets.used.lost) == ("2026-11-21", True)
    again = Life(folder, Budget(bytes_per_day=10**7), at_s=NOON_S + 12 * 3600.0)
    assert again.look().bytes_left == 9_500_000


def test_joules_of_rounds_are_remembered_and_asked_for_once(folder: StateFolder) -> None:
    joules = RoundJoules()
    for number, phase, took in ((7, "train", 25.0), (7, "transmit", 5.0), (8, "train", 9.0), (9, "train", 1.0), (9, "receive", None)):
        joules.add(PhaseSeen(0.0, 1.0, phase, took, "rapl", "measured", number=number))
    joules.add(Mark(0.0, "start"))
    limit = Budget(joules_per_round=10.0)
    first = Life(folder, limit, joules=joules)
    assert first.look().density == 1.0
    first.done("toy/r1", 7, 0.5)
    assert first.look() is None, "its last phase may still be under way"
    told = first.look(seconds=SETTLE_S)
    assert told.density == pytest.approx(0.5 / 3)
    assert told.said == f"{JOULES}: a round with 50 % of the parameters took 30 J, 10 J are allowed"
    first.done("toy/r1", 8, 0.2)
    first.budgets.close()
    again = Life(folder, limit, at_s=first.now_s, joules=joules)
    assert again.look().density == 0.2
    for _ in range(UNMEASURED_MOST):
        again.done("toy/r1", 9, 0.2)
    told = again.look(seconds=SETTLE_S)
    assert not told.train
    assert "the last 3 rounds were not measured, so it rests until one that is over turns out to be measured" in told.said
    again.done("toy/r2", 8, 1.0)
    assert again.look(seconds=SETTLE_S).density == 1.0
    for number in range(100, 200):
        joules.add(PhaseSeen(0.0, 1.0, "train", 1.0, "rapl", "measured", number=number))
    assert (joules.of(7), joules.of(199)) == (None, 1.0), "old rounds are forgotten"


def test_a_clock_that_is_not_set_says_no_hours(folder: StateFolder) -> None:
    life = Life(folder, Budget(hours=Hours.parse("00:01-24:00")), at_s=86_400.0)
    assert "the clock is not set" in life.look().said
    life.now_s = NOON_S
    assert life.look().train


def test_the_doctor_tells_what_is_set_and_what_holds(folder: StateFolder) -> None:
    assert limits_in(folder.path).said == "none is set"
    life = Life(folder, Budget(bytes_per_day=10**7, hours=Hours.parse("22:00-06:00")))
    life.look()
    found = limits_in(folder.path)
    assert found.state == "warn"
    assert found.said.startswith(f"{HOURS}: it works from 22:00 to 06:00 only (set: 10000000 bytes a day, hours 22:00-06:00; ")
    life.look(seconds=11 * 3600.0)
    assert (limits_in(folder.path).state, limits_in(folder.path).said[:10]) == ("ok", "none holds")
    (folder.path / BUDGET).write_bytes(b"torn")
    assert limits_in(folder.path).state == "warn"


# ---- training that stands still ------------------------------------------------------------------------------------------------------


def test_training_stands_still_between_two_steps_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    results: queue.SimpleQueue[Trained | TrainingFailed] = queue.SimpleQueue()
    steps: queue.SimpleQueue[int] = queue.SimpleQueue()
    may_step = threading.Semaphore(0)

    def train_job(_trainers: Any, _source: Any, job: Train, clock: Callable[[], float], on_step: Callable[[], None]) -> Trained:
        began_s = clock()
        for step in range(job.steps):
            on_step()
            steps.put(step)
            may_step.acquire()
        return Trained(job.number, np.zeros(1, np.float32), 1, 0.0, clock() - began_s, ())

    monkeypatch.setattr("edge_agent.worker.train_job", train_job)
    monkeypatch.setattr("edge_agent.worker.HOLD_LOOK_S", 0.01)
    progress = Progress("training", Patience(first_s=5.0, step_s=0.05, slowest=1.0))
    made = lambda *_: Standing()  # noqa: E731
    worker = Worker(DataSource(5), results.put, make=made, progress=progress)
    worker.put(Train(1, 0, {"layout": b""}, np.zeros(1, np.float32), np.zeros(1, np.uint32), 1, {}, 3, 1, 0.1, 1))
    assert steps.get(timeout=10) == 0
    worker.hold(True)
    may_step.release()
    until_s = time.monotonic() + 10.0
    while "standing still" not in str(progress._work) and time.monotonic() < until_s:
        time.sleep(0.005)
    assert "standing still" in str(progress._work)
    assert steps.empty()
    assert not progress.overdue(time.monotonic()), "what stands still is not stuck"
    held_from_s = time.monotonic()
    worker.hold(False)
    assert steps.get(timeout=10) == 1
    worker.hold(True)
    worker.abandon()
    may_step.release()
    failed = results.get(timeout=10)
    assert isinstance(failed, TrainingFailed)
    assert failed.reason == "given up"
    assert worker._held_s <= time.monotonic() - held_from_s + 10.0
    worker.close()


class Standing:
    """As much of a trainer as is asked before the first step."""

    layout = None

    def examples(self, *, masked: bool) -> Any:
        raise AssertionError(masked)


# ---- the agent -----------------------------------------------------------------------------------------------------------------------


def data() -> DataSource:
    source = DataSource(20)
    source.append(np.zeros((20, 64), np.float32), np.zeros(20, np.int64))
    return source


def agent(folder: StateFolder, budgets: Budgets | None) -> Agent:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return Agent(Bundle("d1", f"mqtt://127.0.0.1:{port}", "secret"), folder, data(), senses=Senses(budgets=lambda _: budgets))


def test_an_agent_knows_its_limits_before_it_connects_and_keeps_the_count_at_its_end(folder: StateFolder) -> None:
    life = Life(folder, Budget(bytes_per_day=10**7, hours=Hours.parse("22:00-06:00")))
    heard: list[Note] = []
    one = agent(folder, life.budgets)
    one._look_at_limits()
    assert not one.device._restraint.allowed.train
    assert one.quiet, "outside its hours the link is for others"
    one._step(Limited(life.budgets.allowed))
    one.stop()
    one.run(heard.append)
    assert json.loads(folder.get(BUDGET) or b"")["sent_received_bytes"] == 0


def test_the_agent_steers_its_training_thread(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    one = agent(folder, None)
    did: list[object] = []
    monkeypatch.setattr(one._worker, "hold", did.append)
    monkeypatch.setattr(one._worker, "abandon", lambda: did.append("abandon"))
    one._perform([Steer("stand still"), Steer("go on"), Steer("give up")])
    assert did == [True, False, "abandon"]
    one.stop()
    one.run()
