"""The journal of an unfinished run: what is torn, altered, foreign or too much costs time, and never gives a wrong result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from testbed.journal import MAGIC, Journal, digest

KEYS = [digest("key", bytes([number])) for number in range(4)]


def filled(path: Path) -> bytes:
    journal = Journal(path, limit_bytes=10**6, resume=False)
    for number, key in enumerate(KEYS):
        journal.append(key, b"head%d" % number, bytes(10 * number))
    journal.close()
    return path.read_bytes()


def reopened(path: Path) -> Journal:
    return Journal(path, limit_bytes=10**6, resume=True)


def test_what_is_kept_is_found_again_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    filled(path)
    journal = reopened(path)
    assert journal.replaying
    for number in (2, 0, 3, 1):
        assert journal.recall(KEYS[number]) == (b"head%d" % number, bytes(10 * number))
    assert not journal.replaying
    assert journal.recall(digest("new")) is None
    journal.delete()
    assert not path.exists()
    assert Journal(path, limit_bytes=10**6, resume=True).recall(KEYS[0]) is None


def test_a_torn_tail_is_dropped_wherever_it_tears(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    whole = filled(path)
    last = len(whole) - (28 + 5 + 30 + 16)
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        journal = reopened(path)
        assert [journal.recall(key) is not None for key in KEYS] == [True, True, True, False]
        journal.append(KEYS[3], b"head3", bytes(30))
        journal.close()
        assert path.read_bytes() == whole


def test_an_altered_byte_never_gives_a_result(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    whole = filled(path)
    for place in range(len(MAGIC), len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        journal = reopened(path)
        for number, key in enumerate(KEYS):
            assert journal.recall(key) in (None, (b"head%d" % number, bytes(10 * number)))
        journal.close()


def test_a_full_journal_says_so_once_and_keeps_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, limit_bytes=150, resume=True)
    for key in KEYS:
        journal.append(key, b"head", bytes(30))
    journal.close()
    assert path.stat().st_size <= 150
    assert caplog.text.count("grows no further") == 1
    found = [reopened(path).recall(key) is not None for key in KEYS]
    assert found == [True, False, False, False]


def test_a_foreign_journal_is_started_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.journal"
    filled(path)
    journal = reopened(path)
    assert journal.recall(digest("other data")) is None
    assert "starting over" in caplog.text
    assert not journal.replaying
    journal.append(KEYS[0], b"new")
    journal.close()
    assert reopened(path).recall(KEYS[0]) == (b"new", b"")
    path.write_bytes(b"regrow journal 0\n" + bytes(100))
    assert reopened(path).recall(KEYS[0]) is None
    assert "no journal of this version" in caplog.text
    filled(path)
    assert Journal(path, limit_bytes=10**6, resume=False).recall(KEYS[0]) is None


def test_a_journal_that_fits_no_more_is_used_up_to_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.journal"
    filled(path)
    journal = reopened(path)
    assert journal.recall(KEYS[0]) is not None
    assert journal.recall(digest("other")) is None
    assert journal.recall(digest("another")) is None
    assert caplog.text.count("3 results do not fit") == 1
    assert not journal.replaying


def test_digests_tell_parts_apart() -> None:
    values = np.arange(6, dtype=np.float32)
    distinct = [
        digest("ab", "c"),
        digest("a", "bc"),
        digest(values),
        digest(values.reshape(2, 3)),
        digest(values.view(np.int32)),
        digest(values[:0]),
        digest(),
    ]
    assert len(set(distinct)) == len(distinct)
    assert digest(values[::2]) == digest(values[::2].copy())
