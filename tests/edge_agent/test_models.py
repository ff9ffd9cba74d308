"""A promoted model on a device: judged on its data, placed whole or not at all, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edge_agent import models
from edge_agent.data.source import DataSource
from edge_agent.model_folder import ModelFolder
from regrow import topics, wire
from regrow.intake import ATTEMPTS, DECISION, PIECE
from regrow.machine import Connected, Received, Subscribe
from regrow.piecewise import PATIENCE_S
from tests.edge_agent.promotion_rig import TASK, Rig, digits, linear, untrained_head

GOOD, FAIR, BAD = linear(), linear(wrong=3), linear(wrong=9)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "state")


def current(rig: Rig) -> bytes | None:
    """The model that an application would load."""
    file = rig.path / "models" / TASK / "current" / "model.onnx"
    return file.read_bytes() if file.exists() else None


def live(rig: Rig) -> wire.PromotionReport:
    said = rig.live()
    assert said is not None
    return said


# ---- judging -----------------------------------------------------------------------------------------------------------------------


def test_the_first_is_placed_whatever_its_score(rig: Rig) -> None:
    rig.promote(BAD, 1)
    said = live(rig)
    assert said.new is not None
    assert (said.outcome, said.old, said.new.examples) == ("placed", None, 20)
    assert said.new.accuracy < 0.3
    assert current(rig) == BAD
    assert said.current == wire.digest(BAD)
    assert not rig.folder.list(PIECE)


def test_a_better_one_replaces_it_and_a_worse_one_does_not(rig: Rig) -> None:
    for number, (model, outcome, there) in enumerate(
        [(FAIR, "placed", FAIR), (GOOD, "placed", GOOD), (BAD, "kept", GOOD), (FAIR, "kept", GOOD)]
    ):
        rig.promote(model, number + 1)
        said = live(rig)
        assert (said.number, said.outcome) == (number + 1, outcome)
        assert current(rig) == there
        assert said.current == wire.digest(there)
        if number:
            assert said.old is not None
            assert said.new is not None
            assert (said.new.accuracy < said.old.accuracy) == (outcome == "kept")
            assert bool(said.reason) == (outcome == "kept")
    before = ModelFolder(rig.path, TASK).current()
    assert before is not None
    assert (rig.path / "models" / TASK / "current" / "previous" / "model.onnx").read_bytes() == FAIR
    assert before.about.accuracy == 1.0


def test_an_equal_one_replaces_it(rig: Rig) -> None:
    same = linear(pad=1)
    rig.promote(GOOD, 1)
    rig.live()
    rig.promote(same, 2)
    assert live(rig).outcome == "placed"
    assert current(rig) == same


def test_what_is_in_place_is_judged_by_the_data_of_today(tmp_path: Path) -> None:
    source = DataSource(400)
    x, y = digits().everything()
    easy = y >= 3
    source.append(x[easy], y[easy])  # FAIR is right about these
    rig = Rig(tmp_path, source)
    rig.promote(FAIR, 1)
    assert live(rig).new == live(rig).new
    x, y = digits(rows=300, seed=2).everything()
    source.append(x, y)
    rig.promote(GOOD, 2)
    said = live(rig)
    assert said.old is not None
    assert said.old.accuracy < 0.9
    assert said.outcome == "placed"


def test_without_validation_data_there_is_no_score_but_a_model(tmp_path: Path) -> None:
    source = DataSource(10, 0.0)
    rig = Rig(tmp_path, source)
    rig.promote(GOOD, 1)
    assert (live(rig).outcome, rig.reports[-1].new) == ("placed", None)
    source.append(*digits(10).everything())
    rig.promote(FAIR, 2)
    assert (live(rig).outcome, rig.reports[-1].old) == ("placed", None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ((np.zeros((9, 5), np.float32), np.zeros(9, np.int64)), r"takes float32"),
        ((np.zeros((9, 64), np.float32), np.full(9, 11)), "labels are 0 to 9"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_reported_and_the_old_one_stays(tmp_path: Path, data: Any, reason: str) -> None:
    source = DataSource(9)
    rig = Rig(tmp_path, source)
    rig.promote(GOOD, 1)
    rig.live()
    source.append(*data)
    rig.promote(FAIR, 2)
    said = live(rig)
    assert said.outcome == "failed"
    assert "does not fit this device's data" in said.reason
    assert reason in said.reason
    assert current(rig) == GOOD
    assert said.current == wire.digest(GOOD)


def test_values_are_judged_by_how_much_of_them_is_explained(tmp_path: Path) -> None:
    x, _ = digits().everything()
    (wanted,) = onnxruntime.InferenceSession(GOOD).run(None, {"x": x})
    source = DataSource(100)
    source.append(x, wanted)
    rig = Rig(tmp_path, source)
    step = '{"loss":"mse"}'
    for number, (model, outcome) in enumerate([(FAIR, "placed"), (GOOD, "placed"), (FAIR, "kept")], 1):
        rig.promote(model, number, step=step)
        assert live(rig).outcome == outcome
    assert rig.reports[1].new is not None
    assert rig.reports[1].new.accuracy == pytest.approx(1.0)
    placed = ModelFolder(rig.path, TASK).current()
    assert placed is not None
    assert placed.about.step == step


def test_a_loss_that_this_device_does_not_know_is_refused(rig: Rig) -> None:
    rig.promote(GOOD, 1, step='{"loss":"of tomorrow"}')
    said = live(rig)
    assert said.outcome == "failed"
    assert "of tomorrow" in said.reason


# ---- withdrawing -------------------------------------------------------------------------------------------------------------------


def test_a_withdrawn_model_goes_back_to_the_one_before_without_fetching_it(rig: Rig) -> None:
    rig.promote(FAIR, 1)
    rig.live()
    rig.promote(GOOD, 2)
    rig.live()
    rig.promote(FAIR, 3, withdrawn=[wire.digest(GOOD)])
    rig.delivered.clear()
    said = live(rig)
    assert (said.outcome, said.current) == ("placed", wire.digest(FAIR))
    assert current(rig) == FAIR
    assert rig.delivered == [topics.promotion(TASK)]
    rig.promote(None, 4, withdrawn=[wire.digest(GOOD), wire.digest(FAIR)])
    assert live(rig).outcome == "removed"
    assert current(rig) is None
    assert not list((rig.path / "models" / TASK).iterdir())
    rig.promote(GOOD, 5)
    assert live(rig).outcome == "placed"


def test_a_device_that_never_had_the_withdrawn_one_compares(rig: Rig) -> None:
    rig.promote(GOOD, 1)
    rig.live()
    rig.promote(FAIR, 3, withdrawn=[wire.digest(BAD)])
    assert live(rig).outcome == "kept"
    assert current(rig) == GOOD


# ---- saying ------------------------------------------------------------------------------------------------------------------------


def test_what_is_decided_is_said_again_after_every_connect_and_reboot_and_not_decided_again(rig: Rig) -> None:
    rig.promote(GOOD, 1)
    first = live(rig)
    rig.delivered.clear()
    assert rig.live() == first
    rig.start()
    assert rig.live() == first
    assert rig.delivered == [topics.promotion(TASK)] * 2


def test_nothing_is_asked_for_while_training_needs_the_link(rig: Rig) -> None:
    promotion = rig.promote(GOOD, 1)
    rig.models.step(Connected(), 0.0, quiet=False)
    assert rig.models.step(Received(topics.promotion(TASK), wire.encode(promotion)), 0.0, quiet=False) == []
    (asked,) = rig.models.go_on(1.0, quiet=True)
    assert isinstance(asked, Subscribe)


# ---- accidents ---------------------------------------------------------------------------------------------------------------------


def test_a_cut_download_goes_on_where_it_was(rig: Rig) -> None:
    large = linear(pad=300)
    rig.promote(large, 1)
    pieces = [topic for topic in rig.retained if "/file/" in topic]
    assert len(pieces) == 5
    gone = {topic: rig.retained.pop(topic) for topic in pieces[3:]}
    assert rig.live() is None
    assert len(rig.folder.list(PIECE)) == 3
    rig.start()
    rig.retained |= gone
    rig.delivered.clear()
    assert live(rig).outcome == "placed"
    assert [topic for topic in rig.delivered if "/file/" in topic] == pieces[3:]
    assert current(rig) == large


def test_a_corrupted_piece_is_reported_and_asked_for_again_later(rig: Rig) -> None:
    rig.promote(linear(pad=100), 1)
    (first, *_) = [topic for topic in rig.retained if "/file/" in topic]
    true = rig.retained[first]
    rig.retained[first] = true[:-1] + b"?"
    said = live(rig)
    assert said.outcome == "failed"
    assert "that the announcement does not name" in said.reason
    rig.retained[first] = true
    assert rig.models.go_on(rig.now, quiet=True) == []
    rig.now += PATIENCE_S + 1
    assert live(rig).outcome == "placed"


def test_a_piece_that_was_torn_on_the_disk_is_fetched_again(rig: Rig) -> None:
    large = linear(pad=100)
    rig.promote(large, 1)
    missing = {topic: rig.retained.pop(topic) for topic in list(rig.retained) if topic.endswith("/1")}
    rig.live()
    (kept,) = rig.folder.list(PIECE)
    with (rig.path / kept).open("r+b") as file:
        file.truncate(100)
    rig.start()
    rig.retained |= missing
    assert live(rig).outcome == "placed"
    assert current(rig) == large


def test_pieces_that_never_come_are_reported(rig: Rig) -> None:
    promotion = rig.promote(GOOD, 1)
    rig.retained.clear()
    rig.announce(promotion)
    assert rig.live() is None
    rig.now += PATIENCE_S + 1
    rig._link(rig.models.go_on(rig.now, quiet=True))
    assert rig.reports[-1].outcome == "failed"
    assert "not on the broker" in rig.reports[-1].reason


def test_a_disk_without_room_is_reported_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, reserve_bytes=1000)
    rig.promote(linear(pad=100), 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: usage._replace(free=100 * 1024))
    said = live(rig)
    assert said.outcome == "failed"
    assert "no room" in said.reason
    assert not rig.folder.list(PIECE)
    monkeypatch.undo()
    rig.now += PATIENCE_S + 1
    assert live(rig).outcome == "placed"


def test_a_disk_that_fills_while_a_model_is_placed_leaves_the_old_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.promote(FAIR, 1)
    rig.live()
    rig.promote(GOOD, 2)
    sync = os.fsync

    def full(descriptor: int) -> None:
        if ".new" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    said = live(rig)
    assert said.outcome == "failed"
    assert "No space left on device; free space" in said.reason
    assert current(rig) == FAIR
    monkeypatch.undo()
    rig.now += PATIENCE_S + 1
    assert live(rig).outcome == "placed"
    assert current(rig) == GOOD


class Killed(BaseException):
    """Not an Exception: nobody tidies up after kill -9."""


STEPS = ("fsync", "rename", "replace", "symlink", "unlink", "mkdir")


def dying(monkeypatch: pytest.MonkeyPatch, die_at: int) -> list[str]:
    """Let the process die before its `die_at`-th step on the disk; returns the steps that were taken."""
    taken: list[str] = []
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in STEPS}

    def step(name: str) -> Callable[..., Any]:
        def act(*arguments: Any, **more: Any) -> Any:
            if len(taken) == die_at:
                raise Killed
            taken.append(name)
            return real[name](*arguments, **more)

        return act

    for name in STEPS:
        monkeypatch.setattr(os, name, step(name))
    return taken


@pytest.mark.parametrize("withdrawing", [False, True])
def test_a_death_at_any_step_leaves_a_whole_model_and_the_next_life_ends_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, withdrawing: bool
) -> None:
    old, new = FAIR, GOOD
    seen = set()
    for die_at in range(100):
        rig = Rig(tmp_path / str(die_at))
        rig.promote(old, 1)
        rig.live()
        if withdrawing:
            rig.promote(new, 2)
            rig.live()
            rig.promote(old, 3, withdrawn=[wire.digest(new)])
        else:
            rig.promote(new, 2)
        with monkeypatch.context() as patch:
            taken = dying(patch, die_at)
            try:
                rig.live()
                died = False
            except Killed:
                died = True
        there = current(rig)
        seen.add(there)
        assert there in (old, new), f"died after {taken}"
        rig.start()
        assert current(rig) == there
        said = live(rig)
        assert (said.outcome, current(rig)) == ("placed", old if withdrawing else new), f"died after {taken}"
        folder = ModelFolder(rig.path, TASK)
        names = {entry.name for entry in folder.path.iterdir()}
        assert names == {"current"} | {placed.path.name for placed in folder.held().values()}
        if not withdrawing:
            assert len(folder.held()) == 2
        assert not rig.folder.list(PIECE)
        rig.folder.close()
        if not died:
            break
    assert seen == {old, new}
    assert die_at > 5


def test_a_damaged_model_is_not_used_and_the_one_before_it_is(rig: Rig) -> None:
    for number, model in enumerate((FAIR, GOOD), 1):
        rig.promote(model, number)
        rig.live()
    file = (rig.path / "models" / TASK / "current" / "model.onnx").resolve()
    file.write_bytes(GOOD[:-1])
    rig.start()
    assert current(rig) == FAIR
    rig.promote(linear(pad=1), 3)
    assert live(rig).outcome == "placed"


def test_a_model_that_ends_the_agent_is_given_up_after_some_attempts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.promote(GOOD, 1)

    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    for _ in range(ATTEMPTS):
        with monkeypatch.context() as patch:
            patch.setattr(models, "settle", dies)
            with pytest.raises(Killed):
                rig.live()
        rig.start()
    said = live(rig)
    assert said.outcome == "failed"
    assert "ended each time" in said.reason
    rig.start()
    assert live(rig) == said
    rig.promote(GOOD, 2)  # the operator insists
    assert live(rig).outcome == "placed"


def test_a_damaged_decision_is_made_again(rig: Rig) -> None:
    rig.promote(GOOD, 1)
    first = live(rig)
    rig.folder.put(DECISION + TASK, b"\xc1 nonsense")
    rig.start()
    assert live(rig) == first


# ---- a head of its own -------------------------------------------------------------------------------------------------------------


def test_a_local_head_that_gains_is_used_and_never_leaves(tmp_path: Path) -> None:
    model, programs = untrained_head()
    rig = Rig(tmp_path, local_head=True)
    rig.promote(model, 1, head=programs)
    said = live(rig)
    assert said.new is not None
    assert said.tuned is not None
    assert said.tuned.accuracy > said.new.accuracy + 0.3
    placed = ModelFolder(rig.path, TASK).current()
    assert placed is not None
    assert set(placed.head()) == {"w", "b"}
    assert placed.about.accuracy == said.tuned.accuracy
    rig.promote(BAD, 2)  # no better than the model in place is without its head
    said = live(rig)
    assert said.outcome == "kept"
    assert said.old is not None
    assert said.old.accuracy == placed.about.accuracy


def test_without_the_option_the_head_is_not_even_fetched(rig: Rig) -> None:
    model, programs = untrained_head()
    rig.promote(model, 1, head=programs)
    said = live(rig)
    assert (said.outcome, said.tuned) == ("placed", None)
    assert len([topic for topic in rig.delivered if "/file/" in topic]) == 1


def test_a_head_that_does_not_gain_is_not_used(tmp_path: Path) -> None:
    rig = Rig(tmp_path, local_head=True)
    rig.promote(GOOD, 1, head=untrained_head()[1])
    said = live(rig)
    assert said.outcome == "placed"
    placed = ModelFolder(rig.path, TASK).current()
    assert placed is not None
    assert not placed.head()


@pytest.mark.parametrize("broken", ["layout", "train", "initial"])
def test_a_broken_head_costs_only_the_head(tmp_path: Path, broken: str) -> None:
    rig = Rig(tmp_path, local_head=True)
    model, programs = untrained_head()
    rig.promote(model, 1, head=programs | {broken: b"\x00 broken"})
    said = live(rig)
    assert (said.outcome, said.tuned) == ("placed", None)
