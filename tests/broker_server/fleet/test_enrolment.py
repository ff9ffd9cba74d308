"""The enrolment's server with the device's own client, over real TLS; what it is open for, and what it bears."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cryptography")

from broker_server.fleet import enrolment, members
from broker_server.fleet.authority import Authority
from broker_server.fleet.enrolment import CONNECTIONS, GUESSES, REQUEST_BYTES, Enrolment, Guesses
from broker_server.fleet.gatekeeper import DATES_S, Gatekeeper
from broker_server.fleet.registry import Registry
from edge_agent import enrolment as joining
from edge_agent import identity_folder
from edge_agent.identity import fleet_context
from regrow.errors import LocalError, PeerError
from tests.testbed.certified import free_port

HOST = "127.0.0.1"


class Gate:
    """A fleet whose enrolment is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        members.init(folder / "fleet", "farm", [HOST], enrol_port=free_port())
        self.registry, self.authority = Registry(folder / "fleet"), Authority(folder / "fleet")
        self.enrolment = Enrolment(self.registry, self.authority, HOST, self.registry.fleet().enrol_port)
        self.enrolment.open()

    def claimed(self, name: str, **changes: Any) -> Path:
        """A device's folder with a claim in it, changed in these fields."""
        file = members.write_claim(self.registry, name, self.folder)
        said = json.loads(file.read_text())
        said["claim"] |= changes.pop("claim", {})
        file.write_text(json.dumps({**said, **changes}))
        identity_folder.adopt(self.folder / name, file)
        return self.folder / name

    def ask(self, body: bytes, path: str = enrolment.PATH, **headers: str) -> tuple[int, dict[str, Any]]:
        link = http.client.HTTPSConnection(HOST, self.enrolment.port, timeout=10, context=fleet_context(self.authority.certificate_pem))
        link.request("POST", path, body, headers)
        answer = link.getresponse()
        said = json.loads(answer.read())
        link.close()
        return answer.status, said


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.enrolment.close()


def test_a_claim_becomes_an_identity_once(gate: Gate) -> None:
    me = joining.enrol(gate.claimed("d1"))
    assert gate.registry.device("d1").good[0].serial == me.serial
    assert me.coordinator_keys == (gate.authority.signing_key,)
    with pytest.raises(LocalError, match="no claim"):
        joining.enrol(me.folder)


def test_a_lost_answer_is_given_again(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gate.claimed("d1")

    def lost(*_: object) -> None:
        raise PeerError("the answer was lost")

    with monkeypatch.context() as cut:
        cut.setattr(joining.identity, "accept", lost)
        with pytest.raises(PeerError, match="lost"):
            joining.enrol(folder)
    serial = gate.registry.device("d1").good[0].serial
    assert joining.enrol(folder).serial == serial
    assert len(gate.registry.device("d1").certificates) == 1


def test_another_device_with_a_used_claim_is_refused_for_good(gate: Gate, tmp_path: Path) -> None:
    folder = gate.claimed("d1")
    identity_folder.adopt(tmp_path / "thief", tmp_path / "d1.claim.json")
    joining.enrol(folder)
    with pytest.raises(LocalError, match=r"refuses d1: no such claim; .*regrow fleet add"):
        joining.enrol(tmp_path / "thief")
    assert not identity_folder.has_certificate(tmp_path / "thief")


@pytest.mark.parametrize("clock_s", [0, 86_400.0, 4e9])
def test_a_device_whose_clock_is_wrong_by_years_joins(gate: Gate, monkeypatch: pytest.MonkeyPatch, clock_s: float) -> None:
    folder = gate.claimed("d1")
    monkeypatch.setattr(joining, "time", SimpleNamespace(time=lambda: clock_s))
    assert joining.enrol(folder).device == "d1"


def test_a_gateway_with_an_expired_certificate_is_not_believed(gate: Gate) -> None:
    late = gate.registry.fleet().created_s + 400 * 86_400  # the claim was made then: it is later now, so the broker's year is over
    folder = gate.claimed("d1", since_s=late, claim={"expires_s": late + 86_400})
    with pytest.raises(PeerError, match="certificate is valid from"):
        joining.enrol(folder)
    assert gate.registry.device("d1").state == "claimed"


def test_another_fleets_gateway_is_not_believed(gate: Gate, tmp_path: Path) -> None:
    other = Gate(tmp_path / "other")
    try:
        folder = gate.claimed("d1", enrol=f"https://{HOST}:{other.enrolment.port}")
        with pytest.raises(PeerError, match="is not this fleet's"):
            joining.enrol(folder)
    finally:
        other.enrolment.close()


def test_nobody_there_is_no_reason_to_give_up(gate: Gate) -> None:
    folder = gate.claimed("d1")
    gate.enrolment.close()
    with pytest.raises(PeerError, match="cannot be reached"):
        joining.enrol(folder)
    gate.enrolment.open()
    joining.enrol(folder)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"device": "d1"}', b"\xff" * 10, b'{"device":"d1","token":"t","csr":"!","signing_key":"","proof":""}'],
)
def test_what_is_no_enrolment_is_refused_in_one_line(gate: Gate, body: bytes) -> None:
    status, said = gate.ask(body)
    assert status == 403
    assert set(said) == {"error"}


def test_bounds_hold(gate: Gate) -> None:
    folder = gate.claimed("d1")
    assert gate.ask(b"x", path="/other")[0] == 403
    for size in (REQUEST_BYTES + 1, -1):
        with suppress(ConnectionError, http.client.HTTPException):  # it closes without having read
            assert gate.ask(b"{}", **{"Content-Length": str(size)})[0] == 403
    assert gate.registry.device("d1").state == "claimed"
    joining.enrol(folder)


def test_wrong_guesses_are_slowed_down_and_others_are_not(gate: Gate) -> None:
    statuses = [gate.ask(b"{}")[0] for _ in range(GUESSES + 2)]
    assert statuses == [403] * GUESSES + [429] * 2
    guesses = Guesses()
    for _ in range(GUESSES):
        guesses.wrong("192.0.2.1", 100.0)
    assert guesses.too_many("192.0.2.1", 159.0)
    assert not guesses.too_many("192.0.2.1", 161.0)
    assert not guesses.too_many("192.0.2.2", 100.0)


def test_those_who_say_nothing_hold_up_nobody_until_every_place_is_taken(gate: Gate) -> None:
    silent = [socket.create_connection((HOST, gate.enrolment.port)) for _ in range(CONNECTIONS - 1)]
    assert joining.enrol(gate.claimed("d1")).device == "d1"
    silent += [socket.create_connection((HOST, gate.enrolment.port)) for _ in range(2)]
    silent[-1].settimeout(10)
    assert silent[-1].recv(1) == b""  # one too many is closed at once
    for sock in silent:
        sock.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_plain_text_and_old_protocols_are_turned_away(gate: Gate) -> None:
    with socket.create_connection((HOST, gate.enrolment.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/enrol HTTP/1.0\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b"HTTP" not in sock.recv(100)
    context = fleet_context(gate.authority.certificate_pem)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with socket.create_connection((HOST, gate.enrolment.port), timeout=10) as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(sock, server_hostname=HOST)


def test_a_port_in_use_says_so(gate: Gate) -> None:
    second = Enrolment(gate.registry, gate.authority, HOST, gate.enrolment.port)
    with pytest.raises(LocalError, match="--enrol-port"):
        second.open()
    gate.claimed("d1")
    keeper = Gatekeeper(gate.registry, gate.authority, None, second)
    assert f"tried again every {DATES_S:.0f} s" in str(keeper.look(0.0))
    gate.enrolment.close()
    assert keeper.look(DATES_S - 1) is None
    assert "enrolment is open" in str(keeper.look(DATES_S))
    keeper.close()


def test_it_is_open_only_while_somebody_may_join(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.enrolment.close()
    keeper = Gatekeeper(gate.registry, gate.authority, None, gate.enrolment)
    assert keeper.look(time.monotonic()) is None
    assert not gate.enrolment.is_open
    folder = gate.claimed("d1")
    assert "enrolment is open" in str(keeper.look(time.monotonic()))
    me = joining.enrol(folder)
    keeper.look(time.monotonic())
    assert gate.enrolment.is_open  # the answer may have been lost
    members.in_use(gate.registry, gate.authority, "d1", me.serial)
    assert "enrolment is closed" in str(keeper.look(time.monotonic()))
    members.write_claim(gate.registry, "d2", tmp_path, days=-1)
    assert keeper.look(time.monotonic()) is None  # expired
    keeper.close()


def test_the_gateway_renews_what_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(tmp_path)
    keeper = Gatekeeper(gate.registry, gate.authority, None, gate.enrolment)
    now = time.monotonic()
    keeper.look(now)
    before = {name: (gate.registry.folder / name).read_bytes() for name in ("broker.crt", "broker.key", "crl.pem")}
    keeper.look(now + DATES_S)
    assert before == {name: (gate.registry.folder / name).read_bytes() for name in before}
    monkeypatch.setattr("broker_server.fleet.authority.BROKER_DAYS", 3 * 366)
    monkeypatch.setattr("broker_server.fleet.authority.LIST_DAYS", 2 * 92)
    keeper.look(now + 2 * DATES_S)
    assert all((gate.registry.folder / name).read_bytes() != data for name, data in before.items())
    keeper.close()


def test_files_that_do_not_check_out_leave_the_doors_as_they_are(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    keeper = Gatekeeper(gate.registry, gate.authority, None, gate.enrolment)
    now = time.monotonic()
    keeper.look(now)
    kept = (gate.registry.folder / "devices.json").read_bytes()
    for damage in (b"{", None):
        (gate.registry.folder / "devices.json").unlink()
        if damage is not None:
            (gate.registry.folder / "devices.json").write_bytes(damage)
        now += DATES_S
        assert "the fleet's doors stay as they are" in str(keeper.look(now))
        assert keeper.look(now + 1) is None  # said once a minute
    (gate.registry.folder / "devices.json").write_bytes(kept)
    folder = gate.claimed("d1")
    keeper.look(now + DATES_S)
    assert gate.enrolment.is_open
    joining.enrol(folder)
    keeper.close()
