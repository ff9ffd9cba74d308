"""A device's seals over its lives: stamps that only rise, and what it has heard of the coordinator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.sealing import FOLDER, HEARD, SAVE_S, Sealing, known_s
from edge_agent.state import StateFolder
from regrow import topics, wire
from regrow.errors import LocalError
from regrow.machine import Connected, Publish, Received
from regrow.seal import open_seal
from tests.regrow.test_guards import NEXT, NOW_MS, OURS, THEIRS, said
from tests.regrow.test_seal import sign_by, verify

RUN = topics.Run("toy", "r1")
ASSIGNMENT = RUN.assignment("d1")
DAY_MS = 86_400_000


@dataclass
class Card:
    """An identity on an SD card, with a counter that outlives its owner."""

    folder: Path
    starts: int = 0
    device: str = "d1"
    signing_key: bytes = THEIRS
    coordinator_keys: Sequence[bytes] = (OURS,)

    def sign(self, data: bytes, /) -> bytes:
        return sign_by(self.signing_key)(data)

    def next_start(self, above: int = 0, /) -> int:
        self.starts = max(self.starts, above) + 1
        return self.starts


@pytest.fixture
def card(tmp_path: Path) -> Card:
    return Card(tmp_path / "identity")


def life(card: Card, now: float = 0.0, since_ms: int = NOW_MS) -> Sealing:
    return Sealing(card, verify, now, since_ms=since_ms)


def power_cut(sealing: Sealing) -> None:
    """The process is gone, and with it its lock; nothing is saved."""
    sealing._folder.close()


def stamp_of(sealing: Sealing, now: float, topic: str = RUN.telemetry("d1")) -> int:
    sealed = sealing.seal(Publish(topic, b"frame"), now)
    opened = open_seal(topic, sealed.payload, [sealing.identity.signing_key], verify)
    assert opened.frame == b"frame"
    return opened.stamp


def test_stamps_rise_with_every_message_and_every_start(card: Card) -> None:
    first = life(card, 100.0)
    stamps = [stamp_of(first, at) for at in (100.0, 100.0, 100.0005, 101.0, 100.5, 101.0)]
    power_cut(first)
    again = life(card, 0.0)
    stamps += [stamp_of(again, at) for at in (0.0, 0.1)]
    assert stamps == sorted(set(stamps))
    assert [stamp >> 32 for stamp in stamps] == [1] * 6 + [2] * 2


def test_after_fifty_days_another_start_is_counted(card: Card) -> None:
    sealing = life(card)
    before = stamp_of(sealing, 4_294_967.0)
    after = [stamp_of(sealing, at) for at in (4_294_968.0, 4_294_969.0)]
    assert before >> 32 == 1
    assert after == [2 << 32, 2 << 32 | 1000]


def test_only_what_travels_sealed_is_sealed(card: Card) -> None:
    sealing = life(card)
    for bare in (Publish(RUN.probe("d1"), b"noise"), Publish(RUN.telemetry("d1"), b"")):
        assert sealing.seal(bare, 0.0) == bare
    assert sealing.open(Connected(), 0.0) == Connected()


def test_what_was_heard_outlives_a_clean_end(card: Card) -> None:
    first = life(card)
    assert first.open(said(ASSIGNMENT, NOW_MS + 5), 0.0)
    first.close(0.0)
    again = life(card)
    assert again.open(said(ASSIGNMENT, NOW_MS + 4), 0.0) is None
    assert again.open(said(ASSIGNMENT, NOW_MS + 5), 0.0)


def test_a_power_cut_costs_minutes_of_it_and_the_card_is_written_every_few_minutes_only(card: Card) -> None:
    first = life(card)
    for second in range(3600):
        assert first.open(said(topics.claim("toy"), NOW_MS + 1000 * second), second)
        assert first.open(said(ASSIGNMENT, NOW_MS + 1000 * second), second)
        assert not first.tend(second)
    assert first._folder.bytes_written < (1 + 3600 / SAVE_S) * 400
    power_cut(first)
    again = life(card)
    assert again.open(said(ASSIGNMENT, NOW_MS + 1000 * int(3599 - SAVE_S)), 0.0) is None
    assert again.time.at_ms(0.0) >= NOW_MS + 1000 * (3600 - SAVE_S - 1)


def test_the_first_word_after_a_long_time_is_kept_at_once(card: Card) -> None:
    """A device without a battery was off for a month: if the power fails again, it does not believe the month before once more."""
    first = life(card)
    assert first.open(said(ASSIGNMENT, NOW_MS + 30 * DAY_MS), 0.0)
    first.tend(1.0)
    power_cut(first)
    again = life(card)
    assert again.open(said(topics.tasks("d1"), NOW_MS + 1000, lasts_s=86_400), 0.0) is None
    assert again.now_s(0.0) * 1000 >= NOW_MS + 30 * DAY_MS


def test_what_was_said_before_the_device_was_made_has_expired(card: Card) -> None:
    sealing = life(card, since_ms=NOW_MS)
    assert sealing.open(said(topics.tasks("d1"), NOW_MS - DAY_MS, lasts_s=3600), 0.0) is None


def test_the_fleets_time_is_known_to_whoever_only_looks(card: Card) -> None:
    assert known_s(card.folder) == 0.0
    assert known_s(card.folder, 5.0) == 5.0
    first = life(card)
    assert first.open(said(ASSIGNMENT, NOW_MS + 5000), 0.0)
    first.close(1.0)
    assert known_s(card.folder, 5.0) == NOW_MS / 1000 + 6
    (card.folder / "heard" / "heard").write_bytes(b"torn")
    assert known_s(card.folder, 5.0) == 5.0


def test_a_device_that_does_not_know_the_key_in_force_is_deaf(card: Card) -> None:
    sealing, keys = life(card), topics.coordinator_keys("d1")
    for topic, key, deaf in ((ASSIGNMENT, NEXT, False), (keys, NEXT, True), (ASSIGNMENT, OURS, True), (keys, OURS, False)):
        sealing.open(said(topic, NOW_MS, key=key), 0.0)
        assert sealing.deaf is deaf


def test_what_was_refused_is_told(card: Card) -> None:
    sealing = life(card)
    assert sealing.open(Received(ASSIGNMENT, b"RG\x01\x06bare"), 0.0) is None
    (note,) = sealing.tend(0.0)
    assert (note.kind, note.fields["kind"], note.fields["times"]) == ("seal refused", "unsealed", 1)
    assert not sealing.tend(1.0)


def test_keys_that_change_count_from_then_on(card: Card, tmp_path: Path) -> None:
    sealing = life(card)
    assert sealing.open(said(ASSIGNMENT, NOW_MS, key=NEXT), 0.0) is None
    sealing.identity = Card(tmp_path / "identity", signing_key=NEXT, coordinator_keys=(OURS, NEXT))
    assert sealing.open(said(ASSIGNMENT, NOW_MS, key=NEXT), 0.0)
    assert stamp_of(sealing, 1.0) == 1 << 32 | 1000


def older(stamp: int, *, at: int = NOW_MS, key: bytes = OURS) -> Received:
    return said(topics.older("d1"), at, key=key, frame=wire.encode(wire.Older(stamp=stamp)))


def test_a_device_that_runs_from_an_old_copy_goes_on_above_what_was_heard(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    sealing = life(card)
    heard = 41 << 32 | 777
    assert stamp_of(sealing, 1.0) < heard
    assert sealing.open(older(heard), 1.0) is None
    assert sealing.must_say_again()
    assert not sealing.must_say_again()
    assert stamp_of(sealing, 1.0) > heard
    assert card.starts == 42, "durable"
    assert "fleet rotate d1" in caplog.text


def test_one_of_two_copies_with_the_same_start_goes_on_too(card: Card) -> None:
    sealing = life(card)
    heard = stamp_of(sealing, 1.0)
    sealing.open(older(heard + 5), 1.0)
    assert stamp_of(sealing, 1.0) >> 32 == 2


@pytest.mark.parametrize("key", [OURS, NEXT])
def test_a_device_that_is_past_what_was_heard_or_is_told_by_a_stranger_stays(card: Card, key: bytes) -> None:
    sealing = life(card)
    before = stamp_of(sealing, 1.0)
    sealing.open(older(before - 1 if key == OURS else 1 << 40, key=key), 1.0)
    assert not sealing.must_say_again()
    assert stamp_of(sealing, 2.0) == before + 1000
    assert card.starts == 1


def test_two_agents_cannot_share_an_identity(card: Card) -> None:
    first = life(card)
    with pytest.raises(LocalError, match="in use"):
        life(card)
    first.close(0.0)
    life(card).close(0.0)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"time_ms": "soon", "stamps": {}}', b"\xff"])
def test_memories_that_do_not_check_out_are_set_aside(card: Card, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with StateFolder(card.folder / FOLDER) as folder:
        folder.put(HEARD, content)
    assert life(card).open(said(ASSIGNMENT, NOW_MS), 0.0)
    assert "set aside what was heard" in caplog.text
