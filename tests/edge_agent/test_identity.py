"""The identity's folder: made and changed through power cuts at every step, and never a mixture of two."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from edge_agent import identity, identity_folder
from edge_agent.identity import Identity
from regrow.errors import LocalError, PeerError
from tests.edge_agent.small_authority import SmallAuthority


class PowerCutError(BaseException):
    """The process is gone at this point."""


@contextmanager
def power_cut(at: int) -> Iterator[list[bool]]:
    """End the block at its at-th call that changes names in a folder; yields whether it came to that."""
    calls, cut = [0], [False]
    kept = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "mkdir", "rmdir")}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if calls[0] == at:
                cut[0] = True
                raise PowerCutError
            calls[0] += 1
            return kept[name](*arguments, **options)

        return call

    for name in kept:
        setattr(os, name, counted(name))
    try:
        with suppress(PowerCutError):
            yield cut
    finally:
        for name, function in kept.items():
            setattr(os, name, function)


@pytest.fixture
def authority() -> SmallAuthority:
    return SmallAuthority()


def joined(authority: SmallAuthority, folder: Path) -> Identity:
    identity_folder.adopt(folder, authority.claim(folder.parent, "d1"))
    return identity.accept(folder, authority.certify(identity.request(folder).csr))


def pair_fits(folder: Path) -> bool:
    """Whether key, certificate and signing key are of one making."""
    certificate = x509.load_pem_x509_certificate((folder / "device.crt").read_bytes())
    key = serialization.load_pem_private_key((folder / "device.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return certificate.public_key() == key.public_key()


def test_keys_are_made_once_and_nobody_else_can_read_them(authority: SmallAuthority, tmp_path: Path) -> None:
    folder = tmp_path / "id"
    identity_folder.adopt(folder, authority.claim(tmp_path, "d1"))
    first, second = identity.request(folder), identity.request(folder)
    assert first.signing_key == second.signing_key
    assert identity.verify(first.signing_key, identity.PROOF_DOMAIN + first.csr, first.proof)
    me = identity.accept(folder, authority.certify(second.csr))
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (me.device, me.fleet, me.broker) == ("d1", "farm", "mqtts://127.0.0.1:8883")
    assert me.signing_key == first.signing_key
    assert identity.verify(me.signing_key, b"x", me.sign(b"x"))
    assert not identity.verify(me.signing_key, b"y", me.sign(b"x"))
    assert not identity.verify(b"no key", b"x", me.sign(b"x"))
    assert (folder / "ca.crt").read_text() == authority.pem
    assert "claim" not in json.loads((folder / "device.json").read_text())


def test_a_power_cut_while_joining_ends_where_it_would_have(authority: SmallAuthority, tmp_path: Path) -> None:
    claim = authority.claim(tmp_path, "d1")
    cuts = 0
    while True:
        folder = tmp_path / f"id{cuts}"
        with power_cut(cuts) as cut:
            identity_folder.adopt(folder, claim)
            identity.accept(folder, authority.certify(identity.request(folder).csr))
        if not cut[0]:
            break
        cuts += 1
        if not (folder / "device.json").exists():
            identity_folder.adopt(folder, claim)
        identity_folder.settle(folder)
        if identity_folder.read_about(folder).claim is not None:
            identity.accept(folder, authority.certify(identity.request(folder).csr))
        assert Identity.load(folder).device == "d1"
        assert pair_fits(folder)
    assert cuts > 15


def test_a_power_cut_while_changing_keys_leaves_the_old_ones_or_the_new(authority: SmallAuthority, tmp_path: Path) -> None:
    joined(authority, tmp_path / "id")
    cuts, outcomes = 0, set()
    while True:
        folder = tmp_path / f"copy{cuts}"
        shutil.copytree(tmp_path / "id", folder)
        before = Identity.load(folder)
        with power_cut(cuts) as cut:
            identity.accept(folder, authority.certify(identity.request(folder).csr))
        if not cut[0]:
            break
        cuts += 1
        after = Identity.load(folder)
        assert pair_fits(folder)
        outcomes.add(after.serial == before.serial)
        assert (after.serial == before.serial) == (after.signing_key == before.signing_key)
        after.tls_context()
        identity.accept(folder, authority.certify(identity.request(folder).csr))  # and it can go on
    assert outcomes == {True, False}
    assert cuts > 8


def test_a_power_cut_while_wiping_never_leaves_a_key_without_the_order_to_remove_it(authority: SmallAuthority, tmp_path: Path) -> None:
    joined(authority, tmp_path / "id")
    identity_folder.begin_wipe(tmp_path / "id")
    cuts = 0
    while True:
        folder = tmp_path / f"copy{cuts}"
        shutil.copytree(tmp_path / "id", folder)
        with power_cut(cuts) as cut:
            identity_folder.wipe(folder)
        if not cut[0]:
            break
        cuts += 1
        assert identity_folder.is_wiping(folder)
        identity_folder.wipe(folder)
        assert list(folder.iterdir()) == []
    assert cuts > 5
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("case", ["another key", "another name", "another CA", "no certificate"])
def test_an_answer_that_is_not_for_us_changes_nothing(authority: SmallAuthority, tmp_path: Path, case: str) -> None:
    me = joined(authority, tmp_path / "id")
    csr = identity.request(me.folder).csr
    other = ec.generate_private_key(ec.SECP256R1())
    answers = {
        "another key": lambda: authority.certify(request_of(other, "d1")),
        "another name": lambda: authority.certify(csr, name="d2"),
        "another CA": lambda: SmallAuthority().certify(csr),
        "no certificate": lambda: b"-----BEGIN nonsense",
    }
    with pytest.raises(PeerError, match="certificate"):
        identity.accept(me.folder, answers[case]())
    assert Identity.load(me.folder).serial == me.serial
    assert identity.accept(me.folder, authority.certify(csr)).serial != me.serial


def request_of(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.DER)


def test_starts_only_rise(authority: SmallAuthority, tmp_path: Path) -> None:
    me = joined(authority, tmp_path / "id")
    assert [me.next_start(), me.next_start(), Identity.load(me.folder).next_start()] == [1, 2, 3]
    assert [me.next_start(40), me.next_start(7), Identity.load(me.folder).next_start()] == [41, 42, 43]
    (me.folder / "start").write_text("x")
    with pytest.raises(LocalError, match="start is damaged"):
        me.next_start()


def test_a_folder_without_a_certificate_or_with_a_readable_key_says_the_cure(authority: SmallAuthority, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="regrow fleet add"):
        Identity.load(tmp_path / "empty")
    identity_folder.adopt(tmp_path / "claimed", authority.claim(tmp_path, "d1"))
    with pytest.raises(LocalError, match="no certificate yet"):
        Identity.load(tmp_path / "claimed")
    me = joined(authority, tmp_path / "id")
    (me.folder / "device.key").chmod(0o640)
    with pytest.raises(LocalError, match="fleet rotate"):
        Identity.load(me.folder)
    (me.folder / "device.key").chmod(0o600)
    (me.folder / "signing.key").write_bytes(b"x")
    with pytest.raises(LocalError, match=r"signing\.key is damaged"):
        Identity.load(me.folder)
    whole = (me.folder / "device.crt").read_bytes()
    for size in (0, 3, 100, len(whole) // 2):
        (me.folder / "device.crt").write_bytes(whole[:size])
        with pytest.raises(LocalError, match=r"device\.crt is damaged.*regrow fleet add"):
            Identity.load(me.folder)


def test_key_and_certificate_of_two_makings_are_named(authority: SmallAuthority, tmp_path: Path) -> None:
    me = joined(authority, tmp_path / "id")
    key = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (me.folder / "device.key").write_bytes(key.private_bytes(*form))
    with pytest.raises(LocalError, match="key and certificate do not check out"):
        me.tls_context()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "A b"),
        ("device", None),
        ("broker", "mqtt://127.0.0.1:1883"),
        ("enrol", "http://127.0.0.1"),
        ("coordinator_keys", []),
        ("coordinator_keys", ["ab"]),
        ("coordinator_keys", "x"),
        ("since_s", "now"),
        ("claim", {"token": "t"}),
    ],
)
def test_a_claim_that_is_none_is_refused_before_anything_is_kept(authority: SmallAuthority, tmp_path: Path, field: str, value: Any) -> None:
    file = authority.claim(tmp_path, "d1")
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(LocalError):
        identity_folder.adopt(tmp_path / "id", file)
    assert not (tmp_path / "id").exists()


def test_a_signature_is_checked_by_ed25519() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    assert identity.verify(key.public_key().public_bytes_raw(), b"data", key.sign(b"data"))
    assert not identity.verify(key.public_key().public_bytes_raw(), b"data", bytes(64))


def test_a_claim_file_that_stays_on_the_card_is_news_once_and_a_later_one_again(authority: SmallAuthority, tmp_path: Path) -> None:
    file = authority.claim(tmp_path, "d1")
    assert identity_folder.is_news(file, tmp_path / "id")
    me = joined(authority, tmp_path / "id")
    assert not identity_folder.is_news(file, me.folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), "since_s": me.about.since_s + 1}))
    assert identity_folder.is_news(file, me.folder)
    file.unlink()
    assert not identity_folder.is_news(file, me.folder)
    with pytest.raises(LocalError, match="regrow fleet add"):
        identity_folder.adopt(tmp_path / "other", file)
