"""What a broker's URL looks like, decided in one place: for devices' bundles, for the agent and for the gateway."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from regrow.errors import UsageError

PORT, TLS_PORT = 1883, 8883


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker is, and as whom; user and password are None when the URL has none."""

    host: str
    port: int
    tls: bool
    username: str | None = None
    password: str | None = None


def parse_broker_url(url: str, *, of_device: bool = False) -> BrokerAddress:
    """The parts of mqtt[s]://[user:password@]host[:port], escapes undone; default ports 1883 and 8883.

    Args:
        url: the text.
        of_device: refuse user and password: a device has them in its bundle and never in the URL.

    Raises:
        LocalError: it is no such URL. The text is not repeated: it may hold a secret.
    """
    form = "host:port" if of_device else "[user:password@]host:port"
    wrong = UsageError(f"broker address: expected mqtt://{form}, or mqtts:// for TLS; for example mqtt://192.168.1.10:1883")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise wrong from None
    host = parts.hostname or ""
    if parts.scheme not in ("mqtt", "mqtts") or not host or host != "".join(host.split()) or port == 0:
        raise wrong
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise wrong
    if of_device and (parts.username is not None or parts.password is not None):
        raise UsageError("broker address: leave user and password out, the device's bundle carries them")
    tls = parts.scheme == "mqtts"
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    return BrokerAddress(host, port or (TLS_PORT if tls else PORT), tls, user, password)
