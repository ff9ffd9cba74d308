"""A broker in somebody else's hands: no rights are held back, and bytes are altered or made up on their way.

`python -m tests.attacks.compromised_broker CONFIG` takes the same file as broker_server.embedded_broker. The file CONFIG.alter, while it is
there, holds a part of topics: what is delivered there has another last byte. What is published to `to/CLIENT/TOPIC` by whoever listens to
`to/#` is handed to that client as if it came on TOPIC, whether it has subscribed or not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from amqtt.session import Session

from broker_server import embedded_broker
from broker_server.embedded_broker import Broker

ALTER = Path(f"{sys.argv[1]}.alter") if len(sys.argv) > 1 else Path()


class Compromised(Broker):
    """The embedded broker without scruples."""

    def _send(self, session: Session, topic: str, data: bytes, qos: int, *, retain: bool) -> None:
        if topic.startswith("to/"):
            _, client, topic = topic.split("/", 2)
            session = self.sessions[client][0]
        elif data and ALTER.exists() and ALTER.read_text() in topic:
            data = bytes(data[:-1]) + bytes([data[-1] ^ 1])
        super()._send(session, topic, data, qos, retain=retain)


def _anything(_user: str, _topic: str) -> bool:
    return True


if __name__ == "__main__":
    embedded_broker.may_read = embedded_broker.may_write = _anything
    embedded_broker.Broker = Compromised  # type: ignore[misc]
    sys.exit(embedded_broker.main())
