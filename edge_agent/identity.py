"""Who a device is: one folder that holds its keys and certificate, made and kept on the device.

Strategy: private keys never leave the folder, and a key is durable before its request travels. New keys are made in `pending/`; when the
certificate for them has come the folder is renamed to `ready/`, which decides it, and its files then take the places of the old ones.
Whoever opens the folder finishes that move first, so a power cut at any point leaves the old identity or the new one, never a mixture.
"""

from __future__ import annotations

import shutil
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.identity_folder import (
    CERTIFICATE,
    CURE,
    KEY,
    SIGNING_KEY,
    About,
    believe,
    finish_change,
    new_claim,
    opened,
    read,
    read_about,
    write,
)
from edge_agent.state import sync_folder
from regrow.errors import LocalError, PeerError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509 import Certificate

PROOF_DOMAIN = b"regrow/v1 certificate request\x00"  # as in broker_server.fleet.authority
# OpenSSL's X509_V_FLAG_NO_CHECK_TIME: a board without a battery begins in another year, so dates are held against the fleet's time instead.
_NO_CHECK_TIME = 0x200000


@dataclass(frozen=True, slots=True)
class Request:
    """What a device sends to be certified. csr: DER; signing_key: 32 bytes; proof: 64 bytes, the signing key's over the CSR."""

    csr: bytes
    signing_key: bytes
    proof: bytes


class DatesError(ssl.SSLError):
    """The server's certificate is not valid now."""


class DatedContext(ssl.SSLContext):
    """A TLS client that trusts one fleet's CA only, and holds the server's dates against `now` (unix seconds) instead of the clock."""

    now: Callable[[], float]

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """Raises DatesError, too."""
        sock = super().wrap_socket(*arguments, **options)
        dates = sock.getpeercert() or {}
        try:
            starts_s, ends_s = (ssl.cert_time_to_seconds(str(dates[name])) for name in ("notBefore", "notAfter"))
        except (KeyError, ValueError):
            starts_s, ends_s = 0, 0
        now_s = self.now()
        if not starts_s <= now_s <= ends_s:
            sock.close()
            starts, ends, now = (time.strftime("%Y-%m-%d", time.gmtime(moment_s)) for moment_s in (starts_s, ends_s, now_s))
            raise DatesError(ssl.SSL_ERROR_SSL, f"the server's certificate is valid from {starts} to {ends}, and it is {now}")
        return sock


def fleet_context(authority: str, now: Callable[[], float] = time.time) -> DatedContext:
    """A TLS client context without a certificate of its own.

    Args:
        authority: the fleet's CA, PEM.
        now: unix seconds, the fleet's time.

    Raises:
        LocalError: the CA is none.
    """
    context = DatedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.now = now
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= _NO_CHECK_TIME
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError) as error:
        raise LocalError(f"the fleet's certificate (ca) does not check out: {error}; {CURE}") from error
    return context


class Identity:
    """The identity in a folder, for one process.

    Attributes:
        device, fleet, broker: name of the device and of its fleet, and the broker's mqtts:// address.
        coordinator_keys: Ed25519 public keys of who may give it work, 32 bytes each.
        signing_key: the public half of what `sign` signs with, Ed25519, 32 bytes.
        serial: of the certificate in use, lower-case hexadecimal; not_after_s: its end, unix seconds.
    """

    def __init__(self, folder: Path, about: About, certificate: Certificate, signing_key: Ed25519PrivateKey) -> None:
        self.folder, self.about = folder, about
        self.device, self.fleet, self.broker, self.coordinator_keys = about.device, about.fleet, about.broker, about.coordinator_keys
        self.serial = f"{certificate.serial_number:x}"
        self.not_after_s = certificate.not_valid_after_utc.timestamp()
        self.signing_key = signing_key.public_key().public_bytes_raw()
        self._private = signing_key

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """The identity, after finishing a change of keys that a power cut may have interrupted.

        Raises:
            LocalError: it has no certificate yet, a file is missing or damaged, others can read it, or cryptography is not installed.
        """
        with opened(folder):
            return cls._read(folder)

    @classmethod
    def look(cls, folder: Path) -> Identity:
        """The same for whoever only examines it: nothing is made or changed, unless a change of keys has to be finished first.

        Raises:
            LocalError: as `load`.
        """
        try:
            return cls.load(folder) if (folder / "ready").exists() else cls._read(folder)
        except OSError as error:
            raise LocalError(
                f"{error.filename or folder}: {error.strerror or error}; ask as root, or as the user of the service"
            ) from error

    @classmethod
    def _read(cls, folder: Path) -> Identity:
        about = read_about(folder)
        if not (folder / CERTIFICATE).exists():
            raise LocalError(f"{folder} has no certificate yet: `regrow join` or the agent gets one with the claim; {CURE}")
        try:
            certificate = _certificate(read(folder / CERTIFICATE))
        except PeerError as error:
            raise LocalError(f"{folder / CERTIFICATE} is damaged: {error}; {CURE}") from error
        for name in (KEY, SIGNING_KEY):
            if not (folder / name).exists():
                raise LocalError(f"{folder / name} is missing; {new_claim_of(about, folder)}")
            if (folder / name).stat().st_mode & 0o077:
                raise LocalError(f"{folder / name} can be read by others: chmod 600 it, and `regrow fleet rotate` on the gateway")
        return cls(folder, about, certificate, _signing_key(folder / SIGNING_KEY))

    def ended(self, clock_s: float) -> str:
        """What to tell of a certificate that has ended by this clock (unix seconds), which may be wrong; else nothing."""
        if clock_s <= self.not_after_s:
            return ""
        day = time.strftime("%Y-%m-%d", time.gmtime(self.not_after_s))
        return f"by this clock the certificate of {self.device} ended on {day}; {new_claim_of(self.about, self.folder)}"

    def tls_context(self, now: Callable[[], float] = time.time) -> DatedContext:
        """A client that shows this device's certificate, and believes the fleet's CA only. now: the fleet's time, unix seconds.

        Raises:
            LocalError: key and certificate do not belong together.
        """
        context = fleet_context(self.about.authority, now)
        try:
            context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
        except (OSError, ssl.SSLError) as error:
            raise LocalError(f"{self.folder / KEY}: key and certificate do not check out: {error}; {CURE}") from error
        return context

    def sign(self, data: bytes) -> bytes:
        """This device's Ed25519 signature, 64 bytes."""
        return self._private.sign(data)

    def believe(self, keys: Sequence[bytes], number: int) -> bool:
        """Take these as the coordinator's keys from now on, durably; whether that is news.

        Args:
            keys: Ed25519 public keys, 32 bytes each.
            number: of the announcement; one that is not above the last one is the past.

        Raises:
            LocalError: the folder cannot be written.
        """
        if number <= self.about.keys_number:
            return False
        self.about = believe(self.folder, keys, number)
        self.coordinator_keys = self.about.coordinator_keys
        return True

    def next_start(self, above: int = 0) -> int:
        """A number above that of every earlier start, durable before it is returned: the high half of the device's stamps.

        Args:
            above: it is above this, too.

        Raises:
            LocalError: the counter is damaged; counting from 1 again would make the gateway refuse everything as a replay.
        """
        path = self.folder / "start"
        try:
            last = int(path.read_text()) if path.exists() else 0
        except ValueError as error:
            raise LocalError(f"{path} is damaged; {CURE}") from error
        start = max(last, above) + 1
        write(path, f"{start}\n".encode())
        return start


# ---- before there is a certificate, and when there shall be another one -------------------------------------------------------------


def is_pending(folder: Path) -> bool:
    """Whether there are keys that wait for their certificate."""
    return (folder / "pending" / SIGNING_KEY).exists()


def request(folder: Path) -> Request:
    """Ask to be certified, with new keys or with those that an earlier, unanswered request has made.

    Raises:
        LocalError: the folder cannot be read or written, or cryptography is not installed.
    """
    _needs_cryptography()
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    with opened(folder):
        pending = folder / "pending"
        if not (pending / SIGNING_KEY).exists():  # written last
            _make_keys(pending)
        key = serialization.load_pem_private_key(read(pending / KEY), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise LocalError(f"{pending / KEY}: not an elliptic curve's key; remove {pending}")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, read_about(folder).device)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        der = csr.public_bytes(serialization.Encoding.DER)
        signing_key = _signing_key(pending / SIGNING_KEY)
        return Request(der, signing_key.public_key().public_bytes_raw(), signing_key.sign(PROOF_DOMAIN + der))


def accept(folder: Path, certificate: bytes) -> Identity:
    """Change over to the keys that were certified, and forget the claim.

    Args:
        certificate: PEM or DER, as the gateway answered.

    Raises:
        PeerError: it is not the fleet's, not this device's or not for these keys; everything stays as it was.
    """
    _needs_cryptography()
    from cryptography.hazmat.primitives import serialization

    with opened(folder):
        about, pending = read_about(folder), folder / "pending"
        found = _certificate(certificate)
        key = serialization.load_pem_private_key(read(pending / KEY), None)
        _check(found, about, key.public_key())
        write(pending / CERTIFICATE, found.public_bytes(serialization.Encoding.PEM))
        pending.rename(folder / "ready")
        sync_folder(folder)
        finish_change(folder)
    return Identity.load(folder)


def verify(key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether this Ed25519 public key's holder signed these bytes; False, too, for what is no key or no signature."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _make_keys(pending: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(mode=0o700)
    sync_folder(pending.parent)
    for name, key in ((KEY, ec.generate_private_key(ec.SECP256R1())), (SIGNING_KEY, ed25519.Ed25519PrivateKey.generate())):
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write(pending / name, key.private_bytes(*form))


def _check(certificate: Certificate, about: About, public: object) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    if [attribute.value for attribute in certificate.subject] != [about.device]:
        raise PeerError(f"the gateway's certificate is not for {about.device!r}")
    if certificate.public_key() != public:
        raise PeerError("the gateway's certificate is for another key")
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(about.authority.encode()))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise PeerError("the gateway's certificate is not signed by this fleet's CA") from error


def _certificate(data: bytes) -> Certificate:
    _needs_cryptography()
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(data) if data.startswith(b"-----") else x509.load_der_x509_certificate(data)
    except ValueError as error:
        raise PeerError(f"not a certificate: {error}") from error


def _signing_key(path: Path) -> Ed25519PrivateKey:
    _needs_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(read(path), None)
    except ValueError as error:
        raise LocalError(f"{path} is damaged: {error}; {CURE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LocalError(f"{path}: not an Ed25519 key; {CURE}")
    return key


def new_claim_of(about: About, folder: Path) -> str:
    return f"let this device in anew: {new_claim(about.device, folder)}"


def _needs_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise LocalError("an identity needs the cryptography library: pip install 'regrow[fleet]'") from error
