"""Topics: what is built is parsed, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow import topics
from regrow.errors import LocalError
from regrow.topics import FromDevice, Run, parse_from_device
from testbed.memory import matches

RUN = Run("toy", "r1")
name = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
COMMON = settings(max_examples=50)


@COMMON
@given(name, st.integers(0, 10**17), st.integers(0, 65_535))
def test_what_a_device_publishes_is_parsed_back_and_subscribed_to(device: str, sequence: int, index: int) -> None:
    spoken = {
        topics.status(device): FromDevice("status", device),
        topics.hello(device): FromDevice("hello", device),
        RUN.telemetry(device): FromDevice("telemetry", device),
        RUN.update(device, sequence, index): FromDevice("update", device, sequence, index),
    }
    for topic, expected in spoken.items():
        assert parse_from_device(topic, RUN) == expected
        assert sum(matches(pattern, topic) for pattern in RUN.from_devices()) == 1


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "regrow",
        "regrow/v1/device/d0",
        "regrow/v1/device/d0/hello/more",
        "regrow/v1/device/D0/hello",
        "regrow/v1/device//hello",
        "regrow/v1/device/d0\n/hello",
        "regrow/v2/device/d0/hello",
        "regrow/v1/toy/r2/device/d0/telemetry",
        "regrow/v1/other/r1/device/d0/telemetry",
        "regrow/v1/toy/r1/device/d0/receipt",
        "regrow/v1/toy/r1/device/d0/update/1",
        "regrow/v1/toy/r1/device/d0/update/1/2/3",
        "regrow/v1/toy/r1/device/d0/update/-1/0",
        "regrow/v1/toy/r1/device/d0/update/01/0",
        "regrow/v1/toy/r1/device/d0/update/1/x",
        "regrow/v1/toy/r1/device/d0/update/1/" + "9" * 19,
        "regrow/v1/toy/r1/device/d0/update/\u0661/0",
        "regrow/v1/toy/r1/device/d0/update/1\n/0",
        "regrow/v1/toy/r1/device/../telemetry",
    ],
)
def test_other_topics_are_nobodys(topic: str) -> None:
    assert parse_from_device(topic, RUN) is None


@COMMON
@given(name, name)
def test_topics_of_promotions_are_parsed_back_and_are_no_others(device: str, task: str) -> None:
    report = topics.promotion_report(device, task)
    assert topics.parse_promotion_report(report) == (device, task)
    assert topics.parse_promotion(topics.promotion(task)) == (task if task != "device" else None)
    for topic in (report, topics.promotion(task), topics.promoted_file(task, bytes(16), 3)):
        assert parse_from_device(topic, RUN) is None
        assert matches(topics.promotion("+"), topic) == (topic == topics.promotion(task))
        assert matches(topics.promotion_report("+", "+"), topic) == (topic == report)
    assert topics.parse_promotion_report(RUN.telemetry(device)) is None
    assert topics.parse_promotion(topics.claim(task)) is None


@COMMON
@given(st.text(max_size=60))
def test_parsing_any_text_never_raises(text: str) -> None:
    parse_from_device(text, RUN)
    parse_from_device(f"{RUN.root}/device/{text}", RUN)
    assert topics.parse_promotion(f"regrow/v1/{text}/more/promotion") is None
    topics.parse_promotion_report(f"regrow/v1/device/{text}/promotion/{text}")


@pytest.mark.parametrize("bad", ["", "A", "-a", "a" * 64, "a/b", "a\n", "+", "#", "ä"])
def test_a_name_that_cannot_be_a_topic_level_is_refused(bad: str) -> None:
    with pytest.raises(LocalError, match="use 1 to 63"):
        topics.check_name(bad, "device")


def test_the_task_named_device_is_reserved() -> None:
    with pytest.raises(LocalError, match="reserved"):
        topics.check_name("device", "task")
    assert topics.check_name("device", "run") == "device"


def test_what_the_coordinator_publishes_is_never_taken_for_a_devices_word() -> None:
    own = [
        RUN.manifest(1),
        RUN.program(b"\x01" * 16, 0),
        RUN.order(0, 1, 2),
        RUN.chunk(3, 4),
        RUN.assignment("d0"),
        RUN.receipt("d0"),
        topics.tasks("d0"),
        topics.claim("toy"),
    ]
    assert all(parse_from_device(topic, RUN) is None for topic in own)
    assert not any(matches(pattern, topic) for pattern in RUN.from_devices() for topic in own)


SEALED = {
    topics.hello("d1"): "d1",
    topics.tasks("d1"): "d1",
    topics.promotion_report("d1", "toy"): "d1",
    topics.claim("toy"): None,
    topics.promotion("toy"): None,
    topics.Run("toy", "r1").manifest(3): None,
    topics.Run("toy", "r1").assignment("d1"): "d1",
    topics.Run("toy", "r1").receipt("d1"): "d1",
    topics.Run("toy", "r1").telemetry("d1"): "d1",
    topics.Run("toy", "r1").update("d1", 4, 0): "d1",
    "regrow/v1/device/d1/anything/new": "d1",
    "regrow/v1/anything/new": None,
    "": None,
}
BARE = {
    topics.status("d1"): "d1",
    topics.Run("toy", "r1").chunk(3, 0): None,
    topics.Run("toy", "r1").order(1, 0, 0): None,
    topics.Run("toy", "r1").program(bytes(16), 0): None,
    topics.Run("toy", "r1").probe("d1"): "d1",
    topics.promoted_file("toy", bytes(16), 0): None,
}


@pytest.mark.parametrize(("topic", "device"), {**SEALED, **BARE}.items())
def test_what_a_topic_carries_and_whom_it_is_about(topic: str, device: str | None) -> None:
    assert topics.is_sealed(topic) == (topic in SEALED)
    assert topics.device_of(topic) == device
    assert topics.is_claim(topic) == (topic == topics.claim("toy"))


@pytest.mark.parametrize("name", ["chunk", "order", "program", "promotion", "status", "probe", "release", "claim"])
def test_no_name_of_a_device_task_or_run_opens_a_sealed_topic(name: str) -> None:
    run = topics.Run(name, name)
    for topic in (topics.hello(name), topics.tasks(name), topics.claim(name), topics.promotion(name), topics.promotion_report(name, name)):
        assert topics.is_sealed(topic)
    for topic in (run.manifest(1), run.assignment(name), run.receipt(name), run.telemetry(name), run.update(name, 1, 1)):
        assert topics.is_sealed(topic)
