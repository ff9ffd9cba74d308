"""Nothing promised before it is durable: what leaves the coordinator waits here for the records before it."""

from __future__ import annotations

from collections import deque

from regrow.machine import Effect, Persist, Persisted, Record


class Outbox:
    """Records and effects of the step at hand, and the effects of earlier steps whose records are not on the disk yet."""

    def __init__(self) -> None:
        self._persist_id = 0
        self._records: list[Record] = []
        self._effects: list[Effect] = []
        self._waiting: deque[tuple[int, list[Effect]]] = deque()

    def commit(self, record: Record) -> None:
        self._records.append(record)

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def flush(self) -> list[Effect]:
        """What may leave at once after a step: its records, and its effects unless any records are under way."""
        out: list[Effect] = []
        effects, self._effects = self._effects, []
        if self._records:
            self._persist_id += 1
            out.append(Persist(self._persist_id, tuple(self._records)))
            self._records = []
            self._waiting.append((self._persist_id, effects))
        elif self._waiting:
            self._waiting[-1][1].extend(effects)
        else:
            out += effects
        return out

    def release(self, event: Persisted) -> list[Effect]:
        """What these records had held back."""
        out: list[Effect] = []
        while self._waiting and self._waiting[0][0] <= event.id:
            out += self._waiting.popleft()[1]
        return out
