"""Signing off: what is durable, what is told, what is refused; and how it is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker_server.herald import Herald, herald_of
from broker_server.promotions import HeadPlan, Promotions, SignOff, in_words, use_of
from broker_server.queueing import WINDOW
from regrow import topics, wire
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Connected, Disconnected, Effect, Note, Publish, Received, Subscribe
from regrow.publication import PIECE_BYTES

REPORT = topics.promotion_report("d1", "toy")
PLAN = HeadPlan(programs=["layout", "train", "initial"], steps=10, batch=5, learning_rate=0.1)
HEAD = {"layout": b"{}", "train": b"graph", "initial": b"\0\0\0\0"}


@pytest.fixture
def promotions(tmp_path: Path) -> Promotions:
    return Promotions(tmp_path, "toy")


def sign(promotions: Promotions, model: bytes, **more: Any) -> SignOff:
    return promotions.sign_off(model, run="r1", version=7, who="ada@desk", file="m.onnx", **more)


# ---- decisions ---------------------------------------------------------------------------------------------------------------------


def test_a_decision_says_who_when_and_which_and_outlives_the_process(promotions: Promotions, tmp_path: Path) -> None:
    made = sign(promotions, b"model")
    (read,) = Promotions(tmp_path, "toy").history()
    assert read == made
    assert (read.number, read.action, read.run, read.version, read.who, read.file, read.bytes) == (
        1,
        "promoted",
        "r1",
        7,
        "ada@desk",
        "m.onnx",
        5,
    )
    assert read.digest == wire.digest(b"model").hex()
    assert read.sha256.startswith(read.digest)
    assert read.when.endswith("Z")
    assert promotions.files(read) == {wire.digest(b"model"): b"model"}
    assert (promotions.path / "00000001.json").stat().st_mode & 0o777 == 0o600


def test_the_same_model_again_is_the_same_decision(promotions: Promotions) -> None:
    assert sign(promotions, b"model") == sign(promotions, b"model")
    assert sign(promotions, b"model", head=HEAD, plan=PLAN).number == 2  # that is more than before
    assert sign(promotions, b"other").number == 3
    assert promotions.newest_number() == 3


def test_withdrawing_returns_to_the_newest_that_never_was_withdrawn(promotions: Promotions) -> None:
    one, two, three = (wire.digest(model).hex() for model in (b"1", b"2", b"3"))
    for model in (b"1", b"2", b"3"):
        sign(promotions, model)
    back = promotions.withdraw("bob")
    assert (back.number, back.action, back.who, back.digest, back.withdrawn) == (4, "withdrawn", "bob", two, [three])
    assert (promotions.withdraw("bob").digest, promotions.withdraw("bob").digest) == (one, None)
    assert promotions.history()[-1].withdrawn == [three, two, one]
    assert promotions.announcement(promotions.history()[-1]).model is None
    with pytest.raises(LocalError, match="none to withdraw"):
        promotions.withdraw("bob")
    again = sign(promotions, b"2")
    assert (again.digest, again.withdrawn) == (two, [three, one])


def test_nothing_to_withdraw(promotions: Promotions) -> None:
    with pytest.raises(LocalError, match="no model of task 'toy' is promoted"):
        promotions.withdraw("bob")


def test_a_model_that_no_device_would_take_is_refused(promotions: Promotions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MODEL_BYTES", 10)
    for model in (b"", b"x" * 11):
        with pytest.raises(LocalError, match="devices take 1 to 10"):
            sign(promotions, model)
    assert promotions.history() == []


@pytest.mark.parametrize("accident", ["changed", "gone", "decision"])
def test_what_is_damaged_is_not_published(promotions: Promotions, accident: str, caplog: pytest.LogCaptureFixture) -> None:
    made = sign(promotions, b"model")
    file = promotions.path / ("00000001.json" if accident == "decision" else f"{made.digest}.onnx")
    if accident == "gone":
        file.unlink()
    else:
        file.write_bytes(b"{")
    assert [effect for effect in Herald(promotions).step(Connected(), 0.0) if isinstance(effect, Publish)] == []
    assert "is not published" in caplog.text


def test_one_process_publishes_a_task(promotions: Promotions) -> None:
    with herald_of(promotions) as first, herald_of(promotions) as second:
        assert isinstance(first, Herald)
        assert second is None
    with herald_of(promotions) as third:
        assert third is not None


# ---- publishing --------------------------------------------------------------------------------------------------------------------


class Link:
    """A broker that keeps what is retained and acknowledges everything, in the order in which it came."""

    def __init__(self, herald: Herald) -> None:
        self.herald, self.now = herald, 0.0
        self.retained: dict[str, bytes] = {}
        self.order: list[str] = []
        self.notes: list[Note] = []
        self.most = 0

    def feed(self, event: Any, leads: bool = True) -> None:
        pending: list[Effect] = self.herald.step(event, self.now, leads=leads)
        while pending:
            publishes = [effect for effect in pending if isinstance(effect, Publish)]
            self.notes += [effect for effect in pending if isinstance(effect, Note)]
            self.most = max(self.most, len(publishes))
            pending = []
            for publish in publishes:
                assert publish.retain
                assert publish.token is not None
                self.order.append(publish.topic)
                self.retained[publish.topic] = bytes(publish.payload)
                pending += self.herald.step(Acknowledged(publish.token, 0.0, 0.1, len(publish.payload)), self.now, leads=leads)
        self.retained = {topic: data for topic, data in self.retained.items() if data}

    def announced(self) -> wire.Promotion:
        return wire.decode(self.retained[topics.promotion("toy")], wire.Promotion)[0]


def test_pieces_come_before_the_announcement_and_the_old_ones_go_after_it(promotions: Promotions) -> None:
    old, new = bytes(PIECE_BYTES * 20), b"\1" * (PIECE_BYTES + 1)
    sign(promotions, old)
    link = Link(Herald(promotions))
    link.feed(Connected())
    assert link.most <= WINDOW
    assert link.order[-1] == topics.promotion("toy")
    assert link.announced() == promotions.announcement(promotions.history()[-1])
    sign(promotions, new, head=HEAD, plan=PLAN)
    link.order.clear()
    link.now += 5
    link.feed(None)
    at = link.order.index(topics.promotion("toy"))
    assert at == 2 + len(HEAD)
    assert len(link.order) > at + 1
    promotion = link.announced()
    assert promotion.model is not None
    assert promotion.head is not None
    pieces = [
        topics.promoted_file("toy", blob.digest, i) for blob in (promotion.model, *promotion.head.programs) for i in range(len(blob.pieces))
    ]
    assert link.retained.keys() == {topics.promotion("toy"), *pieces}


def test_everything_again_after_a_reconnect_and_what_an_earlier_life_left_is_cleared(promotions: Promotions) -> None:
    sign(promotions, b"old")
    link = Link(Herald(promotions))
    link.feed(Connected())
    left = dict(link.retained)
    sign(promotions, b"new")
    other = Link(Herald(promotions))
    other.retained = left
    other.feed(Connected())
    assert len(other.retained) == 2
    other.feed(Disconnected())
    other.retained.clear()
    other.feed(Connected())
    assert other.announced().number == 2
    assert len(other.retained) == 2


def test_nothing_is_published_by_one_who_does_not_lead(promotions: Promotions) -> None:
    sign(promotions, b"model")
    link = Link(Herald(promotions))
    link.feed(Connected(), leads=False)
    assert not link.retained
    link.now += 5
    link.feed(None)
    assert link.announced().number == 1


def test_it_hears_the_devices_of_its_task(promotions: Promotions) -> None:
    (subscribed,) = [effect for effect in Herald(promotions).step(Connected(), 0.0) if isinstance(effect, Subscribe)]
    assert subscribed.topics == (topics.promotion_report("+", "toy"),)


# ---- what devices say --------------------------------------------------------------------------------------------------------------


def report(number: int = 1, outcome: str = "placed", **more: Any) -> wire.PromotionReport:
    return wire.PromotionReport(number=number, outcome=outcome, **more)


def heard(link: Link, topic: str, payload: bytes) -> None:
    link.feed(Received(topic, payload))
    link.now += 5
    link.feed(None)


def test_a_report_is_kept_and_noted_once(promotions: Promotions, tmp_path: Path) -> None:
    sign(promotions, b"model")
    link = Link(Herald(promotions))
    link.feed(Connected())
    said = report(new=wire.ModelScore(0.5, 0.75, 40), old=wire.ModelScore(0.6, 0.7, 40))
    for _ in range(3):
        heard(link, REPORT, wire.encode(said))
    assert Promotions(tmp_path, "toy").reports() == {"d1": said}
    (note,) = link.notes
    assert note.kind == "promotion"
    assert note.fields["device"] == "d1"
    assert (note.fields["accuracy"], note.fields["old_accuracy"]) == (0.75, 0.7)
    assert note.fields["said"] == in_words(said)
    assert use_of(tmp_path / "r1", "toy") == "1: 1 of 1"
    heard(link, topics.promotion_report("d2", "toy"), wire.encode(report(outcome="kept")))
    assert use_of(tmp_path / "r1", "toy") == "1: 1 of 2"
    assert use_of(tmp_path / "r2", "toy") == ""


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        (REPORT, b""),
        (REPORT, b"RG nonsense"),
        (REPORT, wire.encode(wire.Status())),
        (REPORT, wire.encode(report(number=2**53))),
        (topics.promotion_report("d1", "other"), wire.encode(report())),
        ("regrow/v1/device/../promotion/toy", wire.encode(report())),
        ("regrow/v1/device/D1/promotion/toy", wire.encode(report())),
        ("regrow/v1/device/d1/promotion/toy/more", wire.encode(report())),
    ],
)
def test_what_no_honest_device_says_leaves_no_trace(promotions: Promotions, topic: str, payload: bytes) -> None:
    sign(promotions, b"model")
    link = Link(Herald(promotions))
    link.feed(Connected())
    heard(link, topic, payload)
    assert promotions.reports() == {}
    assert link.notes == []


def test_numbers_that_are_not_finite_are_refused(promotions: Promotions) -> None:
    sign(promotions, b"model")
    link = Link(Herald(promotions))
    link.feed(Connected())
    heard(link, REPORT, wire.encode(report(new=wire.ModelScore(float("nan"), 0.5, 3))))
    assert promotions.reports() == {}


def test_however_much_a_device_says_one_word_a_second_is_kept(promotions: Promotions, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(promotions, b"model")
    link = Link(Herald(promotions))
    link.feed(Connected())
    kept: list[str] = []
    keep: Callable[[Promotions, str, wire.PromotionReport], None] = Promotions.note_report
    monkeypatch.setattr(Promotions, "note_report", lambda self, device, said: (kept.append(device), keep(self, device, said)))
    for turn in range(100):
        link.feed(Received(REPORT, wire.encode(report(reason=str(turn)))))
    link.now += 5
    link.feed(None)
    assert kept == ["d1"]
    assert promotions.reports()["d1"].reason == "99"
