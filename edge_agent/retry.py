"""When to try the broker again, and whether something, most likely another agent, takes the connection away.

Strategy. A wait is drawn from a tenth to the whole of a ceiling that is a quarter of the outage so far, at least 1 s and
at most WAIT_MAX_S: after a short outage a device is back within a second or so, a broker that stays away for a minute or a
month is asked every eight seconds on average, and whatever the outage, a fleet that lost its broker at one instant comes
back spread over a quarter of it or over WAIT_MAX_S. Asking costs about a hundred bytes where nobody answers, so a device
that waits for its gateway sends a megabyte a day, and is there within WAIT_MAX_S of the gateway's coming. Only a
connection that lasted ends an outage: a broker that kicks us is not hammered. An attempt that gets no answer at all (a
gateway that is switched off, packets that are dropped) lasts up to edge_agent.dial.CONNECT_TIMEOUT_S before its wait.

Two agents with one bundle have one client id, and a broker ends the older connection for the newer one. MQTT 5 would say
"session taken over"; 3.1.1, which we speak, just closes. So the sign is a broker that lets us in and closes soon after,
several times in a row and reachable all the while. A broker that has no memory left does the same to everybody.

A broker that refuses a certificate says so only after a TLS 1.3 client has ended the handshake, in an alert that may be
lost with the connection. So the sign is a broker that closes before it let us in, several times in a row.
"""

from __future__ import annotations

import random

from edge_agent.identity_folder import new_claim

FIRST_CEILING_S = 1.0
WAIT_MAX_S = 15.0
RIVAL_WAIT_MAX_S = 60.0
OUTAGE_SHARE = 0.25
STABLE_S = 10.0
TAKEOVERS = 3
REFUSALS = 3
# One that waits leaves the other alone for up to RIVAL_WAIT_MAX_S: once it has begun, only a longer connection shows that it is over.
ALONE_S = 2 * RIVAL_WAIT_MAX_S


class Retry:
    """The waits of one device; times are monotonic seconds.

    Args:
        rng: draws the jitter.
        now: when the first attempt is made.

    Attributes:
        takeovers: how many connections in a row the broker has ended soon after it let us in.
        refusals: how many in a row it has ended without letting our certificate in.
    """

    def __init__(self, rng: random.Random, now: float) -> None:
        self.takeovers = self.refusals = 0
        self._rng = rng
        self._away_since_s = now

    @property
    def taken_over(self) -> bool:
        """Whether another agent seems to run with our client id, or the broker lets nobody stay."""
        return self.takeovers >= TAKEOVERS

    @property
    def turned_away(self) -> bool:
        """Whether the broker seems to refuse our certificate."""
        return self.refusals >= REFUSALS

    def suspicion(self, device: str, wait_s: float, *, certified: bool) -> str:
        """What to tell the user when `taken_over`: from here its two causes look alike. certified: it has an identity, not a bundle."""
        if certified:
            rival = f"another agent runs with the identity of {device!r}: stop one of the two, and let the other in under a name of its own"
            cure = f"`regrow fleet add NAME`; is it a copy that you do not know, `regrow fleet revoke {device}`"
        else:
            rival = f"another agent, or a meter, logs in with the bundle of {device!r}: stop one of the two, or make it a bundle of its own"
            cure = "`regrow device add NAME`"
        return (
            f"connection lost: {self.takeovers} times in a row the broker ended the connection soon after it let us in. "
            f"Either {rival} on the gateway with {cure}. Or the gateway's broker is full or unwell: then it throws out its other devices "
            f"too, and the gateway's log says so. Next try in {wait_s:.0f} s"
        )

    def failed(self, now: float, *, turned_away: bool = False) -> float:
        """Seconds to wait after an attempt that brought no connection. turned_away: the broker closed it on us and our certificate."""
        self.takeovers = 0  # a broker that cannot be reached, or refuses us, is no sign of a rival
        self.refusals = self.refusals + 1 if turned_away else 0
        return self._draw(now)

    def lost(self, now: float, lasted_s: float, *, closed_by_broker: bool) -> float:
        """Seconds to wait after a connection that lasted `lasted_s`."""
        self.refusals = 0
        if closed_by_broker and lasted_s < (ALONE_S if self.takeovers else STABLE_S):
            self.takeovers += 1
        else:
            self.takeovers = 0
        if lasted_s >= STABLE_S:
            self._away_since_s = now
        return self._draw(now)

    def _draw(self, now: float) -> float:
        if self.taken_over:
            return self._rng.uniform(RIVAL_WAIT_MAX_S / 2, RIVAL_WAIT_MAX_S)
        ceiling_s = min(max(OUTAGE_SHARE * (now - self._away_since_s), FIRST_CEILING_S), WAIT_MAX_S)
        return self._rng.uniform(0.1 * ceiling_s, ceiling_s)


def certificate_refused(device: str) -> str:
    """What to tell the user when `turned_away`: what it is; the cure."""
    return (
        "the gateway refuses this device's certificate: revoked, expired, or of another fleet; "
        f"`regrow fleet show {device}` on the gateway says which, and to let it in again: {new_claim(device)}"
    )
