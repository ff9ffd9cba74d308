"""How a device turns its claim into a certificate: only a request travels, and the keys stay.

What may happen in between (no network, a lost answer, a power cut) leads to the same request once more, which gets the same answer.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from edge_agent import identity
from edge_agent.identity import Identity
from edge_agent.identity_folder import About, read_about
from edge_agent.retry import Retry
from regrow.errors import LocalError, PeerError

log = logging.getLogger(__name__)
PATH = "/v1/enrol"
ANSWER_BYTES = 64 * 1024
TIMEOUT_S = 20.0


def enrol(folder: Path, timeout_s: float = TIMEOUT_S) -> Identity:
    """Ask once for the certificate that the folder's claim is for.

    Args:
        timeout_s: how long the gateway may stay silent.

    Raises:
        LocalError: there is no claim, or the gateway refuses it: a person must do something.
        PeerError: the gateway cannot be reached, or does not answer as it should: it may later.
    """
    about = read_about(folder)
    if about.claim is None:
        raise LocalError(f"{folder} has no claim to join a fleet with")
    asked = identity.request(folder)
    fields = {name: base64.b64encode(value).decode() for name, value in _parts(asked).items()}
    status, said = _post(about, {"device": about.device, "token": about.claim.token, **fields}, timeout_s)
    if status == 403:
        why = "the claim has expired, was used by another device, or is not of this fleet; `regrow fleet add` makes another"
        raise LocalError(f"the gateway refuses {about.device}: {str(said.get('error', ''))[:200]}; {why}")
    if status != 200 or not isinstance(said.get("certificate"), str):
        raise PeerError(f"the gateway answers {status}: {str(said.get('error', 'nothing that is understood'))[:200]}")
    return identity.accept(folder, str(said["certificate"]).encode())


def enrol_until_done(
    folder: Path, stopped: threading.Event, rng: random.Random, on_turn: Callable[[], None] = lambda: None
) -> Identity | None:
    """Ask, again and again, later and later, until there is a certificate. None: it was stopped.

    Args:
        on_turn: called before and after every attempt.

    Raises:
        LocalError: the gateway refuses the claim.
    """
    retry, told = Retry(rng, time.monotonic()), False
    while not stopped.is_set():
        on_turn()
        try:
            return enrol(folder)
        except PeerError as error:
            on_turn()
            wait_s = retry.failed(time.monotonic())
            log.log(logging.DEBUG if told else logging.WARNING, "cannot join yet: %s; trying again", error)
            told = True
            stopped.wait(wait_s)
    return None


def believed_time(about: About) -> Callable[[], float]:
    """Unix seconds before there is a fleet's time: the clock's where it lies within the claim's life, else the time when that was made."""

    def now() -> float:
        clock_s = time.time()
        until_s = about.since_s if about.claim is None else about.claim.expires_s
        return clock_s if about.since_s <= clock_s <= until_s else float(about.since_s)

    return now


def _parts(asked: identity.Request) -> dict[str, bytes]:
    return {"csr": asked.csr, "signing_key": asked.signing_key, "proof": asked.proof}


def _post(about: About, fields: dict[str, str], timeout_s: float) -> tuple[int, dict[str, object]]:
    where = urlsplit(about.enrol)
    context = identity.fleet_context(about.authority, believed_time(about))
    link = http.client.HTTPSConnection(where.hostname or "", where.port, timeout=timeout_s, context=context)
    try:
        link.request("POST", PATH, json.dumps(fields), {"Content-Type": "application/json"})
        answer = link.getresponse()
        said = json.loads(answer.read(ANSWER_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        what = "is not this fleet's" if isinstance(error, ssl.SSLCertVerificationError) else "cannot be reached"
        raise PeerError(f"{about.enrol} {what}: {error}") from error
    finally:
        link.close()
    return answer.status, said if isinstance(said, dict) else {}
