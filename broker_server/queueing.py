"""Publishes that leave a few at a time, so that assignments need not wait behind a large file; an announcement waits for what it names."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from regrow.machine import Acknowledged, Connected, Disconnected, Effect, Event, Publish

WINDOW = 16


class Queueing:
    """What is to be published on one connection.

    Args:
        first_token: of the acknowledgements; every machine on a link has its own range.

    Attributes:
        connected: whether there is a connection.
    """

    def __init__(self, first_token: int) -> None:
        self.connected = False
        self._token = first_token
        self._queue: deque[tuple[Publish, bool]] = deque()
        self._waiting: set[int] = set()

    def heed(self, event: Event | None) -> None:
        """Take an event of the link in: what was queued for one connection is not for the next."""
        if isinstance(event, (Connected, Disconnected)):
            self.connected = isinstance(event, Connected)
            self.clear()
        elif isinstance(event, Acknowledged):
            self._waiting.discard(event.token)

    def clear(self) -> None:
        """Forget everything: another connection, or another thing to publish."""
        self._queue.clear()
        self._waiting.clear()

    def put(self, topics: Iterable[tuple[str, bytes]], *, after_all: bool = False) -> None:
        """Queue retained payloads. after_all: only when all before them are acknowledged."""
        self._queue.extend((Publish(topic, payload, retain=True), after_all) for topic, payload in topics)

    def send(self) -> list[Effect]:
        """The next of the queue."""
        effects: list[Effect] = []
        while self._queue and len(self._waiting) < WINDOW:
            publish, after_all = self._queue[0]
            if after_all and self._waiting:
                break
            self._queue.popleft()
            self._token += 1
            self._waiting.add(self._token)
            effects.append(Publish(publish.topic, publish.payload, retain=True, token=self._token))
        return effects
