"""What `serve` opens for a fleet: its door at the broker, enrolment, and what speaks to the devices for it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from broker_server.broker import Broker, Door
from broker_server.fleet.registry import Registry
from broker_server.fleet.sealing import Sealing, sealing_of
from broker_server.gateway import Companion
from regrow.errors import UsageError

if TYPE_CHECKING:
    from broker_server.fleet.authority import Authority

ALL_ADDRESSES = "0.0.0.0"


@dataclass(frozen=True, slots=True)
class Doors:
    """What keeps a fleet's doors, called about twice a second, and what speaks for it on the coordinator's link.

    sealing: role of a process -> what seals for it.
    """

    companions: tuple[Companion, ...]
    sealing: Callable[[str], Sealing]
    look: Callable[[], str | None] = lambda: None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class OpenFleet:
    """A fleet whose files check out."""

    registry: Registry
    authority: Authority

    def door(self, host: str | None, port: int | None) -> Door:
        """Where its devices come in, with a certificate that holds; by default on all addresses, at the port that their identities name."""
        from broker_server.fleet import members

        members.renew_own(self.registry, self.authority)
        return Door(self.registry, host or ALL_ADDRESSES, self.registry.fleet().tls_port if port is None else port)

    def said(self, broker: Broker) -> str:
        """The line that tells where the doors are."""
        bench = "; amqtt is for the bench: install mosquitto for real use" if broker.kind == "amqtt" else ""
        door = "" if broker.door is None else f" with TLS on {broker.door.host}:{broker.door.port}"
        return f"{broker.kind}{door} for fleet {self.registry.fleet().name} in {self.registry.folder}{bench}"

    def doors(self, broker: Broker | None, host: str | None) -> Doors:
        """Open them; only one process of a fleet does, another one only heeds who rests. broker: the one that we run, or none."""
        from broker_server.fleet.enrolment import Enrolment
        from broker_server.fleet.gatekeeper import Gatekeeper
        from broker_server.fleet.release_herald import ReleaseHerald
        from broker_server.fleet.releases import Releases
        from broker_server.fleet.steward import Steward, speaking_for

        speaking = ExitStack()
        if not speaking.enter_context(speaking_for(self.registry)):
            print("another process speaks for this fleet and enrols its devices", flush=True)
            return Doors((Steward(self.registry, self.authority, speaks=False),), self.sealing)
        enrolling = Enrolment(self.registry, self.authority, host or ALL_ADDRESSES, self.registry.fleet().enrol_port)
        keeper = Gatekeeper(self.registry, self.authority, broker, enrolling)

        def close() -> None:
            keeper.close()
            speaking.close()

        speakers = (Steward(self.registry, self.authority), ReleaseHerald(Releases(self.registry)))
        return Doors(speakers, self.sealing, lambda: keeper.look(time.monotonic()), close)

    def sealing(self, role: str) -> Sealing:
        """What seals for a process of this role; no two at a time have the same."""
        return sealing_of(self.registry, self.authority, role)


def check_ports(options: argparse.Namespace, fleet: OpenFleet | None) -> None:
    """See that no two of what `serve` opens want one port.

    Raises:
        UsageError: two do; which options they are.
    """
    wanted = [("--metrics-port", getattr(options, "metrics_port", None))]
    about = None if fleet is None else fleet.registry.fleet()
    if not (options.broker or os.environ.get("REGROW_BROKER")):
        wanted.append(("--port", options.port))
        if about is not None and options.tls_port is None:
            wanted.append(("the fleet's --tls-port", about.tls_port))
        elif about is not None:
            wanted.append(("--tls-port", options.tls_port))
    if about is not None:
        wanted.append(("the fleet's --enrol-port", about.enrol_port))
    of: dict[int, str] = {}
    for name, port in wanted:
        if not port:  # none, or a free one
            continue
        if port in of:
            raise UsageError(f"{of[port]} and {name} are both {port}: each needs a port of its own; say another {of[port].split()[-1]}")
        of[port] = name


def open_fleet(named: Path | None, own: Path) -> OpenFleet | None:
    """The fleet that was named, or the gateway's own where there is one.

    Raises:
        LocalError: the one that was named is none, or its files do not check out.
    """
    if named is None and not (own / "fleet.json").exists():
        return None
    from broker_server.fleet.authority import Authority

    folder = own if named is None else named
    return OpenFleet(Registry(folder), Authority(folder))
