"""The journal against a list: through restarts, a full journal, crashes at every byte and a disk that fails, no row is silently gone."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.field_journal import MIN_BATCH_BYTES, MIN_JOURNAL_BYTES, Batch, FieldJournal, span
from regrow.errors import LocalError
from regrow.observations import (
    MAX_BATCH_BYTES,
    MAX_ROWS,
    LinkSeen,
    Mark,
    Missing,
    PowerSeen,
    Row,
    TransferSeen,
    UplinkSeen,
    encode_rows,
)

NONCES = itertools.count(1)


def opened(folder: Path, most_bytes: int = 10**6) -> FieldJournal:
    return FieldJournal(folder, most_bytes, next(NONCES).to_bytes(16, "big"), reserve_bytes=0)


def marks(first: int, count: int, size: int = 0) -> list[Row]:
    """Marks whose time is their number."""
    return [Mark(float(number), "x" * size) for number in range(first, first + count)]


def drained(journal: FieldJournal) -> list[Batch]:
    """Everything, each batch receipted; what leaves must fit what a receiver takes."""
    batches = []
    while (batch := journal.oldest()) is not None:
        assert journal.oldest() == batch
        encode_rows(batch.rows)
        batches.append(batch)
        journal.receipted(batch.journal, batch.number)
    return batches


def numbers(batches: Sequence[Batch]) -> list[int]:
    return [int(row.at_s) for batch in batches for row in batch.rows if isinstance(row, Mark)]


class Model(RuleBasedStateMachine):
    """The journal beside a list of what was appended."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.journal = opened(self.folder, MIN_JOURNAL_BYTES)
        self.appended = 0
        self.received: list[Row] = []
        self.keys: list[tuple[bytes, int]] = []

    @rule(count=st.integers(1, 60), size=st.sampled_from([0, 40, 1000]), fit=st.sampled_from([MIN_BATCH_BYTES, MAX_BATCH_BYTES]))
    def append(self, count: int, size: int, fit: int) -> None:
        self.journal.batch_bytes = fit
        self.journal.append(marks(self.appended, count, size))
        self.appended += count

    @rule()
    def send(self) -> None:
        batch = self.journal.oldest()
        if batch is not None:
            assert self.journal.oldest() == batch
            self.received += batch.rows
            self.keys.append((batch.journal, batch.number))
            self.journal.receipted(batch.journal, batch.number - 1)
            assert self.journal.oldest() == batch
            self.journal.receipted(batch.journal, batch.number)

    @rule()
    def receipts_of_others_change_nothing(self) -> None:
        batch = self.journal.oldest()
        self.journal.receipted(b"?" * 16, 2**53)
        assert self.journal.oldest() == batch

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        if orderly:
            self.journal.close()
        else:
            self.journal._give_up_open()  # what the kernel does with a killed process's files
        self.journal = opened(self.folder, MIN_JOURNAL_BYTES)

    @precondition(lambda self: self.appended)
    @rule()
    def sync(self) -> None:
        self.journal.sync()

    @invariant()
    def it_is_bounded(self) -> None:
        size = sum(file.stat().st_size for file in self.folder.iterdir())
        assert size == self.journal.size_bytes <= MIN_JOURNAL_BYTES

    def teardown(self) -> None:
        for batch in drained(self.journal):
            self.received += batch.rows
            self.keys.append((batch.journal, batch.number))
        came = [int(row.at_s) for row in self.received if isinstance(row, Mark)]
        missing = [row for row in self.received if isinstance(row, Missing)]
        assert came == sorted(set(came)), "in order, and once"
        assert len(came) + sum(row.rows for row in missing) == self.appended
        for gone in set(range(self.appended)) - set(came):
            assert any(row.at_s <= gone <= row.at_s + row.seconds for row in missing), gone
        assert len(set(self.keys)) == len(self.keys)
        assert list(self.folder.glob("*.rejected")) == []
        self.journal.close()
        shutil.rmtree(self.folder)


Model.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
test_it_is_a_list_whose_gaps_are_told = Model.TestCase


def test_a_batch_keeps_number_and_rows_through_restarts_and_no_number_is_used_twice(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append(marks(0, 3))
    first = journal.oldest()
    assert first is not None
    journal.append(marks(3, 2))
    journal.close()
    again = opened(tmp_path)
    assert again.oldest() == first
    again.append(marks(5, 1))
    batches = drained(again)
    assert numbers(batches) == [0, 1, 2, 3, 4, 5]
    assert [(batch.journal == first.journal, batch.number) for batch in batches] == [(True, 1), (True, 2), (False, 1)]
    assert drained(opened(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_batch_has_what_a_receiver_takes(tmp_path: Path) -> None:
    journal = opened(tmp_path, 10**7)
    journal.append(marks(0, 3 * MAX_ROWS))
    journal.append(marks(3 * MAX_ROWS, 200, 1000))
    journal.batch_bytes = MIN_BATCH_BYTES
    journal.append(marks(3 * MAX_ROWS + 200, 200, 100))
    batches = drained(journal)
    assert numbers(batches) == list(range(3 * MAX_ROWS + 400))
    assert [len(batch.rows) for batch in batches[:3]] == [MAX_ROWS] * 3
    assert all(len(encode_rows(batch.rows)) <= MIN_BATCH_BYTES for batch in batches[-4:])


def files_of(folder: Path) -> list[Path]:
    """Three batches of four rows each."""
    for life in range(3):
        journal = opened(folder)
        journal.append(marks(4 * life, 4))
        journal.close()
    return sorted(folder.iterdir())


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_file_that_ends_anywhere_loses_its_tail_and_nothing_else(tmp_path: Path, damaged: int) -> None:
    origin = tmp_path / "origin"
    whole = files_of(origin)[damaged].read_bytes()
    for end in range(len(whole)):
        folder = tmp_path / "cut"
        shutil.copytree(origin, folder)
        files = sorted(folder.iterdir())
        os.truncate(files[damaged], end)
        journal = opened(folder)
        came = numbers(drained(journal))
        lost = [number for number in range(12) if number not in came]
        rest = list(range(4 * damaged, 4 * damaged + 4))
        assert lost
        assert lost == rest[len(rest) - len(lost) :]
        assert len(journal.rejected) == (0 if end in (0, *(boundary(whole, rows) for rows in range(4))) else 1)
        assert journal.size_bytes == 0
        shutil.rmtree(folder)


def boundary(data: bytes, rows: int) -> int:
    """Where the first rows of a file end."""
    place = 36
    for _ in range(rows):
        place += 8 + int.from_bytes(data[place : place + 4], "little")
    return place


def test_a_flipped_bit_anywhere_never_gives_another_row(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    whole = files_of(origin)[1].read_bytes()
    for place in range(len(whole)):
        folder = tmp_path / "flipped"
        shutil.copytree(origin, folder)
        file = sorted(folder.iterdir())[1]
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        journal = opened(folder)
        came = numbers(drained(journal))
        assert came == [0, 1, 2, 3, *range(4, 4 + len(came) - 8), 8, 9, 10, 11]
        assert len(came) < 12
        assert len(journal.rejected) == 1
        assert len(list(folder.glob("*.rejected"))) == 1, "for who wants to look"
        shutil.rmtree(folder)


def test_of_damaged_tails_only_the_last_is_kept(tmp_path: Path) -> None:
    for file in files_of(tmp_path):
        os.truncate(file, file.stat().st_size - 1)
    journal = opened(tmp_path)
    assert numbers(drained(journal)) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert [reason.partition(": ")[2] for _, reason in journal.rejected] == ["cut short"] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["0000000003.rows.rejected"]


def append_for_ever(journal: FieldJournal) -> None:
    for count in itertools.count():
        journal.append(marks(10 * count, 10, 1000))


def test_a_crash_before_the_oldest_are_gone_says_too_much_and_never_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(tmp_path, MIN_JOURNAL_BYTES)

    class PowerCut(Exception):
        pass

    def cut(*_: object) -> None:
        raise PowerCut

    monkeypatch.setattr(journal, "_forget", cut)
    with pytest.raises(PowerCut):
        append_for_ever(journal)
    count = 10 * (MIN_JOURNAL_BYTES // 10_300)
    batches = drained(opened(tmp_path, MIN_JOURNAL_BYTES))
    came = numbers(batches)
    assert len(came) >= count
    assert came == list(range(len(came)))
    assert [type(row) for batch in batches for row in batch.rows].count(Missing) == 1


def test_what_a_full_disk_takes_is_told_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(tmp_path)
    journal.append(marks(0, 2))
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    for first in (2, 5):
        with pytest.raises(LocalError, match="No space left on device; free space on the disk"):
            journal.append(marks(first, 3))
    monkeypatch.setattr(os, "write", real)
    journal.append(marks(8, 1))
    rows = [row for batch in drained(journal) for row in batch.rows]
    assert rows == [*marks(0, 2), Missing(2.0, 5.0, 6), *marks(8, 1)]
    assert journal.rejected == [], "what was torn was cut off at once"


def test_it_leaves_the_disk_to_training(tmp_path: Path) -> None:
    journal = FieldJournal(tmp_path, 10**9, b"n" * 16, reserve_bytes=2**62)
    with pytest.raises(LocalError, match="MB are left to training"):
        journal.append(marks(0, 1))
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "zzz.rows").write_bytes(b"not ours")
    for life in range(2):
        journal = opened(tmp_path)
        journal.append(marks(life, 1))
        journal.close()
    assert numbers(drained(opened(tmp_path))) == [0, 1]


def test_it_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalError, match="cannot use the journal"):
        opened(tmp_path / "file")


@pytest.mark.parametrize(
    ("row", "stretch"),
    [
        (TransferSeen(10.0, 2.0, True, "update", 1, 1), (10.0, 12.0)),
        (PowerSeen(10.0, 2.0, None, "none", "unmeasured"), (8.0, 10.0)),
        (LinkSeen(1.0, 2.0, "eth0"), (0.0, 1.0)),
        (UplinkSeen(10.0, 1.0, 1.0, 1.0), (10.0, 10.0)),
        (Missing(10.0, 2.0, 1), (10.0, 12.0)),
    ],
)
def test_what_a_row_covers(row: Row, stretch: tuple[float, float]) -> None:
    assert span(row) == stretch
