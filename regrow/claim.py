"""Who leads a task: the retained claim, its terms, and the waits before it is taken."""

from __future__ import annotations

from dataclasses import dataclass

from regrow import topics, wire
from regrow.machine import Publish

BEAT_S = 2.0
CLAIM_WAIT_S = 0.5
FOREIGN_WAIT_S = 3 * BEAT_S
# Two coordinators with one user name push each other off the broker in turns; what was heard before still counts then.
FOREIGN_MEMORY_S = 60.0
# A term: restores from a backup, restarts since, and random bits that tell two processes apart.
_GENERATION_SHIFT, _RESTORE_SHIFT = 31, 12
# Assignment numbers of a restored run begin above those that devices may have had after the backup.
RESTORED_NUMBER_SHIFT = 30


def term_above(term: int, nonce: int) -> int:
    """The next generation's term, told from others' by 31 random bits."""
    return ((term >> _GENERATION_SHIFT) + 1) << _GENERATION_SHIFT | nonce


def term_after_restore(term: int) -> int:
    """A term above every one that the gateway had after the backup was made, of which the backup knows nothing: 2^12 restarts are room."""
    return (restores_of(term) + 1) << (_GENERATION_SHIFT + _RESTORE_SHIFT)


def restores_of(term: int) -> int:
    """How often the run was restored from a backup."""
    return term >> (_GENERATION_SHIFT + _RESTORE_SHIFT)


@dataclass(slots=True)
class Claim:
    """One coordinator's claim to lead `names`.

    Args:
        term: what it claims with; raised above the terms that it takes over from.
        takeover: lead even if another coordinator is alive.
        wait_s: when the wait for others' claims is over, monotonic seconds.
        beat_s: when to say again that it is alive.
    """

    names: topics.Run
    term: int
    nonce: int
    takeover: bool
    beat: int = 0
    wait_s: float = 0.0
    beat_s: float = 0.0
    _foreign: wire.Claim | None = None
    _foreign_s: float = 0.0

    def begin(self, now: float) -> None:
        if now - self._foreign_s > FOREIGN_MEMORY_S:
            self._foreign = None
        self.wait_s = now + CLAIM_WAIT_S

    def weigh(self, other: wire.Claim, now: float) -> str:
        """An own claim or a silent one is taken over, one that beats is respected: returns why not to lead, or nothing."""
        if other.term == self.term:
            return ""
        mine = other.run == self.names.run  # the store's lock says that no other process leads this run
        if mine or self.takeover:
            self._go_above(other.term)
        elif self._foreign is None:
            self._foreign, self._foreign_s = other, now
            self.wait_s = now + FOREIGN_WAIT_S
        elif (other.term, other.beat) != (self._foreign.term, self._foreign.beat):
            return (
                f"another coordinator leads task {self.names.task} (run {other.run}): stop it, give this task another name, "
                "or start with --takeover"
            )
        return ""

    def take(self) -> None:
        """The wait is over: go above what stayed silent."""
        if self._foreign is not None:
            self._go_above(self._foreign.term)
        self._foreign, self.takeover = None, False  # it is done once: whoever takes over from us later keeps the task

    def beaten(self, now: float) -> Publish:
        """The claim as it is published, a beat later than before."""
        self.beat += 1
        self.beat_s = now + BEAT_S
        message = wire.Claim(run=self.names.run, term=self.term, beat=self.beat)
        return Publish(topics.claim(self.names.task), wire.encode(message), retain=True)

    def _go_above(self, other: int) -> None:
        if other >= self.term:
            self.term = term_above(other, self.nonce)
