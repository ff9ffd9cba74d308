"""From claim to revocation: what the registry, the authority and its list of revoked certificates hold after every change."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_server.fleet import members, registry
from broker_server.fleet.authority import PROOF_DOMAIN, Authority, Request, check_request
from broker_server.fleet.registry import Registry
from regrow.errors import LocalError, PeerError


class Keys:
    """A device's keys, and the request that it makes with them."""

    def __init__(self, name: str, key: Any = None) -> None:
        self.name, self.key, self.signing = name, key or ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()

    @property
    def csr(self) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.DER)

    def request(self) -> Request:
        csr = self.csr
        return check_request(csr, self.signing.public_key().public_bytes_raw(), self.signing.sign(PROOF_DOMAIN + csr), self.name)


@pytest.fixture
def fleet(tmp_path: Path) -> Registry:
    members.init(tmp_path / "fleet", "farm", ["gateway.local", "192.0.2.1"])
    return Registry(tmp_path / "fleet")


@pytest.fixture
def authority(fleet: Registry) -> Authority:
    return Authority(fleet.folder)


def token_of(fleet: Registry, name: str, **options: Any) -> str:
    return str(members.claim(fleet, name, **options)["claim"]["token"])


def joined(fleet: Registry, authority: Authority, name: str) -> Keys:
    keys = Keys(name)
    members.enrol(fleet, authority, name, token_of(fleet, name), keys.request())
    return keys


def revoked_serials(fleet: Registry) -> set[str]:
    return {f"{entry.serial_number:x}" for entry in x509.load_pem_x509_crl((fleet.folder / "crl.pem").read_bytes())}


# ---- the fleet ----------------------------------------------------------------------------------------------------------------------


def test_a_fleet_is_made_once_and_nobody_else_can_read_it(fleet: Registry) -> None:
    for path in (fleet.folder, *fleet.folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
    with pytest.raises(LocalError, match="holds a fleet already"):
        members.init(fleet.folder, "other", ["h"])
    assert fleet.fleet().broker == "mqtts://gateway.local:8883"
    assert fleet.fleet().enrol == "https://gateway.local:8443"


def test_keys_without_their_fleet_are_not_overwritten(fleet: Registry) -> None:
    (fleet.folder / "fleet.json").unlink()
    with pytest.raises(LocalError, match=r"no fleet\.json"):
        members.init(fleet.folder, "farm", ["h"])


@pytest.mark.parametrize("host", ["", "a b", "-x", "h:1", "h/x", "*", "ü.de"])
def test_a_host_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, host: str) -> None:
    with pytest.raises(LocalError, match="--host"):
        members.init(tmp_path / "f", "farm", [host])
    assert not (tmp_path / "f").exists()


def test_the_certificates_say_what_they_are_for(fleet: Registry, authority: Authority) -> None:
    ca = x509.load_pem_x509_certificate(authority.certificate_pem.encode())
    broker = x509.load_pem_x509_certificate((fleet.folder / "broker.crt").read_bytes())
    broker.verify_directly_issued_by(ca)
    names = broker.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gateway.local"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.1"]
    joined(fleet, authority, "d1")
    device = x509.load_pem_x509_certificate(fleet.device("d1").good[0].pem.encode())
    assert device.subject.rfc4514_string() == "CN=d1"
    assert 364 < (device.not_valid_after_utc - registry_time()).days <= 365
    for certificate, use in ((broker, "serverAuth"), (device, "clientAuth")):
        assert [oid._name for oid in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value] == [use]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert certificate.not_valid_before_utc.year == 2020  # a gateway whose clock starts in the past lets its devices in


def registry_time() -> datetime:
    return datetime.fromtimestamp(registry.now_s(), timezone.utc)


def test_the_brokers_certificate_is_stale_when_it_ends_or_names_others(
    fleet: Registry, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = fleet.fleet().hosts
    assert not authority.broker_is_stale(hosts)
    assert authority.broker_is_stale([*hosts, "new.local"])
    monkeypatch.setattr("broker_server.fleet.authority.BROKER_DAYS", 3 * 366)  # as if more than two thirds had passed
    assert authority.broker_is_stale(hosts)
    (fleet.folder / "broker.key").unlink()
    assert authority.broker_is_stale(hosts)


# ---- claims -------------------------------------------------------------------------------------------------------------------------


def test_a_claim_is_good_for_one_key_and_answers_that_one_again(fleet: Registry, authority: Authority) -> None:
    token, keys = token_of(fleet, "d1"), Keys("d1")
    assert token not in (fleet.folder / "devices.json").read_text()
    assert fleet.device("d1").state == "claimed"
    assert fleet.device("d1").signing_keys == ()
    pem = members.enrol(fleet, authority, "d1", token, keys.request())
    assert members.enrol(fleet, authority, "d1", token, keys.request()) == pem  # the answer was lost
    assert fleet.device("d1").state == "active"
    assert fleet.device("d1").signing_keys == (keys.signing.public_key().public_bytes_raw(),)
    with pytest.raises(PeerError, match="no such claim"):
        members.enrol(fleet, authority, "d1", token, Keys("d1").request())


def test_a_claim_ends_when_its_certificate_is_in_use(fleet: Registry, authority: Authority) -> None:
    token, keys = token_of(fleet, "d1"), Keys("d1")
    members.enrol(fleet, authority, "d1", token, keys.request())
    assert not members.in_use(fleet, authority, "d1", fleet.device("d1").good[0].serial)
    assert fleet.device("d1").claim is None
    with pytest.raises(PeerError, match="no such claim"):
        members.enrol(fleet, authority, "d1", token, keys.request())


@pytest.mark.parametrize("case", ["wrong token", "expired", "another name", "nobody", "revoked"])
def test_other_claims_are_refused_in_the_same_words(fleet: Registry, authority: Authority, case: str) -> None:
    token = token_of(fleet, "d1", days=-1.0 if case == "expired" else 7.0)
    token_of(fleet, "d2")
    if case == "revoked":
        members.revoke(fleet, "d1")
    name = {"another name": "d2", "nobody": "d9"}.get(case, "d1")
    with pytest.raises(PeerError, match=r"^no such claim$"):
        members.enrol(fleet, authority, name, "x" if case == "wrong token" else token, Keys(name).request())


def test_a_device_of_the_fleet_gets_no_second_claim(fleet: Registry, authority: Authority) -> None:
    joined(fleet, authority, "d1")
    with pytest.raises(LocalError, match="in the fleet already"):
        members.claim(fleet, "d1")
    members.revoke(fleet, "d1")
    keys = joined(fleet, authority, "d1")
    assert fleet.device("d1").signing_keys == (keys.signing.public_key().public_bytes_raw(),)
    assert len(fleet.device("d1").certificates) == 2


@pytest.mark.parametrize("name", ["coordinator", "", "A", "a+", "#", "a/b", "x" * 64])
def test_no_device_is_called_what_carries_rights(fleet: Registry, name: str) -> None:
    with pytest.raises(LocalError, match="device name"):
        members.claim(fleet, name)


# ---- requests -----------------------------------------------------------------------------------------------------------------------


def forged(change: Callable[[Keys], tuple[bytes, bytes, bytes, str]]) -> None:
    csr, signing_key, proof, name = change(Keys("d1"))
    with pytest.raises(PeerError, match="certificate request"):
        check_request(csr, signing_key, proof, name)


def test_a_request_must_be_the_senders_own() -> None:
    def parts(keys: Keys, csr: bytes | None = None) -> tuple[bytes, bytes, bytes]:
        csr = keys.csr if csr is None else csr
        return csr, keys.signing.public_key().public_bytes_raw(), keys.signing.sign(PROOF_DOMAIN + csr)

    def cut(csr: bytes) -> bytes:
        return csr[:-1] + bytes([csr[-1] ^ 1])

    other = ed25519.Ed25519PrivateKey.generate()
    forged(lambda keys: (*parts(keys), "d2"))
    forged(lambda keys: (*parts(keys, cut(keys.csr)), "d1"))
    forged(lambda keys: (*parts(keys, bytes(5000)), "d1"))
    forged(lambda keys: (parts(keys)[0], parts(keys)[1], other.sign(PROOF_DOMAIN + keys.csr), "d1"))
    forged(lambda keys: (parts(keys)[0], b"short", bytes(64), "d1"))
    forged(lambda _: (*parts(Keys("d1", rsa.generate_private_key(65537, 2048))), "d1"))
    forged(lambda _: (*parts(Keys("d1", ec.generate_private_key(ec.SECP384R1()))), "d1"))
    Keys("d1").request()  # and an honest one is none of these


@settings(max_examples=200)
@given(st.binary(max_size=300), st.binary(max_size=40), st.binary(max_size=70))
def test_whatever_the_bytes_are_only_peer_errors_escape(csr: bytes, key: bytes, proof: bytes) -> None:
    with pytest.raises(PeerError):
        check_request(csr, key, proof, "d1")


# ---- keys that change, devices that leave -------------------------------------------------------------------------------------------


def test_the_old_certificate_holds_until_the_new_one_is_in_use(fleet: Registry, authority: Authority) -> None:
    joined(fleet, authority, "d1")
    old = fleet.device("d1").good[0].serial
    members.rotate(fleet, "d1")
    assert fleet.device("d1").replace == old
    new = Keys("d1")
    pem = members.renew(fleet, authority, new.request())
    assert members.renew(fleet, authority, new.request()) == pem
    assert len(fleet.device("d1").signing_keys) == 2
    assert revoked_serials(fleet) == set()
    assert not members.in_use(fleet, authority, "d1", old)
    assert members.in_use(fleet, authority, "d1", fleet.device("d1").good[1].serial)
    assert revoked_serials(fleet) == {old}
    assert fleet.device("d1").replace is None
    assert fleet.device("d1").signing_keys == (new.signing.public_key().public_bytes_raw(),)


def test_a_request_that_was_given_up_leaves_no_certificate(fleet: Registry, authority: Authority) -> None:
    joined(fleet, authority, "d1")
    members.in_use(fleet, authority, "d1", fleet.device("d1").good[0].serial)
    members.renew(fleet, authority, Keys("d1").request())
    unused = fleet.device("d1").good[1].serial
    members.renew(fleet, authority, Keys("d1").request())
    assert revoked_serials(fleet) == {unused}
    assert len(fleet.device("d1").good) == 2


def test_who_is_out_gets_nothing(fleet: Registry, authority: Authority) -> None:
    keys = joined(fleet, authority, "d1")
    serial = fleet.device("d1").good[0].serial
    members.revoke(fleet, "d1")
    assert revoked_serials(fleet) == {serial}
    assert fleet.device("d1").signing_keys == ()
    with pytest.raises(PeerError, match="not in the fleet"):
        members.renew(fleet, authority, keys.request())
    for refused in (lambda: members.stand(fleet, "d1", "active"), lambda: members.rotate(fleet, "d1")):
        with pytest.raises(LocalError, match="not in the fleet"):
            refused()
    with pytest.raises(LocalError, match="no device 'd9'"):
        members.revoke(fleet, "d9")


def test_every_list_is_newer_than_the_one_before_whatever_the_clock_says(
    fleet: Registry, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    dates = []
    for year in (2026, 2026, 1970):
        then = datetime(year, 6, 1, tzinfo=timezone.utc)
        monkeypatch.setattr("broker_server.fleet.authority._clock", lambda then=then: then)
        authority.write_list([("ab", 5)])
        dates.append(x509.load_pem_x509_crl((fleet.folder / "crl.pem").read_bytes()).last_update_utc)
    assert dates == sorted(set(dates))
    assert revoked_serials(fleet) == {"ab"}


def test_a_wipe_cannot_be_taken_back_and_ends_the_membership(fleet: Registry, authority: Authority) -> None:
    joined(fleet, authority, "d1")
    before = fleet.device("d1").number
    assert members.stand(fleet, "d1", "paused").number == before + 1
    assert members.stand(fleet, "d1", "paused").number == before + 1  # nothing new
    members.stand(fleet, "d1", "wiping")
    with pytest.raises(LocalError, match="cannot be taken back"):
        members.stand(fleet, "d1", "active")
    members.wiped(fleet, authority, "d1")
    assert fleet.device("d1").state == "wiped"
    assert fleet.device("d1").good == []


def test_a_device_that_is_not_to_be_wiped_cannot_say_that_it_was(fleet: Registry, authority: Authority) -> None:
    joined(fleet, authority, "d1")
    members.wiped(fleet, authority, "d1")
    assert fleet.device("d1").state == "active"


# ---- the files ----------------------------------------------------------------------------------------------------------------------


def test_commands_at_the_same_time_lose_nothing(fleet: Registry) -> None:
    code = (
        "import sys; from pathlib import Path; from broker_server.fleet import members; from broker_server.fleet.registry import Registry\n"
        "registry = Registry(Path(sys.argv[1]))\nfor i in range(10): members.claim(registry, f'{sys.argv[2]}-{i}')\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(fleet.folder), name]) for name in ("a", "b", "c")]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert len(fleet.devices()) == 30


def test_a_change_that_fails_changes_nothing(fleet: Registry) -> None:
    members.claim(fleet, "d1")
    before = (fleet.folder / "devices.json").read_bytes()

    def fail() -> None:
        with fleet.change() as devices:
            devices.clear()
            raise LocalError("no")

    with pytest.raises(LocalError, match="no"):
        fail()
    assert (fleet.folder / "devices.json").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"version": 2, "devices": {}}', b'{"version": 1, "devices": {"d1": {"state": "god", "added_s": 1}}}'],
)
def test_a_damaged_registry_is_named(fleet: Registry, damage: bytes) -> None:
    (fleet.folder / "devices.json").write_bytes(damage)
    with pytest.raises(LocalError, match=r"devices\.json does not check out"):
        fleet.devices()


def test_a_name_that_carries_rights_is_refused_in_the_registry_too(fleet: Registry) -> None:
    said = {"version": 1, "devices": {"coordinator": {"state": "active", "added_s": 1}}}
    (fleet.folder / "devices.json").write_text(json.dumps(said))
    with pytest.raises(LocalError, match="device name"):
        fleet.devices()


def test_a_fleet_that_others_can_read_is_refused(fleet: Registry) -> None:
    fleet.folder.chmod(0o755)
    with pytest.raises(LocalError, match="chmod 700"):
        Registry(fleet.folder)
    fleet.folder.chmod(0o700)
    (fleet.folder / "ca.key").chmod(0o644)
    with pytest.raises(LocalError, match="chmod 600"):
        Authority(fleet.folder)


@pytest.mark.parametrize("file", ["ca.key", "ca.crt", "signing.key"])
def test_a_damaged_key_is_named(fleet: Registry, file: str) -> None:
    (fleet.folder / file).write_bytes(b"nonsense")
    with pytest.raises(LocalError, match=file):
        Authority(fleet.folder)
