"""Secrets on disk, and the access list that both brokers enforce."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker_server.credentials import (
    COORDINATOR,
    Credentials,
    check_password,
    covers,
    hash_password,
    may_read,
    may_write,
)
from broker_server.durable import write_private
from edge_agent.measure import GROUP as CHUNKS
from edge_agent.measure import TOPICS as MEASURE
from regrow import topics
from regrow.errors import LocalError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_secrets_survive_and_belong_to_the_owner(tmp_path: Path) -> None:
    first = Credentials(tmp_path / "home")
    password = first.add_device("watch-1")
    first.add_device("a")
    again = Credentials(tmp_path / "home")
    assert again.devices() == ("a", "watch-1")
    assert again.password("watch-1") == password == again.add_device("watch-1")
    assert again.coordinator_password == first.coordinator_password
    assert len({again.coordinator_password, again.password("a"), password}) == 3
    assert min(len(again.coordinator_password), len(password)) >= 43  # 256 bits
    assert mode(tmp_path / "home" / "credentials.json") == 0o600


def test_a_removed_device_is_gone(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path)
    credentials.add_device("a")
    credentials.remove_device("a")
    assert Credentials(tmp_path).devices() == ()
    for forgotten in (credentials.password, credentials.remove_device):
        with pytest.raises(LocalError, match="no device 'a'"):
            forgotten("a")
    assert "a:" not in credentials.render(tmp_path / "b").passwords.read_text().splitlines()


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "a+", "#", "ä", "a" * 64, "a\n", "..", COORDINATOR, "%u"])
def test_names_that_could_mean_more_than_a_device_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LocalError, match="device name"):
        Credentials(tmp_path).add_device(name)


def test_the_bundle_is_all_a_device_needs(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path / "home")
    password = credentials.add_device("d-1")
    path = credentials.write_bundle("d-1", "mqtt://10.0.0.1:1883", tmp_path / "out")
    assert path == tmp_path / "out" / "d-1.json"
    assert json.loads(path.read_text()) == {"device": "d-1", "broker": "mqtt://10.0.0.1:1883", "password": password}
    assert mode(path) == 0o600


def test_brokers_read_hashes_never_secrets(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path / "home")
    password = credentials.add_device("d")
    files = credentials.render(tmp_path / "broker")
    for path in (files.passwords, files.access, files.embedded):
        assert mode(path) == 0o600
        assert password not in path.read_text()
        assert credentials.coordinator_password not in path.read_text()
    users = json.loads(files.embedded.read_text())
    assert set(users) == {COORDINATOR, "d"}
    assert check_password(password, users["d"])
    assert not check_password(credentials.coordinator_password, users["d"])
    assert files.passwords.read_text() == "".join(f"{user}:{hashed}\n" for user, hashed in users.items())
    again = credentials.render(tmp_path / "broker")
    assert json.loads(again.embedded.read_text()) == users  # same salts: nothing changed


def test_the_hash_is_mosquittos() -> None:
    """Made with `mosquitto_passwd -b FILE d secret` of mosquitto 2.0.11."""
    made = "$7$101$E0mkZWYEr71hS4rU$s2pVgzk1gdx1r8iiKKDieJUs9jybE9WLpisPP8LOWxqz/s+FJZRyZZV9LtV3Gvlfo2AOUpkC9Ynynz6WVHGySA=="
    assert check_password("secret", made)
    assert not check_password("Secret", made)


@pytest.mark.parametrize("broken", ["", "x", "$7$101$a", "$6$101$QUFB$QUFB", "$7$0$QUFB$QUFB", "$7$x$QUFB$QUFB", "$7$1$Q$Q"])
def test_a_broken_hash_lets_nobody_in(broken: str) -> None:
    assert not check_password("secret", broken)


def test_the_same_password_hashes_differently_with_another_salt() -> None:
    assert hash_password("p", b"a" * 12) != hash_password("p", b"b" * 12)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"coordinator": 1, "devices": {}}', b'{"coordinator": "x", "devices": {"A": "p"}}']
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_private(tmp_path / "credentials.json", content)
    with pytest.raises(LocalError, match=r"credentials\.json does not check out"):
        Credentials(tmp_path)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Credentials(tmp_path)
    (tmp_path / "credentials.json").chmod(0o644)
    with pytest.raises(LocalError, match="can be read by others"):
        Credentials(tmp_path)


@pytest.mark.parametrize(
    ("rule", "topic_filter", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a/+", "a/b", True),
        ("a/+", "a/+", True),
        ("a/b", "a/+", False),
        ("a/+", "a/#", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a/#", True),
        ("a/#", "#", False),
        ("a/#", "b", False),
        ("#", "#", True),
        ("a/+/c", "a/b", False),
    ],
)
def test_covers(rule: str, topic_filter: str, expected: bool) -> None:
    assert covers(rule, topic_filter) is expected


def test_a_device_reads_the_models_and_itself() -> None:
    for topic in ("claim", "r/manifest", "r/program/ab/0", "r/order/1/2/0", "r/chunk/3/4", "r/device/me/assignment"):
        assert may_read("me", f"regrow/v1/t/{topic}"), topic
    for topic in ("#", "regrow/v1/#", "regrow/v1/device/you/tasks", "regrow/v1/t/r/device/+/assignment", "$SYS/#"):
        assert not may_read("me", topic), topic
    assert may_read(COORDINATOR, "regrow/v1/#")
    assert not may_read(COORDINATOR, "#")


def test_a_device_writes_below_itself() -> None:
    for topic in ("device/me/hello", "t/r/device/me/update/1/0", "t/r/device/me/telemetry", "t/r/device/me/probe", "device/me/promotion/t"):
        assert may_write("me", f"regrow/v1/{topic}"), topic
    for topic in ("device/me/junk", "device/me/hello/1", "t/r/device/me/telemetry/1", "t/r/device/me/update/1/0/1", "device/me/control"):
        assert not may_write("me", f"regrow/v1/{topic}"), topic
    for topic in ("device/you/hello", "t/r/device/me/assignment", "t/r/device/me/updates/1", "t/r/manifest", "t/claim"):
        assert not may_write("me", f"regrow/v1/{topic}"), topic


def test_a_device_may_write_all_that_it_says_and_no_wildcard_is_open_at_its_end(tmp_path: Path) -> None:
    run = topics.Run("t", "r")
    said = [topic("me") for topic in (topics.hello, topics.status, topics.observations, topics.field_report, topics.release_report)]
    said += [topic("me") for topic in (topics.control_report, topics.certificate_request, topics.doctor_report, run.telemetry, run.probe)]
    said += ["regrow/v1/device/me/meter", *topics.doctor_echoes("me"), topics.promotion_report("me", "t"), run.update("me", 3, 0)]
    said += [f"{MEASURE.probe('me')}/{group}/{index}" for group in range(2) for index in range(CHUNKS)]
    assert [topic for topic in said if not may_write("me", topic)] == []
    rendered = Credentials(tmp_path).render(tmp_path / "broker").access.read_text().splitlines()
    writes = [line.removeprefix("pattern write ") for line in rendered if line.startswith("pattern write ")]
    assert [rule for rule in writes if rule.endswith("#")] == []
    assert {rule for rule in writes if any(covers(rule.replace("%u", "me"), topic) for topic in said)} == set(writes)


def test_a_device_reads_promotions_and_reports_on_them_as_itself_only() -> None:
    read = (topics.promotion("+"), topics.promotion("toy"), topics.promoted_file("toy", bytes(16), 3))
    assert all(may_read("d1", topic) for topic in read)
    assert not any(may_write("d1", topic) for topic in read)
    assert may_write("d1", topics.promotion_report("d1", "toy"))
    assert not may_write("d1", topics.promotion_report("d2", "toy"))
    assert not may_read("d1", topics.promotion_report("+", "toy"))
    # A run that is called "promotion" opens nothing.
    assert not may_read("d1", topics.Run("toy", "promotion").telemetry("d2"))
