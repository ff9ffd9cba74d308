"""Cut at any place, an update leaves the old version or the new one in use, and goes on to its end by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("cryptography")

from edge_agent.update_files import Journal, read_journal, read_settings
from edge_agent.updater import PLACES, PLACES_BACK, Updater, lacking
from regrow.errors import LocalError
from tests.edge_agent.release_rig import Board, bundle_of, manifest_of, wheels_of
from tests.edge_agent.updater_child import DURING

CHILD = Path(__file__).with_name("updater_child.py")
ROOT = CHILD.parents[2]
OLD, NEW = "1.0.0", "2.0.0"
pytestmark = pytest.mark.timeout(600)  # true environments: some seconds each, minutes on a busy machine


class Made:
    """One update, watched: `first` and `built` are how the device was before it and when it was about to switch. Environments know their
    own path, so every test has them at the same place."""

    def __init__(self, path: Path) -> None:
        self.board = Board(path / "board")
        self.first, self.built = path / "first", path / "built"
        shutil.copytree(self.board.path, self.first, symlinks=True)
        self.places: list[str] = []
        self.board.offer(1, NEW)
        agent = [str(self.board.prefix / "current" / "bin" / "regrow"), "agent", str(self.board.health)]

        def at(place: str) -> None:
            self.places.append(place)
            if place == "switch:begin":
                shutil.copytree(self.board.path, self.built, symlinks=True)
            if place == "trial:waiting":
                subprocess.run(agent, check=True)

        self.journal = Updater(read_settings(self.board.settings), at=at, say=lambda _: None).apply()
        self.ran = self.board.runs()

    def again(self, kept: Path) -> Board:
        shutil.rmtree(self.board.path)
        shutil.copytree(kept, self.board.path, symlinks=True)
        return self.board


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("device"))


@pytest.fixture
def board(made: Made) -> Board:
    """Version 1.0.0, and nothing else."""
    return made.again(made.first)


@pytest.fixture
def built(made: Made) -> Board:
    """Version 1.0.0 in use, 2.0.0 beside it, about to switch."""
    return made.again(made.built)


def run(board: Board, place: str, *, agent: bool = True) -> int:
    """`regrow update apply`, cut at a place; its exit status. agent: one starts, and says that it trains, when the trial waits for it."""
    started = [str(board.prefix / "current" / "bin" / "regrow"), "agent", str(board.health)] if agent else []
    command = [sys.executable, str(CHILD), str(board.settings), place, *started]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode


def linked(board: Board, link: str) -> str:
    return (board.prefix / link).readlink().name


def journal_with(board: Board, **changes: Any) -> None:
    """Write another journal, as a cut at another moment would have left it."""
    changed = msgspec.structs.replace(read_journal(board.prefix), **changes)
    (board.prefix / "update" / "journal.json").write_bytes(msgspec.json.encode(changed))


def test_an_update_passes_all_places_and_stays(made: Made) -> None:
    assert set(made.places) == set(PLACES)
    assert (made.journal.step, made.journal.outcome, made.ran) == ("", "healthy", NEW)


def test_cut_everywhere_the_old_or_the_new_version_runs_and_the_update_ends(board: Board) -> None:
    board.offer(1, NEW)
    seen = []
    for place in (*PLACES[: PLACES.index("build:done")], DURING, *PLACES[PLACES.index("build:done") :]):
        assert run(board, place) == -signal.SIGKILL, place
        seen.append(board.runs())  # the device starts again: what is current works
        board.boot()
    switched = PLACES.index("switch:done") + 1
    assert seen == [OLD] * switched + [NEW] * (len(seen) - switched)
    assert run(board, "") == 0
    journal = read_journal(board.prefix)
    assert (journal.step, journal.outcome, journal.number) == ("", "healthy", 1)
    assert board.runs() == NEW
    assert not list(board.spool.iterdir())
    assert linked(board, "good") == linked(board, "current") == "b"


def test_a_release_that_does_not_train_is_rolled_back_wherever_it_is_cut(built: Board) -> None:
    journal_with(built, trial_minutes=1e-6)
    for place in PLACES_BACK:
        assert run(built, place, agent=False) == -signal.SIGKILL, place
        assert built.runs() == (NEW if place in ("back:begin", "back:linked") else OLD)
    assert run(built, "") == 0
    journal = read_journal(built.prefix)
    assert (journal.outcome, built.runs()) == ("rolled back", OLD)
    assert "left no word" in journal.reason
    assert not (built.prefix / "b").exists()
    built.offer(1, NEW)
    assert run(built, "") == 0
    journal = read_journal(built.prefix)
    assert (journal.outcome, built.runs()) == ("rolled back", OLD), "it is not tried again by itself"
    assert "which was tried here already" in journal.refused


def test_an_agent_that_connects_but_finishes_no_round_is_rolled_back_unless_contact_is_enough(built: Board) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    now = time.monotonic() + 1000
    said: dict[str, Any] = {"version": NEW, "boot": boot, "connected_s": now, "round_s": None}
    built.health.write_text(json.dumps(said))
    assert lacking(built.health, Journal(version=NEW, began_s=1.0), boot) == "connected, but finished no round"
    assert not lacking(built.health, Journal(version=NEW, began_s=1.0, wants="contact"), boot)
    assert "did not connect" in lacking(built.health, Journal(version=NEW, began_s=now + 1), boot)
    assert "did not connect" in lacking(built.health, Journal(version=NEW, began_s=1.0), "another boot")
    assert "did not connect" in lacking(built.health, Journal(version=OLD, began_s=1.0), boot)
    for torn in ("", "{", "[]", '{"version": 1}', json.dumps({**said, "round_s": "soon"})[:-3]):
        built.health.write_text(torn)
        assert "left no word" in lacking(built.health, Journal(version=NEW), boot)


def test_a_release_that_lacks_a_dependency_is_given_up_before_the_switch(board: Board) -> None:
    wheels = wheels_of(board.path / "incomplete", NEW, needs=("onnxruntime", "numpy>=2"))
    board.lay(bundle_of(manifest_of(wheels, 1, NEW), wheels), 1)
    assert run(board, "") == 0
    journal = read_journal(board.prefix)
    assert (journal.outcome, board.runs()) == ("failed", OLD)
    assert "numpy" in journal.reason
    assert not (board.prefix / "b").exists()


def test_an_environment_that_says_another_version_is_given_up_before_the_switch(built: Board) -> None:
    journal_with(built, step="smoke", version="2.0.2")
    assert run(built, "") == 0
    journal = read_journal(built.prefix)
    assert (journal.outcome, built.runs()) == ("failed", OLD)
    assert "`regrow --version` says 'regrow 2.0.0'" in journal.reason


def test_a_device_that_starts_again_and_again_during_the_trial_goes_back(built: Board) -> None:
    journal_with(built, trial_minutes=60)
    for start in range(1, 4):
        assert run(built, "trial:waiting", agent=False) == -signal.SIGKILL
        assert read_journal(built.prefix).starts == start
        assert built.runs() == NEW
        journal_with(built, boot=f"another boot {start}")
    assert run(built, "", agent=False) == 0
    assert (read_journal(built.prefix).outcome, built.runs()) == ("rolled back", OLD)


def test_rollback_by_hand_goes_back_and_forth(built: Board) -> None:
    assert run(built, "") == 0
    hand = Updater(read_settings(built.settings), say=lambda _: None)
    assert hand.rollback() == OLD == built.runs()
    assert linked(built, "good") == "a"
    assert hand.rollback() == NEW == built.runs()


def test_wheels_that_are_there_need_not_come_again(built: Board) -> None:
    assert run(built, "") == 0
    wheels = wheels_of(built.path / "next", "2.1.0")
    built.lay(bundle_of(manifest_of(wheels, 2, "2.1.0"), wheels[:1]), 2)
    assert run(built, "") == 0
    assert built.runs() == "2.1.0"
    assert sorted(file.name for file in (built.prefix / "wheels").iterdir()) == [wheel.name for wheel in sorted(wheels)]


@pytest.mark.parametrize("wrong", ["{", "{}", '{"keys": []}', '{"keys": ["00"]}', '{"keys": [7]}', '{"keys": "00"}'])
def test_settings_that_do_not_check_out_are_refused(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "update.json"
    file.write_text(wrong)
    file.chmod(0o644)
    with pytest.raises(LocalError, match=r"update\.json"):
        read_settings(file)


def test_settings_that_others_may_write_are_refused(board: Board) -> None:
    board.settings.chmod(0o666)
    with pytest.raises(LocalError, match="others than root"):
        read_settings(board.settings)


def test_the_documentation_names_every_place() -> None:
    page = (ROOT / "docs" / "updates.md").read_text()
    assert [place for place in (*PLACES, *PLACES_BACK) if f"`{place}`" not in page] == []
