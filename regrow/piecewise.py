"""Pieces on their way to a device: asked for a few at a time by retained topic, and each taken only by the digest that it was asked by."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from regrow import wire
from regrow.errors import PeerError
from regrow.machine import Effect, Received, Subscribe, Unsubscribe
from regrow.publication import PIECE_BYTES

AT_ONCE = 2
PATIENCE_S = 60.0


class Piecewise:
    """What is asked for on one connection.

    Attributes:
        lacking: digest -> topic of the pieces that are not here.
        asked: topics of those that are on their way.
    """

    def __init__(self, lacking: Mapping[bytes, str], now: float) -> None:
        self.lacking = dict(lacking)
        self.asked: set[str] = set()
        self._since_s = now

    def ask(self) -> list[Effect]:
        """Ask for the next ones, as far as there is room."""
        others = (topic for topic in self.lacking.values() if topic not in self.asked)
        more = tuple(islice(others, AT_ONCE - len(self.asked)))
        self.asked.update(more)
        return [Subscribe(more)] if more else []

    def take(self, event: Received, now: float) -> tuple[bytes, list[Effect]]:
        """(digest, effects) of a piece that has come.

        Raises:
            PeerError: these are not the bytes that the topic promised.
        """
        digest = wire.digest(event.payload)
        if self.lacking.get(digest) != event.topic or len(event.payload) > PIECE_BYTES:
            raise PeerError(f"{event.topic}: {len(event.payload)} bytes that the announcement does not name")
        del self.lacking[digest]
        self.asked.discard(event.topic)
        self._since_s = now
        return digest, [Unsubscribe((event.topic,))]

    def stop(self) -> list[Effect]:
        """Ask for none of them any more."""
        effects: list[Effect] = [Unsubscribe(tuple(sorted(self.asked)))] if self.asked else []
        self.asked.clear()
        return effects

    def stalled(self, now: float) -> bool:
        """Whether what was asked for does not come."""
        return bool(self.asked) and now - self._since_s > PATIENCE_S


def check_blob(blob: wire.Blob, most_bytes: int) -> None:
    """Raises PeerError: a file is too large, or cannot be of these pieces."""
    if not 0 < blob.size <= most_bytes:
        raise PeerError(f"{blob.name} has {blob.size} bytes; a device takes 1 to {most_bytes}")
    if len(blob.pieces) != -(-blob.size // PIECE_BYTES):
        raise PeerError(f"{blob.name}: {len(blob.pieces)} pieces for {blob.size} bytes")
