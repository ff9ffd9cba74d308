"""`regrow join`: a device's way into a fleet, by hand."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from edge_agent.enrolment import enrol
from edge_agent.identity import Identity
from edge_agent.identity_folder import adopt, in_use
from regrow.errors import LocalError, PeerError, UsageError

AGAIN_S = 1.0


def join(options: argparse.Namespace) -> int:
    """Get the certificate that the claim is for."""
    if not options.claim.is_file():
        raise UsageError(f"{options.claim} is not there: `regrow fleet add NAME` on the gateway writes it")
    with in_use(options.identity):  # an agent at work would find other keys than its own
        about = adopt(options.identity, options.claim)
        joined = _enrolled(options.identity, options.wait)
    print(f"{joined.device} is in fleet {about.fleet}; next: regrow agent --identity {options.identity} --data SOURCE")
    return 0


def _enrolled(identity: Path, wait_s: float) -> Identity:
    """Ask until the gateway answers or the time is over: it opens its door a moment after `regrow fleet add`."""
    until_s, told = time.monotonic() + wait_s, False
    while True:
        try:
            return enrol(identity)
        except PeerError as error:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                cure = f"say the same again, or start `regrow agent --identity {identity}`, which goes on trying"
                raise LocalError(f"{error}; {cure}") from error
            if not told:
                print(f"cannot join yet: {error}; trying for {left_s:.0f} s", flush=True)
            told = True
            time.sleep(min(AGAIN_S, left_s))
