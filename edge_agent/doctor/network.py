"""The way from here to the broker, step by step: name, route, TCP, TLS and its certificate. The first step that fails says what to do."""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence

from edge_agent.doctor.certificates import dated
from edge_agent.doctor.checks import Check, Tell
from edge_agent.identity import DatesError
from regrow.broker_url import BrokerAddress
from regrow.findings import Finding

STEP_S = 4.0
_NAMES = ("network.name", "network.route", "network.tcp", "tls.handshake", "tls.broker")
_NOT_YET, _EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_...
Places = Sequence[tuple[int, tuple[str, int]]]


def network_checks(address: BrokerAddress, tls: Callable[[], ssl.SSLContext] | None = None, fleet_s: float = 0.0) -> list[Check]:
    """The steps to a broker. tls: makes the context for mqtts://; None: with the system's authorities; fleet_s: as of `dated`."""
    names = _NAMES if address.tls else _NAMES[:3]
    return [Check(names, lambda tell: walk(address, tls, tell, fleet_s), timeout_s=3 * STEP_S)]


def walk(address: BrokerAddress, tls: Callable[[], ssl.SSLContext] | None, tell: Tell, fleet_s: float = 0.0) -> None:
    """Tell of every step; those behind one that fails are unknown."""
    places = _resolve(address, tell)
    _route(places, tell)
    sock = _connect(address, places, tell)
    if not address.tls:
        if sock is not None:
            sock.close()
        return
    if sock is None:
        for name in _NAMES[3:]:
            tell(Finding(name, "unknown", "there is no connection to try it on"))
        return
    with sock:
        _handshake(sock, address, (tls or ssl.create_default_context)(), tell, fleet_s)


def _resolve(address: BrokerAddress, tell: Tell) -> Places:
    name = _NAMES[0]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        cure = "look at the broker's name in the bundle, and at the name server (resolvectl status)"
        tell(Finding(name, "fail", f"{address.host} has no address: {getattr(error, 'strerror', error)}", cure))
        return []
    places = [(int(family), (str(where[0]), int(where[1]))) for family, _, _, _, where in found]
    try:
        ipaddress.ip_address(address.host)
        tell(Finding(name, "ok", f"{address.host} is an address"))
    except ValueError:
        tell(Finding(name, "ok", f"{address.host} is {', '.join(dict.fromkeys(where[0] for _, where in places))}"))
    return places


def _route(places: Places, tell: Tell) -> None:
    """Which of our addresses the kernel would use; nothing is sent."""
    name = _NAMES[1]
    if not places:
        tell(Finding(name, "unknown", "there is no address to find a way to"))
        return
    why = ""
    for family, where in places:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(where)
                tell(Finding(name, "ok", f"from {probe.getsockname()[0]} to {where[0]}"))
                return
        except OSError as error:
            why = error.strerror or str(error)
    tell(Finding(name, "fail", f"no way to {places[0][1][0]}: {why}", "is the cable or the Wi-Fi connected? `ip route` shows the ways"))


def _connect(address: BrokerAddress, places: Places, tell: Tell) -> socket.socket | None:
    name, where = _NAMES[2], f"{address.host}:{address.port}"
    if not places:
        tell(Finding(name, "unknown", "there is no address to connect to"))
        return None
    error: OSError = OSError("no address")
    began_s = time.monotonic()
    for _, place in places:
        left_s = STEP_S - (time.monotonic() - began_s)
        if left_s <= 0:
            break
        try:
            sock = socket.create_connection(place, timeout=left_s)
        except OSError as found:
            error = found
            continue
        sock.settimeout(STEP_S)
        tell(Finding(name, "ok", f"{where} answers after {1000 * (time.monotonic() - began_s):.0f} ms"))
        return sock
    if error.errno == errno.ECONNREFUSED:
        said, cure = f"{where} refuses", "nothing listens on that port: start the gateway, or look at the port in the bundle"
    elif isinstance(error, TimeoutError):
        said, cure = f"{where} does not answer", "a firewall may drop it, or the gateway is off: look from another machine"
    else:
        said, cure = f"{where}: {error.strerror or error}", "look at the steps before this one"
    tell(Finding(name, "fail", said, cure))
    return None


def _handshake(sock: socket.socket, address: BrokerAddress, context: ssl.SSLContext, tell: Tell, fleet_s: float) -> None:
    handshake, certificate = _NAMES[3:]
    try:
        with context.wrap_socket(sock, server_hostname=address.host) as wrapped:
            tell(Finding(handshake, "ok", f"{wrapped.version()}, {(wrapped.cipher() or ('?',))[0]}"))
            peer = wrapped.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        dates = error.verify_code in (_NOT_YET, _EXPIRED)
        said = f"the broker's certificate is refused: {error.verify_message}"
        cure = "look at the clock, then renew it on the gateway" if dates else "is this the fleet's broker? its authority is not ours"
        tell(Finding(handshake, "fail", said, cure))
        tell(Finding(certificate, "fail" if dates else "unknown", error.verify_message, cure if dates else ""))
        return
    except DatesError as error:
        for name in (handshake, certificate):
            tell(Finding(name, "fail", str(error), "look at the clocks here and on the gateway, which renews its certificate in time"))
        return
    except (OSError, ValueError) as error:
        tell(Finding(handshake, "fail", f"no TLS: {error}", "is this the port for mqtts://? does the broker ask for another certificate?"))
        tell(Finding(certificate, "unknown", "there was no handshake"))
        return
    ends = str(peer.get("notAfter", ""))
    if not ends:
        tell(Finding(certificate, "unknown", "the broker showed no certificate that was checked"))
        return
    begins_s, ends_s = (float(ssl.cert_time_to_seconds(str(peer[key]))) for key in ("notBefore", "notAfter"))
    tell(dated(certificate, begins_s, ends_s, time.time(), "the broker's certificate is renewed on the gateway", fleet_s))
