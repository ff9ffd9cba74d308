"""What the gateway keeps of observations: once each, durable before the receipt, bounded, and never at the cost of training."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from broker_server import observations
from broker_server.observations import FILE, TABLES, ClockSeen, Recorder, annotate, open_observations, recorder_of
from regrow import topics, wire
from regrow.errors import LocalError
from regrow.machine import Connected, Disconnected, Effect, Publish, Received, Subscribe
from regrow.observations import (
    LinkSeen,
    Mark,
    Missing,
    Observations,
    ObservationsReceipt,
    PhaseSeen,
    PowerSeen,
    Row,
    TransferSeen,
    UplinkSeen,
    encode_rows,
)
from tests.testbed.processes import until

T0_S = 1_700_000_000.0
ROWS: list[Row] = [
    TransferSeen(1.0, 2.0, True, "update", 3, 4, "run", 5, 6, 0.07),
    UplinkSeen(1.5, 2e6, 1e6, 3e6, True),
    LinkSeen(2.0, 1.0, "wlan0", 3, 4, 0.05, 6, "cubic", -60.0, 7e6, 2.4e9, "wifi"),
    PowerSeen(3.0, 1.0, None, "unmeasured: no meter", "unmeasured", 45.0, "throttled"),
    PhaseSeen(4.0, 1.0, "train", 5.0, "ina3221", "measured", "run", 5, 0.25, 20, 4.0, 6.0, ""),
    Missing(5.0, 6.0, 7),
    Mark(8.0, "start"),
]


class Bench:
    """A recorder with a clock of the test's."""

    def __init__(self, home: Path, **limits: Any) -> None:
        self.home, self.wall_s = home, T0_S
        self.effects: list[Effect] = []
        home.mkdir(exist_ok=True)
        self.recorder = Recorder(home, clock=lambda: self.wall_s, **{"reserve_bytes": 0, **limits})

    def give(
        self, rows: Sequence[Row] = ROWS, *, device: str = "d1", journal: bytes = b"j" * 16, number: int = 1, sent_s: float = T0_S
    ) -> None:
        said = Observations(journal=journal, number=number, sent_s=sent_s)
        self.hear(wire.encode(said, encode_rows(rows)), device)

    def hear(self, message: bytes, device: str = "d1") -> None:
        self.effects += self.recorder.step(Received(topics.observations(device), message), 0.0)

    def receipts(self, count: int = 1) -> list[tuple[str, int]]:
        """(device, number) of that many, and no more."""

        def look() -> bool:
            self.effects += self.recorder.step(None, 0.0)
            return len(self.effects) >= count

        until(look, "receipts")
        effects, self.effects = self.effects, []
        found = []
        for effect in effects:
            assert isinstance(effect, Publish)
            assert not effect.retain
            said = wire.decode(bytes(effect.payload), ObservationsReceipt)[0]
            device, kind = topics.parse_of_device(effect.topic, ("observations-receipt",)) or ("", "")
            assert kind == "observations-receipt"
            found.append((device, said.number))
        return sorted(found)

    def end(self) -> None:
        """Everything that was given is written, or was refused."""
        self.recorder.close()


def rows_of(home: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(open_observations(home)) as db:
        return db.execute(query).fetchall()


Open = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Open]:
    benches: list[Bench] = []

    def made(**limits: Any) -> Bench:
        benches.append(Bench(tmp_path / "home", **limits))
        return benches[-1]

    yield made
    for one in benches:
        if one.recorder._writer._thread.is_alive():
            one.end()


def test_every_field_of_every_row_comes_back(bench: Open) -> None:
    one = bench()
    assert one.recorder.step(Connected(), 0.0) == [Subscribe((topics.observations("+"),))]
    one.give(sent_s=T0_S - 3.0)
    assert one.receipts() == [("d1", 1)]
    with closing(open_observations(one.home)) as db:
        db.row_factory = sqlite3.Row
        for row, (table, kind) in zip(ROWS, TABLES.items(), strict=True):
            assert type(row) is kind
            (stored,) = db.execute(f"SELECT * FROM {table}").fetchall()
            said = {name: getattr(row, name) for name in row.__struct_fields__}
            assert dict(stored) == {"device": "d1", **said, "received_s": T0_S}
        assert [tuple(row) for row in db.execute("SELECT * FROM batches")] == [("d1", (b"j" * 16).hex(), 1, len(ROWS), T0_S)]
        assert [tuple(row) for row in db.execute("SELECT * FROM clocks")] == [("d1", T0_S - 3.0, -3.0, None)]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.execute("DELETE FROM marks")


def test_a_batch_counts_once_also_after_a_restart(bench: Open) -> None:
    one = bench()
    for _ in range(3):
        one.give()
    assert one.receipts(3) == [("d1", 1)] * 3
    one.end()
    again = bench()
    again.give()
    again.give(device="d2")
    again.give(journal=b"k" * 16)
    again.give(number=2)
    assert again.receipts(4) == [("d1", 1), ("d1", 1), ("d1", 2), ("d2", 1)]
    assert rows_of(again.home, "SELECT device, count(*) FROM marks GROUP BY device ORDER BY device") == [("d1", 3), ("d2", 1)]


def test_what_does_not_check_out_is_refused_whole_and_told_once(bench: Open, caplog: pytest.LogCaptureFixture) -> None:
    one = bench()
    good = wire.encode(Observations(journal=b"j" * 16, number=1, sent_s=1.0), encode_rows(ROWS))
    empty = wire.encode(Observations(journal=b"j" * 16, number=1, sent_s=1.0), encode_rows([]))
    with caplog.at_level(logging.WARNING):
        for message in (good[:-1], b"nonsense", empty, wire.encode(wire.Tasks())):
            one.hear(message)
        one.recorder.step(Received("regrow/v1/device/d1/observations/more", good), 0.0)
        one.recorder.step(Received(topics.observations("d1"), b""), 0.0)
        one.recorder.step(Disconnected(), 0.0)
        one.give(number=2)
        assert one.receipts() == [("d1", 2)]
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("d1: refused: Observations: ")
    assert rows_of(one.home, "SELECT number FROM batches") == [(2,)]


def test_a_device_has_a_number_of_rows_a_day(bench: Open, caplog: pytest.LogCaptureFixture) -> None:
    one = bench(rows_a_day=10)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 3):
            one.give(number=number)
        one.give(device="d2")
        assert one.receipts(4) == [("d1", 1), ("d1", 1), ("d1", 1), ("d2", 1)], "a receipt that says less takes nothing now"
        one.end()
        one = bench(rows_a_day=10)
        one.give(number=2)
        assert one.receipts() == [("d1", 1)], "also after a restart"
        one.wall_s += 86_400.0
        one.give(number=2)
        assert one.receipts() == [("d1", 2)]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["d1: it has sent 10 rows of observations today; the others are taken tomorrow, if its journal keeps them"] * 2


def test_the_file_has_an_end(bench: Open, caplog: pytest.LogCaptureFixture) -> None:
    one = bench(most_bytes=200_000)
    with caplog.at_level(logging.WARNING):
        for number in range(1, 31):
            one.give([Mark(0.0, "x" * 1000)] * 40, number=number)
            (_, newest), *_ = one.receipts()
            if newest < number:
                break
    assert 2 < number < 10
    assert newest == number - 1
    one.end()
    assert (one.home / FILE).stat().st_size < 300_000
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith(
        "observations.sqlite has reached 0 MB: observations are not taken any more; raise --observations-mb, or move the file away"
    )


def test_the_disk_is_left_to_the_runs(bench: Open, caplog: pytest.LogCaptureFixture) -> None:
    one = bench(reserve_bytes=2**62)
    with caplog.at_level(logging.WARNING):
        one.give()
        one.give(device="d2")
        assert one.receipts(2) == [("d1", 0), ("d2", 0)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "observations are not taken" in said


def test_a_file_that_is_broken_is_told_once_and_stops_nothing(
    bench: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observations, "RETRY_S", 0.0)
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / FILE
    file.write_bytes(b"this is no database" * 1000)
    with caplog.at_level(logging.WARNING):
        one = bench()
        one.give()
        until(lambda: caplog.records, "the complaint")
        one.give()
        one.recorder.note_clock(ClockSeen("d1", 1.0, 2.0, 3.0))
        file.rename(tmp_path / "broken")

        def stored() -> list[Effect]:
            one.give()
            return one.effects

        until(stored, "a receipt when the file was moved away")
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"observations are not stored, training goes on: {file}: file is not a database; ")
    assert last == "observations are stored again"


def test_what_is_not_durable_is_not_receipted(bench: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observations, "RETRY_S", 0.0)
    monkeypatch.setattr(observations, "BUSY_S", 0.05)
    one = bench()
    annotate(one.home, "makes the file", 0.0)
    with closing(sqlite3.connect(one.home / FILE, isolation_level=None)) as other, caplog.at_level(logging.ERROR):
        other.execute("BEGIN IMMEDIATE")
        one.give()
        until(lambda: caplog.records, "the complaint")
        one.recorder.step(None, 0.0)
        assert one.effects == []
        other.execute("ROLLBACK")
    one.give()
    assert one.receipts() == [("d1", 1)]
    assert rows_of(one.home, "SELECT count(*) FROM marks") == [(1,)]


def test_one_process_records_and_clocks_are_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with recorder_of(home) as first, recorder_of(home) as second:
        assert first is not None
        assert second is None
        first.note_clock(ClockSeen("d1", 10.0, 0.5, 0.01))
    assert rows_of(home, "SELECT * FROM clocks") == [("d1", 10.0, 0.5, 0.01)]
    with recorder_of(home) as again:
        assert again is not None


def test_of_batches_only_the_quickest_says_something_of_the_clock(bench: Open) -> None:
    one = bench()
    for number, way_s in enumerate((2.0, 5.0, 1.0, 3.0), 1):
        one.give(number=number, sent_s=one.wall_s - way_s)
        one.receipts()
    one.wall_s += 600.0
    one.give(number=9, sent_s=one.wall_s - 4.0)
    one.receipts()
    assert rows_of(one.home, "SELECT offset_s, error_s FROM clocks") == [(-2.0, None), (-1.0, None), (-4.0, None)]


def test_a_person_says_what_happened_while_it_records_and_without(bench: Open) -> None:
    one = bench()
    annotate(one.home, "before", 1.0)
    one.give()
    one.receipts()
    annotate(one.home, "moved behind the wall", 2.0)
    one.give(number=2)
    one.receipts()
    one.end()
    annotate(one.home, "after", 3.0)
    assert rows_of(one.home, "SELECT * FROM annotations") == [(1.0, "before"), (2.0, "moved behind the wall"), (3.0, "after")]
    for text in ("", "x" * 1001, "two\nlines"):
        with pytest.raises(LocalError, match="an annotation is one line"):
            annotate(one.home, text, 4.0)


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="no device has sent any"):
        open_observations(tmp_path)
    (tmp_path / FILE).touch()
    with pytest.raises(LocalError, match="no device has sent any"):
        open_observations(tmp_path)
    (tmp_path / FILE).write_bytes(b"this is no database" * 1000)
    with pytest.raises(LocalError, match="file is not a database; check its owner, or move it away"):
        open_observations(tmp_path)
    with pytest.raises(LocalError, match="cannot write"):
        annotate(tmp_path, "x", 1.0)
    (tmp_path / FILE).unlink()
    annotate(tmp_path, "x", 1.0)
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(LocalError, match="schema version 2, made by a newer Regrow"):
        open_observations(tmp_path)


class Held:
    """As much of a connection as is asked, to a file that others hold twice."""

    held = 2

    def execute(self, statement: str) -> None:
        assert statement == "PRAGMA journal_mode = WAL"
        if self.held:
            self.held -= 1
            raise sqlite3.OperationalError("database is locked")


def test_who_makes_the_file_waits_for_others_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself does not, where two turn the same file into one with a write-ahead log; seen twice in 1 200 meetings of eight."""
    file = Held()
    observations._into_wal(file)  # type: ignore[arg-type]
    assert file.held == 0
    monkeypatch.setattr(observations, "BUSY_S", 0.0)
    file.held = 2
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        observations._into_wal(file)  # type: ignore[arg-type]
