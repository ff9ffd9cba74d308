"""Whether the broker lets a device say and hear what it must: tried, for brokers answer a forbidden publish like an allowed one.

A device may read what it writes below its own name. So it says a random word on one topic for each of its rights to write, and what it does
not hear again was not delivered. Pure: the agent drives it on its own link, `regrow doctor` on one that it opens for this.
"""

from __future__ import annotations

from regrow import topics
from regrow.findings import Finding
from regrow.machine import Effect, Event, Publish, Received, Subscribe, Unsubscribe

LISTEN_S = 4.0
AGAIN_S = 1.0
_MEANING = ("its own name", "telemetry", "probes", "updates")


class Rights:
    """One trial. Times are monotonic seconds.

    Args:
        device: whose rights.
        word: random bytes that nobody else says.
    """

    def __init__(self, device: str, word: bytes) -> None:
        self._topics = topics.doctor_echoes(device)
        self._word = word
        self._heard: set[str] = set()
        self._began_s: float | None = None
        self._again_s = 0.0

    def begin(self, now: float) -> list[Effect]:
        self._began_s = now
        return [Subscribe(self._topics), *self._say(now)]

    def _say(self, now: float) -> list[Effect]:
        self._again_s = now + AGAIN_S
        return [Publish(topic, self._word) for topic in self._topics if topic not in self._heard]

    def step(self, event: Event | None, now: float) -> list[Effect]:
        """Hear; say again what did not come back, for a broker may take a subscription after the first word."""
        if isinstance(event, Received) and event.topic in self._topics and event.payload == self._word:
            self._heard.add(event.topic)
        return self._say(now) if now >= self._again_s and not self.over(now) else []

    def over(self, now: float) -> bool:
        return self._began_s is None or len(self._heard) == len(self._topics) or now >= self._began_s + LISTEN_S

    def end(self) -> list[Effect]:
        return [Unsubscribe(self._topics)]

    def finding(self) -> Finding:
        """What is missing, by the words of docs/deploy.md's access rules."""
        missing = [word for topic, word in zip(self._topics, _MEANING, strict=True) if topic not in self._heard]
        if not missing:
            return Finding("broker.rights", "ok", "it may say what it must, and hears its own topics")
        said = f"what it says on its topics for {', '.join(missing)} is not delivered"
        return Finding("broker.rights", "fail", said, "compare the broker's access rules with docs/deploy.md")
