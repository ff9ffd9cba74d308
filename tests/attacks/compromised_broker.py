"""A broker in somebody else's hands: no rights are held back, and anything can be handed to anybody.

`python -m tests.attacks.compromised_broker CONFIG` takes the same file as broker_server.embedded_broker. What is published to
`to/CLIENT/TOPIC` is handed to that client as if it came on TOPIC, whether it has subscribed or not, once somebody listens to `to/#`.
"""

from __future__ import annotations

import sys

from amqtt.session import Session

from broker_server import embedded_broker
from broker_server.embedded_broker import Broker


class Compromised(Broker):
    """The embedded broker without scruples."""

    def _send(self, session: Session, topic: str, data: bytes, qos: int, *, retain: bool) -> None:
        if topic.startswith("to/"):
            _, client, topic = topic.split("/", 2)
            session = self.sessions[client][0]
        super()._send(session, topic, data, qos, retain=retain)


def _anything(_user: str, _topic: str) -> bool:
    return True


if __name__ == "__main__":
    embedded_broker.may_read = embedded_broker.may_write = embedded_broker.may_retain = _anything
    embedded_broker.Broker = Compromised  # type: ignore[misc]
    sys.exit(embedded_broker.main())
