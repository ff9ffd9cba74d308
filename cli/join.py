"""`regrow join`: a device's way into a fleet, by hand."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from edge_agent.enrolment import TIMEOUT_S, enrol
from edge_agent.identity import Identity
from edge_agent.identity_folder import About, adopt, claim_in, has_used, in_use
from edge_agent.sealing import known_s
from regrow.errors import LocalError, PeerError, UsageError

AGAIN_S = 1.0
LEAST_S = 3.0  # for one answer, however little time is left


def join(options: argparse.Namespace) -> int:
    """Get the certificate that the claim is for."""
    if not options.claim.is_file():
        raise UsageError(f"{options.claim} is not there: `regrow fleet add NAME` on the gateway writes it")
    if _is_in(claim_in(options.claim), options.identity):
        return 0
    with in_use(options.identity):  # an agent at work would find other keys than its own
        about = adopt(options.identity, options.claim)
        print(f"asking {about.enrol} to let {about.device} in", flush=True)
        joined = _enrolled(options.identity, options.wait)
    print(f"{joined.device} is in fleet {about.fleet}; next: regrow agent --identity {options.identity} --data SOURCE")
    return 0


def _is_in(about: About, identity: Path) -> bool:
    """Whether this claim has let the device in before; says so.

    Raises:
        LocalError: it has, but what came of it is damaged, or ended.
    """
    if about.claim is None or not has_used(identity, about.claim):
        return False
    if ended := Identity.look(identity).ended(known_s(identity, about.since_s) or time.time()):
        raise LocalError(ended)
    print(f"{about.device} is in fleet {about.fleet} already; next: regrow agent --identity {identity} --data SOURCE")
    return True


def _enrolled(identity: Path, wait_s: float) -> Identity:
    """Ask until the gateway answers or the time is over: it opens its door a moment after `regrow fleet add`."""
    until_s, told = time.monotonic() + wait_s, False
    while True:
        try:
            return enrol(identity, min(TIMEOUT_S, max(LEAST_S, until_s - time.monotonic())))
        except PeerError as error:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                cure = f"say the same again, or start `regrow agent --identity {identity}`, which goes on trying"
                raise LocalError(f"{error}; {cure}") from error
            if not told:
                print(f"cannot join yet: {error}; trying for {left_s:.0f} s", flush=True)
            told = True
            time.sleep(min(AGAIN_S, left_s))
