"""Who may look at the page, and who may do something there.

On this machine everybody may look; whoever does something, or looks from elsewhere, shows the token. It travels in a header of its own and
never in a cookie, so no other site can make a browser send it. The Host header must name this machine, which a name that an attacker has
pointed at 127.0.0.1 does not.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from broker_server.durable import write_private
from regrow.errors import LocalError

TOKEN = "page-token"
TOKEN_BYTES = 32
Headers = Message  # of a request, whatever the case of their names


def token_in(home: Path) -> str:
    """The page's token, made when there is none yet: RUNS/.gateway/page-token, which only its owner may read.

    Raises:
        LocalError: it cannot be read or written, or others can read it.
    """
    file = home / TOKEN
    try:
        if not file.exists():
            home.mkdir(parents=True, exist_ok=True)
            write_private(file, secrets.token_urlsafe(TOKEN_BYTES).encode() + b"\n")
        if file.stat().st_mode & 0o077:
            raise LocalError(f"{file}: others can read it: chmod 600 it, or remove it for a new one")
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"{file}: {error}; check the owner of the folder, or remove the file for a new one") from error
    if len(token) < TOKEN_BYTES or not token.isascii():
        raise LocalError(f"{file}: not a token; remove it for a new one")
    return token


@dataclass(frozen=True, slots=True)
class Access:
    """The rules of one page. host: the address that it listens on, as it was given."""

    token: str
    host: str

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.host)

    def may_look(self, headers: Headers) -> bool:
        """Everybody here, and whoever shows the token."""
        return self.local or self.may_act(headers)

    def may_act(self, headers: Headers) -> bool:
        """Whoever shows the token."""
        scheme, _, shown = headers.get("Authorization", "").partition(" ")
        return scheme == "Bearer" and hmac.compare_digest(shown.strip().encode(), self.token.encode())

    def is_for_us(self, headers: Headers) -> bool:
        """Whether the Host header names this machine: an address, localhost, its own name, or the one that it was told to listen on."""
        given = headers.get_all("Host", [])
        name = host_of(given[0]) if len(given) == 1 else None
        if name is None:
            return False
        own = socket.gethostname().lower()
        return is_address(name) or name in ("localhost", self.host.lower(), own, f"{own}.local", own.split(".")[0] + ".local")

    def from_us(self, headers: Headers) -> bool:
        """Whether a browser says that a page of our own asks; what is no browser says nothing."""
        if headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return False
        origin = headers.get("Origin")
        return origin is None or origin == f"http://{headers.get('Host', '')}"


def host_of(text: str) -> str | None:
    """The name or address in a Host header, without its port; None where it is none."""
    if text.startswith("["):
        name, closed, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if closed and (not rest or rest.startswith(":")) else "x"
    else:
        name, colon, port = text.partition(":")
        port = port if colon else ""
    if not name or (port and not (port.isascii() and port.isdecimal())):
        return None
    return name.lower()


def is_address(name: str) -> bool:
    """Whether it is an address, which no name server can turn into another one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost"
