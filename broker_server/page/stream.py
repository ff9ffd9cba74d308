"""Tells all who listen what has changed: encoded once, into a short queue for each; who does not keep up is let go and may come again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import msgspec

from broker_server.page.board import Row

EVERY_S = 1.0
WAITING = 16
LISTENERS = 32
KEEP_ALIVE = b": still here\n\n"
KEEP_ALIVE_S = 15.0


class Listener:
    """One who listens: `next` gives what to send, None when it is over."""

    def __init__(self, first: bytes) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._over = threading.Event()
        self._queue.put(first)

    def put(self, data: bytes) -> bool:
        """Whether there was room for it."""
        try:
            self._queue.put_nowait(data)
        except queue.Full:
            return False
        return True

    def end(self) -> None:
        """Nothing more comes; what waits is not sent."""
        self._over.set()
        if self._queue.empty():
            self.put(b"")

    def next(self) -> bytes | None:
        """What to send; after a while without news a comment, so that a dead connection is noticed."""
        try:
            data = self._queue.get(timeout=KEEP_ALIVE_S)
        except queue.Empty:
            data = KEEP_ALIVE
        return None if self._over.is_set() else data


class Stream:
    """The listeners of one board and the thread that tells them.

    Args:
        whole: what a new listener is sent first.
        changes: what is new since it was last asked, None where nothing is.
    """

    def __init__(self, whole: Callable[[], Row], changes: Callable[[], Row | None], every_s: float = EVERY_S) -> None:
        self._whole, self._changes, self._every_s = whole, changes, every_s
        self._listeners: set[Listener] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="page-stream", daemon=True)
        self._thread.start()

    @property
    def listening(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def join(self) -> Listener | None:
        """A new listener, who is told everything first; None when there are too many.

        What changes meanwhile may be in both, the first message and the next.
        """
        with self._lock:
            if self._closed.is_set() or len(self._listeners) >= LISTENERS:
                return None
            listener = Listener(encoded("whole", self._whole()))
            self._listeners.add(listener)
            return listener

    def leave(self, listener: Listener) -> None:
        """It does not listen any more."""
        with self._lock:
            self._listeners.discard(listener)

    def close(self) -> None:
        """Let everybody go."""
        self._closed.set()
        self._thread.join()
        with self._lock:
            for listener in self._listeners:
                listener.end()
            self._listeners.clear()

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            changes = self._changes()  # taken also when nobody listens, so that they do not pile up
            if changes is None or not self._listeners:
                continue
            data = encoded("changes", changes)
            with self._lock:
                for listener in [listener for listener in self._listeners if not listener.put(data)]:
                    listener.end()
                    self._listeners.discard(listener)


def encoded(kind: str, value: Row) -> bytes:
    """A server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(value))
