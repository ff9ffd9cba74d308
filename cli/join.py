"""`regrow join`: a device's way into a fleet, by hand."""

from __future__ import annotations

import argparse

from edge_agent.enrolment import enrol
from edge_agent.identity_folder import adopt, in_use
from regrow.errors import LocalError, PeerError, UsageError


def join(options: argparse.Namespace) -> int:
    """Get the certificate that the claim is for."""
    if not options.claim.is_file():
        raise UsageError(f"{options.claim} is not there: `regrow fleet add NAME` on the gateway writes it")
    try:
        with in_use(options.identity):  # an agent at work would find other keys than its own
            about = adopt(options.identity, options.claim)
            joined = enrol(options.identity)
    except PeerError as error:
        raise LocalError(
            f"{error}; say the same again, or start `regrow agent --identity {options.identity}`, which goes on trying"
        ) from error
    print(f"{joined.device} is in fleet {about.fleet}; next: regrow agent --identity {options.identity} --data SOURCE")
    return 0
