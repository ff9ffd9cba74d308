"""The fleet's certificate authority: makes its keys, signs what devices ask for, and lists what is revoked.

Strategy: nothing depends on the day it was made. Every certificate and every list is valid from 2020 on, so that a gateway without a
battery whose clock starts in the past locks nobody out; only ends are real dates. Lists count seconds from there: of two lists OpenSSL
takes the one with the later date, and two revocations within a second, or after the clock was set back, must not be a draw.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker_server.durable import write_private
from regrow.errors import LocalError, PeerError

log = logging.getLogger(__name__)
VALID_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
AUTHORITY_DAYS = 20 * 365
BROKER_DAYS = DEVICE_DAYS = 365
LIST_DAYS = 90
RENEW_PART = 1 / 3  # of its life left, and a certificate is replaced
MAX_REQUEST_BYTES = 4096
SIGNING_KEY, NEXT_KEY, RELEASE_KEY = "signing.key", "signing.next.key", "release.key"
PROOF_DOMAIN = b"regrow/v1 certificate request\x00"  # as in edge_agent.identity


@dataclass(frozen=True, slots=True)
class Request:
    """What a device asks to be certified, checked: it holds both private keys.

    key: SHA-256 of the TLS key, hexadecimal: what tells one request from another.
    """

    device: str
    public: ec.EllipticCurvePublicKey
    key: str
    signing_key: bytes


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate. serial: lower-case hexadecimal; not_after_s: unix seconds."""

    pem: str
    serial: str
    not_after_s: int


def make(folder: Path, name: str, fleet_id: str) -> None:
    """Make ca.key, ca.crt and signing.key in the folder; the caller sees to it that there are none yet."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"Regrow fleet {name}"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet_id)]
    )
    usage = _usage(signs_certificates=True)
    certificate = (
        _builder(subject, subject, key.public_key(), _days_from_now(AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(folder / "ca.key", _private_pem(key))
    make_signing_key(folder / SIGNING_KEY)
    write_private(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_signing_key(path: Path) -> None:
    """Write a new Ed25519 key there."""
    write_private(path, _private_pem(ed25519.Ed25519PrivateKey.generate()))


def check_request(csr: bytes, signing_key: bytes, proof: bytes, device: str) -> Request:
    """The request, if it is one of this device's that proves both private keys.

    Args:
        csr: DER.
        signing_key: Ed25519 public key, 32 bytes.
        proof: its signature, 64 bytes, over PROOF_DOMAIN and the CSR.

    Raises:
        PeerError: whatever else it is.
    """
    if len(csr) > MAX_REQUEST_BYTES:
        raise PeerError(f"certificate request of {len(csr)} bytes, at most {MAX_REQUEST_BYTES} are read")
    try:
        request = x509.load_der_x509_csr(csr)
        public = request.public_key()
        names = [str(attribute.value) for attribute in request.subject]
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PeerError(f"certificate request: {error}") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise PeerError("certificate request: expected an ECDSA key on P-256")
    if not signed or not verify(signing_key, PROOF_DOMAIN + csr, proof):
        raise PeerError("certificate request: it does not prove that its keys are the sender's")
    if names != [device]:
        raise PeerError(f"certificate request: it names {names}, not {device!r}")
    return Request(device, public, key_digest(public), signing_key)


def verify(key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether this Ed25519 public key's holder signed these bytes; False, too, for what is no key or no signature."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


class Authority:
    """The authority whose files are in this folder.

    Raises:
        LocalError: a file is missing or does not check out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = _elliptic(folder / "ca.key")
        self._signer_stamp, self._signer = _stamp(folder / SIGNING_KEY), _edwards(folder / SIGNING_KEY)
        self._certificate = read_certificate(folder / "ca.crt")

    @property
    def certificate_pem(self) -> str:
        """What devices check the broker by."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def signing_key(self) -> bytes:
        """The coordinator's Ed25519 public key, 32 bytes."""
        return self.signer()[0]

    def sign(self, data: bytes) -> bytes:
        """The coordinator's Ed25519 signature, 64 bytes."""
        return self.signer()[1](data)

    def signer(self) -> tuple[bytes, Callable[[bytes], bytes]]:
        """(public key, what signs with it) of the coordinator as it is now, for the key may be changed while a gateway runs."""
        path = self._folder / SIGNING_KEY
        stamp = _stamp(path)
        if stamp != self._signer_stamp:
            self._signer_stamp = stamp
            try:
                self._signer = _edwards(path)
            except LocalError as error:  # a fleet at work does not end for it
                log.error("%s; going on with the key of before", error)
        return self._signer.public_key().public_bytes_raw(), self._signer.sign

    def next_key(self) -> bytes | None:
        """The public key that shall follow the coordinator's, while a change of it is under way (coordinator_key.py)."""
        path = self._folder / NEXT_KEY
        return _edwards(path).public_key().public_bytes_raw() if path.exists() else None

    def sign_release(self, data: bytes) -> bytes:
        """The signature that the devices' updaters believe, which a change of the coordinator's key does not change."""
        return self._releaser().sign(data)

    @property
    def release_key(self) -> bytes:
        """The public key of `sign_release`."""
        return self._releaser().public_key().public_bytes_raw()

    def _releaser(self) -> ed25519.Ed25519PrivateKey:
        path = self._folder / RELEASE_KEY
        return _edwards(path if path.exists() else self._folder / SIGNING_KEY)

    def certify_device(self, request: Request) -> Issued:
        """A certificate for a device: its name is the common name, and it may only be a TLS client."""
        return self._issue(request.device, request.public, DEVICE_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH)

    def certify_broker(self, hosts: Sequence[str]) -> Issued:
        """Make broker.key and broker.crt anew, for these names and addresses. The key first: mosquitto reads both at a reload only."""
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._issue(hosts[0], key.public_key(), BROKER_DAYS, ExtendedKeyUsageOID.SERVER_AUTH, hosts)
        write_private(self._folder / "broker.key", _private_pem(key))
        write_private(self._folder / "broker.crt", issued.pem.encode())
        return issued

    def broker_is_stale(self, hosts: Sequence[str]) -> bool:
        """Whether there is no certificate of the broker for these hosts with its key, or a third of its life is left."""
        try:
            certificate = read_certificate(self._folder / "broker.crt")
            key = _elliptic(self._folder / "broker.key")
            certificate.verify_directly_issued_by(self._certificate)
            named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (LocalError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return True
        if certificate.public_key() != key.public_key() or set(named) != set(map(_general_name, hosts)):
            return True
        return certificate.not_valid_after_utc < _days_from_now(BROKER_DAYS * RENEW_PART)

    def write_list(self, revoked: Iterable[tuple[str, int]]) -> None:
        """Write crl.pem, newer than the one that is there.

        Args:
            revoked: (serial, unix seconds at which it was revoked).
        """
        path = self._folder / "crl.pem"
        # Minutes, told as seconds: more than the last one's, and after a lost file still more than what a broker may hold of it.
        number = 1 + max(_list_number(path) or 0, int((_days_from_now(0) - VALID_FROM).total_seconds()) // 60)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(VALID_FROM + datetime.timedelta(seconds=number))
            .next_update(_days_from_now(LIST_DAYS))
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(_authority_identifier(self._certificate), critical=False)
        )
        for serial, when_s in sorted(revoked):
            when = max(VALID_FROM, datetime.datetime.fromtimestamp(when_s, datetime.timezone.utc))
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(when)
            builder = builder.add_revoked_certificate(entry.build())
        write_private(path, builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def list_is_stale(self) -> bool:
        """Whether the list of revoked certificates is missing, damaged, or has less than half of its life left."""
        found = _read_list(self._folder / "crl.pem")
        end = None if found is None else found.next_update_utc
        return end is None or end < _days_from_now(LIST_DAYS / 2)

    def _issue(
        self, name: str, public: ec.EllipticCurvePublicKey, days: int, use: x509.ObjectIdentifier, hosts: Sequence[str] = ()
    ) -> Issued:
        not_after = min(_days_from_now(days), self._certificate.not_valid_after_utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            _builder(subject, self._certificate.subject, public, not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=True)
            .add_extension(_authority_identifier(self._certificate), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        return Issued(pem, f"{certificate.serial_number:x}", int(not_after.timestamp()))


def read_certificate(path: Path) -> x509.Certificate:
    """Raises LocalError: there is none, or it does not check out."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LocalError(f"{path}: {error}; restore the fleet's folder from its backup") from error


def key_digest(public: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, hexadecimal."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, not_after: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    subject = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _clock() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _days_from_now(days: float) -> datetime.datetime:
    now = max(VALID_FROM, _clock())
    return (now + datetime.timedelta(days=days)).replace(microsecond=0)


def _private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _elliptic(path: Path) -> ec.EllipticCurvePrivateKey:
    key = _load(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LocalError(f"{path}: not an elliptic curve's key; restore the fleet's folder from its backup")
    return key


def _edwards(path: Path) -> ed25519.Ed25519PrivateKey:
    key = _load(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise LocalError(f"{path}: not an Ed25519 key; restore the fleet's folder from its backup")
    return key


def _load(path: Path) -> object:
    try:
        if path.stat().st_mode & 0o077:
            raise LocalError(f"{path} can be read by others; if it may have been, make a new fleet, else chmod 600 it")
        return serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise LocalError(f"{path}: {error}; restore the fleet's folder from its backup") from error


def _stamp(path: Path) -> tuple[int, int]:
    """Another one whenever the file is replaced; nothing where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def _read_list(path: Path) -> x509.CertificateRevocationList | None:
    try:
        return x509.load_pem_x509_crl(path.read_bytes())
    except (OSError, ValueError):
        return None


def _list_number(path: Path) -> int | None:
    found = _read_list(path)
    return None if found is None else found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
