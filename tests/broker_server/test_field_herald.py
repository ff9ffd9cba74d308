"""What the gateway tells devices of field runs, who rests meanwhile, and what their answers say of their clocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker_server.field_herald import AGAIN_S, FOLDER, GRACE_S, KEPT_S, LOOK_S, REFRESH_S, TRIES, FieldHerald, Heard, announce, reports
from broker_server.observations import ClockSeen
from regrow import topics, wire
from regrow.errors import LocalError
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Standing, Subscribe
from regrow.observations import Field, FieldReport

T0_S = 1_700_000_000.0


@dataclass
class Bench:
    """A herald whose clocks the test owns."""

    home: Path
    speaks: bool = True
    now: float = 1000.0
    wall_s: float = T0_S
    clocks: list[ClockSeen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.herald = FieldHerald(self.home, self.clocks.append, speaks=self.speaks, clock=lambda: self.wall_s)

    def step(self, event: Event | None = None, after_s: float = LOOK_S) -> list[Effect]:
        self.now, self.wall_s = self.now + after_s, self.wall_s + after_s
        return self.herald.step(event, self.now)

    def hear(self, report: FieldReport, after_s: float = 0.0, device: str = "d1") -> list[Effect]:
        return self.step(Received(topics.field_report(device), wire.encode(report)), after_s)

    def answer(self, said: Field, ahead_s: float = 0.0) -> Heard:
        """What is kept when a device whose clock is ahead answers at once."""
        self.hear(FieldReport(number=said.number, heard_s=self.wall_s + ahead_s, said_s=self.wall_s + ahead_s))
        self.step()
        return reports(self.home)["d1"]


def said(effects: Sequence[Effect], device: str = "d1") -> list[Field]:
    topic = topics.field_run(device)
    found = [effect for effect in effects if isinstance(effect, Publish) and effect.topic == topic]
    assert all(effect.retain for effect in found)
    return [wire.decode(bytes(effect.payload), Field)[0] for effect in found if effect.payload]


def cleared(effects: Sequence[Effect]) -> list[str]:
    return [effect.topic for effect in effects if isinstance(effect, Publish) and effect.retain and not effect.payload]


def resting(effects: Sequence[Effect]) -> list[set[str]]:
    return [set(effect.paused) for effect in effects if isinstance(effect, Standing)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def connected(bench: Bench) -> list[Effect]:
    effects = bench.step(Connected())
    assert Subscribe((topics.field_report("+"),)) in effects
    return effects


def run(bench: Bench, **more: object) -> Field:
    return Field(number=1, name="walk", **{"phase": "run", "start_s": bench.wall_s, "end_s": bench.wall_s + 1000.0, **more})  # type: ignore[arg-type]


def test_a_clock_that_is_set_back_hides_no_announcement(bench: Bench) -> None:
    connected(bench)
    announce(bench.home, ["d1"], run(bench))
    assert len(said(bench.step())) == 1
    assert said(bench.step(after_s=10.0)) == []
    announce(bench.home, ["d2"], run(bench))
    os.utime(bench.home / FOLDER, (T0_S, T0_S))
    assert len(said(bench.step(), "d2")) == 1


def test_what_is_announced_is_published_and_published_again_after_a_reconnect(bench: Bench) -> None:
    assert said(connected(bench)) == []
    number = announce(bench.home, ["d1", "d2"], run(bench, sample_hz=4.0))
    effects = bench.step()
    (first,) = said(effects)
    assert (first.name, first.phase, first.sample_hz, first.sent_s, first.number >= number) == ("walk", "run", 4.0, bench.wall_s, True)
    assert len(said(effects, "d2")) == 1
    assert said(bench.step()) == []
    bench.step(Disconnected())
    assert said(bench.step()) == []
    (again,) = said(bench.step(Connected()))
    assert again.number > first.number
    assert again.sent_s == bench.wall_s


def test_a_field_run_that_goes_on_is_said_again_and_one_that_is_over_is_not(bench: Bench) -> None:
    connected(bench)
    announce(bench.home, ["d1"], run(bench, end_s=bench.wall_s + 100.0))
    found = said(bench.step())
    for _ in range(int(300 / LOOK_S)):
        found += said(bench.step())
    assert len(found) == 1 + 100 // REFRESH_S + 1
    assert [one.number for one in found] == sorted({one.number for one in found})


def test_who_keeps_still_gets_no_work(bench: Bench) -> None:
    for other in (bench, Bench(bench.home, speaks=False)):
        announce(bench.home, ["d1"], run(other, phase="baseline", start_s=other.wall_s + 10.0, end_s=other.wall_s + 20.0))
        announce(bench.home, ["d2"], run(other, phase="baseline", end_s=other.wall_s + 5.0))
        found = []
        for _ in range(int(30 / LOOK_S)):
            effects = other.step()
            assert other.speaks or not any(isinstance(effect, Publish) for effect in effects)
            found += resting(effects)
        assert found == [{"d2"}, set(), {"d1"}, set()]


@pytest.mark.parametrize("phase", ["baseline", "run"])
def test_who_has_kept_still_gets_work_when_it_says_that_it_works_again(bench: Bench, phase: str) -> None:
    connected(bench)
    times = {"end_s": bench.wall_s + 10.0} if phase == "baseline" else {"start_s": bench.wall_s + 10.0, "end_s": bench.wall_s + 90.0}
    announce(bench.home, ["d1", "d2"], run(bench, phase=phase, **times))
    effects = bench.step()
    assert resting(effects) == [{"d1", "d2"}]
    before, after = ("baseline", "") if phase == "baseline" else ("", "run")
    for device in ("d1", "d2"):
        bench.hear(FieldReport(number=said(effects, device)[0].number, phase=before), device=device)  # type: ignore[arg-type]
    assert resting(bench.step(after_s=12.0)) == [], "the link or its clock may be late, and what it is given now it would not take"
    bench.hear(FieldReport(number=said(effects)[0].number, phase=after))  # type: ignore[arg-type]
    assert resting(bench.step()) == [{"d2"}]
    assert resting(bench.step(after_s=GRACE_S)) == [set()], "it has lost its link"


@pytest.mark.parametrize("ahead_s", [0.0, 40.0, -40.0])
def test_an_answer_measures_the_devices_clock(bench: Bench, ahead_s: float) -> None:
    connected(bench)
    number = announce(bench.home, ["d1"], run(bench))
    (first,) = said(bench.step())
    sent_s = bench.wall_s
    heard_s, said_s = sent_s + 0.3 + ahead_s, sent_s + 0.4 + ahead_s
    bench.hear(FieldReport(number=first.number, phase="run", heard_s=heard_s, said_s=said_s, meter="ina"), after_s=0.5)
    (clock,) = bench.clocks
    assert (clock.device, clock.at_s) == ("d1", said_s)
    assert clock.offset_s == pytest.approx(ahead_s + 0.1, abs=1e-5)
    assert clock.error_s == pytest.approx(0.2, abs=1e-5)
    assert abs(clock.offset_s - ahead_s) <= (clock.error_s or 0.0)
    bench.step()
    (heard,) = reports(bench.home).values()
    assert (heard.announced, heard.report.phase, heard.report.meter) == (number, "run", "ina")
    assert heard.offset_s == clock.offset_s
    bench.hear(FieldReport(number=first.number, phase="", heard_s=heard_s, said_s=said_s + 500.0), after_s=500.0)
    assert len(bench.clocks) == 1, "one answer to each; what else it reports tells of phases"
    bench.step()
    assert reports(bench.home)["d1"].report.phase == ""


def test_a_poor_answer_is_asked_for_again_and_the_best_one_kept(bench: Bench) -> None:
    connected(bench)
    announce(bench.home, ["d1"], run(bench))
    (now,) = said(bench.step())
    for _ in range(TRIES):
        bench.step(after_s=2.0)
        heard = bench.answer(now)
        assert heard.error_s is not None
        assert heard.error_s >= 1.0
        (now,) = said(bench.step(after_s=AGAIN_S))
    assert bench.answer(now, ahead_s=0.25).offset_s == pytest.approx(0.25, abs=1e-5)
    bench.step(after_s=AGAIN_S)
    (now,) = said(bench.step(after_s=REFRESH_S))
    bench.step(after_s=5.0)
    assert bench.answer(now).offset_s == pytest.approx(0.25, abs=1e-5)


def test_a_gateway_whose_clock_went_back_goes_on_above_what_the_device_has_heard(bench: Bench) -> None:
    connected(bench)
    announce(bench.home, ["d1"], run(bench))
    (first,) = said(bench.step())
    later = first.number + 10**9
    effects = [*bench.hear(FieldReport(number=later)), *bench.step()]
    (above,) = said(effects)
    assert above.number > later
    assert reports(bench.home) == {}
    assert bench.answer(above).report.number == above.number


def test_the_end_is_said_until_it_is_heard_and_then_nothing_is_left(bench: Bench) -> None:
    connected(bench)
    announce(bench.home, ["d1"], run(bench))
    bench.answer(said(bench.step())[0])
    number = announce(bench.home, ["d1"], Field(number=1))
    (end,) = said(bench.step())
    assert end.name == ""
    bench.hear(FieldReport(number=end.number))
    effects = [*bench.step(), *bench.step()]
    assert cleared(effects) == [topics.field_run("d1")]
    assert sorted(file.name for file in (bench.home / FOLDER).iterdir()) == ["d1.report"]
    assert reports(bench.home)["d1"].announced == number


def test_what_is_long_over_is_cleared(bench: Bench) -> None:
    announce(bench.home, ["d1"], run(bench, end_s=bench.wall_s + 1.0))
    connected(bench)
    late = Bench(bench.home, wall_s=T0_S + KEPT_S + 10.0)
    effects = [*late.step(Connected()), *late.step()]
    assert cleared(effects) == [topics.field_run("d1")]


def test_nobody_fills_the_folder_or_ends_the_gateway(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    connected(bench)
    announce(bench.home, ["d1"], run(bench))
    (first,) = said(bench.step())
    (bench.home / FOLDER / "d3.json").write_text("{")
    (bench.home / FOLDER / "d4.json").write_bytes(b'{"number": 1, "name": "\xff"}')
    (bench.home / FOLDER / "No Name.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        bench.hear(FieldReport(number=first.number), device="d9")
        for payload in (b"", b"nonsense", wire.encode(wire.Tasks())):
            bench.step(Received(topics.field_report("d1"), payload))
            bench.step(Received(topics.field_report("d9"), payload))
        bench.step()
    assert reports(bench.home) == {}
    assert len([record for record in caplog.records if "is no announcement" in record.getMessage()]) == 2


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"phase": "baseline", "end_s": 0.0}, "a baseline needs an end"),
        ({"start_s": 10.0, "end_s": 9.0}, "before it begins"),
    ],
)
def test_what_cannot_be_is_not_announced(bench: Bench, more: dict[str, object], complaint: str) -> None:
    with pytest.raises(LocalError, match=complaint):
        announce(bench.home, ["d1"], run(bench, **more))
    with pytest.raises(LocalError, match="device 'D 1'"):
        announce(bench.home, ["D 1"], run(bench))
    assert list((bench.home / FOLDER).glob("*")) == []
