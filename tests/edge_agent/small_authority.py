"""A CA for tests of the device's side, which knows nothing of the gateway's; with the dates that a test wants."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.timezone.utc)


class SmallAuthority:
    """Signs whatever it is asked to."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])
        self._certificate = self._built(self._name, self._key.public_key(), ca=True)
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.signing_key = ed25519.Ed25519PrivateKey.generate()

    def _built(
        self, subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool, years: tuple[int, int] = (2020, 2040), host: str = ""
    ) -> x509.Certificate:
        use = ExtendedKeyUsageOID.SERVER_AUTH if host else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW.replace(year=years[0]))
            .not_valid_after(NOW.replace(year=years[1]))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if not ca:
            builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if host:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def certify(self, csr: bytes, name: str = "") -> bytes:
        """PEM."""
        request = x509.load_der_x509_csr(csr)
        public = request.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) if name else request.subject
        return self._built(subject, public, ca=False).public_bytes(serialization.Encoding.PEM)

    def server(self, folder: Path, host: str, years: tuple[int, int]) -> Path:
        """A file with a key and a certificate for a server of that name, from June of one year to June of another."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._built(self._name, key.public_key(), ca=False, years=years, host=host)
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        path = folder / "server.pem"
        path.write_bytes(key.private_bytes(*form) + certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def claim(self, folder: Path, name: str, enrol: str = "https://127.0.0.1:8443") -> Path:
        path = folder / f"{name}.claim.json"
        said = {
            "device": name,
            "fleet": "farm",
            "broker": "mqtts://127.0.0.1:8883",
            "enrol": enrol,
            "coordinator_keys": [self.signing_key.public_key().public_bytes_raw().hex()],
            "since_s": int(NOW.timestamp()),
            "claim": {"token": "t", "expires_s": int(NOW.timestamp()) + 7 * 86400, "ca": self.pem},
        }
        path.write_text(json.dumps(said))
        return path
