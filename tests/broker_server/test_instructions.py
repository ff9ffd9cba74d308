"""What a person tells a run: nobody gets new work while it is paused, whoever comes; and it holds across restarts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from broker_server.instructions import FILE, Instructions, Told, as_told
from regrow.errors import LocalError
from regrow.machine import Connected, Received, Standing, Woken
from regrow.task import Stop, parse_task
from tests.broker_server.page_rig import TOKEN, page_of

HELLO = Received("regrow/v1/device/new/hello", b"")


def test_nothing_is_changed_for_a_run_that_was_told_nothing(tmp_path: Path) -> None:
    instructions = Instructions(tmp_path)
    for event in (Connected(), HELLO, Woken()):
        assert instructions.before(event, {"a": 1}) == (event,)
    rests = Standing(frozenset({"a"}), frozenset({"b"}))
    assert instructions.before(rests, {}) == (rests,)


def test_a_pause_holds_for_everybody_and_for_who_comes_later(tmp_path: Path) -> None:
    instructions = Instructions(tmp_path)
    instructions.before(Standing(frozenset({"p"})), {})
    instructions.tell(Told(paused=True))
    assert instructions.before(Woken(), {"a": 1, "p": 1}) == (Standing(frozenset({"p"}), frozenset({"a"})), Woken())
    assert instructions.before(Woken(), {"a": 1, "p": 1}) == (Woken(),)
    assert instructions.before(HELLO, {"a": 1, "p": 1}) == (Standing(frozenset({"p"}), frozenset({"a", "new"})), HELLO)
    assert instructions.before(HELLO, {"a": 1, "p": 1}) == (HELLO,)
    assert instructions.before(Standing(), {}) == (Standing(draining=frozenset({"a", "new", "p"})),)
    instructions.tell(Told(paused=False))
    assert instructions.before(Woken(), {"a": 1}) == (Standing(), Woken())
    assert instructions.before(Woken(), {"a": 1}) == (Woken(),)


def test_it_holds_across_restarts(tmp_path: Path) -> None:
    Instructions(tmp_path).tell(Told(paused=True, stop=Stop(aggregations=7)))
    again = Instructions(tmp_path)
    assert again.told == Told(paused=True, stop=Stop(aggregations=7))
    assert again.before(Connected(), {"a": 1}) == (Standing(draining=frozenset({"a"})), Connected())
    task = parse_task('name = "t"\n[stop]\nseconds = 5')
    assert as_told(task, again.told).stop == Stop(aggregations=7)
    assert as_told(task, Told()) is task


@pytest.mark.parametrize("text", ["", "[]", '{"paused": 3}', '{"pause": true}', '{"stop": {"seconds": -1}}', "\x00"])
def test_a_file_that_is_none_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(LocalError, match=r"instructions\.json: .*; correct or remove it"):
        Instructions(tmp_path)


def test_a_paused_coordinator_gives_out_nothing_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    with page_of(tmp_path, 4, stop="aggregations = 100000") as rig:
        coordinator = rig.gateway.coordinator
        step = coordinator.step

        def heeding(event: object, now: float) -> list[object]:  # as Gateway._take does
            return [effect for heard in rig.instructions.before(event, coordinator.ledger.devices) for effect in step(heard, now)]  # type: ignore[arg-type]

        coordinator.step = heeding  # type: ignore[method-assign, assignment]
        rig.live(30)
        version = coordinator.ledger.version
        assert version > 0
        assert rig.ask("/api/pause", "POST", {}, token=TOKEN)[2]["done"].startswith("paused")
        rig.live(30)
        assert not [who for who, device in coordinator.ledger.devices.items() if device.lease is not None]
        still, updates = coordinator.ledger.version, sum(device.updates for device in coordinator.ledger.devices.values())
        assert {row["standing"] for row in rig.board.whole()["devices"].values()} == {"draining"}
        rig.live(60)
        assert (coordinator.ledger.version, sum(device.updates for device in coordinator.ledger.devices.values())) == (still, updates)
        assert rig.board.whole()["run"]["paused"] is True
        assert rig.ask("/api/start", "POST", {}, token=TOKEN)[0] == 200
        rig.live(30)
        assert coordinator.ledger.version > still


def test_when_it_ends_can_be_changed_while_it_runs(tmp_path: Path) -> None:
    with page_of(tmp_path, 2, stop="aggregations = 100000") as rig:
        rig.live(20)
        version = rig.gateway.coordinator.ledger.version
        status, _, said = rig.ask("/api/end", "POST", {"aggregations": version + 3}, token=TOKEN)
        assert (status, said) == (200, {"done": f"the run ends after {version + 3} aggregations"})
        rig.page.controls.look()
        rig.live(60)
        assert rig.gateway.coordinator.ledger.finished == f"{version + 3} aggregations"
        assert rig.ask("/api/settings")[2]["stop"] == msgspec.to_builtins(Stop(aggregations=version + 3))
        assert rig.ask("/api/settings")[2]["stop_source"] == "the page"
        status, _, said = rig.ask("/api/end", "POST", {}, token=TOKEN)  # an empty form
        assert (status, said["error"].startswith("nothing was changed: say after how many seconds")) == (400, True)
        assert rig.ask("/api/settings")[2]["stop"] == msgspec.to_builtins(Stop(aggregations=version + 3))
        assert rig.ask("/api/end", "POST", "null", token=TOKEN)[2] == {"done": "the run ends as its task.toml says"}
        assert rig.ask("/api/settings")[2]["stop"] == msgspec.to_builtins(Stop(aggregations=100000))
