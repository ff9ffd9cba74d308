"""All checks of a device, for `regrow doctor` beside the agent and for the agent itself when the gateway asks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import random
import secrets
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.budgets import limits_in
from edge_agent.doctor import training
from edge_agent.doctor.certificates import certificate_check
from edge_agent.doctor.checks import Check, Tell
from edge_agent.doctor.host import host_checks
from edge_agent.doctor.network import network_checks
from edge_agent.doctor.rights import LISTEN_S, Rights
from edge_agent.doctor.service import service_checks
from edge_agent.identity import Identity, verify
from edge_agent.identity_folder import new_claim, state_in_use
from edge_agent.memory import spare_bytes
from edge_agent.sealing import known_s
from edge_agent.state import MAGIC
from edge_agent.transport import CLOSED, MqttLink
from edge_agent.vitals import HEALTH, WRITE_S, boot_id
from regrow import topics
from regrow.broker_url import parse_broker_url
from regrow.errors import LocalError
from regrow.findings import Finding
from regrow.machine import Connected, Disconnected, Event, Received, Subscribe
from regrow.seal import UNKNOWN_KEY, SealError, open_seal

UNIT = "regrow-agent"
LOGIN_S = 12.0
FRESH_S = 150.0
CLAIMS = "regrow/v1/+/claim"
_BROKER = ("broker.login", "broker.rights", "broker.gateway")
_DIGEST_BYTES = 32
Needs = Mapping[str, tuple[Sequence[int], Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Subject:
    """The device that is examined.

    Args:
        device, broker, password: as in its bundle; a device with an identity has no password.
        state: its folder.
        version: of the software.
        tls: makes the context for mqtts://; None: with the system's authorities.
        identity: the folder of its identity, if it has one.
        root: below which proc, sys, run and dev lie.
        not_before_s: unix seconds at which its gateway wrote its claim.
        broken: its identity cannot be used, so it cannot log in; broker is "" where even that is not known.
    """

    device: str
    broker: str
    password: str | None
    state: Path
    version: str = ""
    tls: Callable[[], ssl.SSLContext] | None = None
    identity: Path | None = None
    root: Path = Path("/")
    not_before_s: float = 0.0
    broken: bool = False


def device_checks(subject: Subject, needs: Needs, reference: Callable[[], float | None] = lambda: None) -> list[Check]:
    """What is asked where no agent has to be disturbed. needs: as of `training.model_fit`; reference: as of `host_checks`."""
    return [
        *_common(subject, reference),
        Check(_BROKER, lambda tell: broker(subject, tell), LOGIN_S + LISTEN_S),
        *training.training_checks(subject.root),
        Check(("model.fit",), lambda tell: tell(training.model_fit(needs, spare_bytes(root=subject.root)))),
    ]


def live_checks(subject: Subject, reference: Callable[[], float | None]) -> list[Check]:
    """What a running agent asks itself; its rights at the broker it tries on its own link (edge_agent.checkup)."""
    step = Check(("onnxruntime", "training.step"), training.here, training.STEP_S)
    return [*_common(subject, reference), Check(("cpu",), lambda tell: tell(training.processor(subject.root))), step]


def _common(subject: Subject, reference: Callable[[], float | None]) -> list[Check]:
    checks = [Check(("software",), lambda tell: tell(software(subject.version)))]
    fleet_s = 0.0 if subject.identity is None else known_s(subject.identity, subject.not_before_s)
    checks += host_checks(subject.state, subject.root, reference, fleet_s)
    if subject.broker:
        checks += network_checks(parse_broker_url(subject.broker, of_device=True), subject.tls, fleet_s)
    if subject.identity is not None:
        folder = subject.identity
        renewal = f"the agent renews it in time; once it has ended: {new_claim(subject.device or 'NAME', folder)}"
        checks.append(Check(("tls.identity",), lambda tell: tell(identity(folder))))
        checks.append(certificate_check("tls.own", folder / "device.crt", renewal, fleet_s))
        checks.append(certificate_check("tls.authority", folder / "ca.crt", "the fleet needs another CA: docs/fleet.md", fleet_s))
    checks.append(Check(("state.folder",), lambda tell: tell(state_folder(subject.state)), 10.0))
    checks.append(Check(("limits",), lambda tell: tell(limits_in(subject.state))))
    return [*checks, *service_checks(UNIT, subject.root)]


def software(version: str) -> Finding:
    """What runs here."""
    said = (
        f"regrow {version or '(not installed)'}, Python {platform.python_version()}, {platform.machine()}, {platform.platform(terse=True)}"
    )
    if sys.maxsize < 2**32:
        return Finding("software", "fail", said, "a 64-bit system is needed: NumPy and onnxruntime have no wheels for 32-bit ARM")
    return Finding("software", "ok", said)


def identity(folder: Path) -> Finding:
    """Whether an agent could start with this identity."""
    try:
        Identity.look(folder).tls_context()
    except LocalError as error:
        said, _, cure = str(error).partition("; ")
        return Finding("tls.identity", "fail", said, cure)
    return Finding("tls.identity", "ok", "keys and certificate can be read, and belong together")


# ---- the state ---------------------------------------------------------------------------------------------------------------------


def state_folder(folder: Path) -> Finding:
    """Whether what the agent promised is there and whole; nothing is changed."""
    name = "state.folder"
    if not folder.is_dir():
        return Finding(name, "unknown", f"{folder} is not there: no agent has run with it", "name the agent's folder: --state")
    try:
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        aside = [file.name for file in files if file.name.endswith(".rejected")]
        damaged = [file.name for file in files if not _whole(file)]
    except PermissionError:
        return Finding(name, "unknown", f"this user may not read {folder}", "ask as root, or as the user of the service")
    size = sum(map(_size, files))
    said = f"{folder}: {len(files)} files, {size / 1e6:.1f} MB{', an agent holds it' if is_held(folder) else ''}"
    if damaged:
        cure = "the agent sets them aside at its next start and fetches them again; if it happens again, replace the card"
        return Finding(name, "warn", f"{said}; damaged: {', '.join(damaged[:5])}", cure)
    if aside:
        return Finding(
            name, "warn", f"{said}; set aside as damaged: {', '.join(aside[:5])}", "a worn card does this; delete them after a look"
        )
    return Finding(name, "ok", said)


def _size(file: Path) -> int:
    """Bytes; none of what a running agent has replaced meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _whole(file: Path) -> bool:
    """Whether a state file's digest is right; True for what is no state file, or was replaced meanwhile."""
    try:
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC or file.name.endswith((".tmp", ".rejected")):
                return True
            digest, found = stream.read(_DIGEST_BYTES), hashlib.sha256()
            while piece := stream.read(1 << 20):
                found.update(piece)
    except FileNotFoundError:
        return True
    return found.digest() == digest


def is_held(folder: Path) -> bool:
    """Whether an agent runs with this state folder."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)  # and with it the lock
    return False


# ---- the broker --------------------------------------------------------------------------------------------------------------------


def broker(subject: Subject, tell: Tell) -> None:
    """Log in as the device and try its rights; not while an agent runs, whose connection that would end."""
    held = subject.state if is_held(subject.state) else None
    if held is None and subject.identity is not None:
        held = state_in_use(subject.identity)
    if held is not None:
        _by_health(held, subject, tell)
        return
    if subject.broken:
        for name in _BROKER:
            tell(Finding(name, "unknown", "not tried: the identity cannot be used", "look at tls.identity"))
        return
    link = MqttLink(
        subject.broker,
        device_id=subject.device,
        password=subject.password,
        rng=random.Random(secrets.token_bytes(8)),
        tls=None if subject.tls is None else subject.tls(),
    )
    try:
        refusal = _log_in(link, patient=subject.password is None)
        if refusal is None:
            _try_rights(link, subject, tell)
            return
    finally:
        link.close()
    said, _, cure = refusal.partition("; ")
    if said.startswith("the broker refused"):
        cure = "issue a new bundle: regrow device add NAME on the gateway"
    elif not said.startswith("the gateway refuses"):
        cure = "look at the steps of network and tls"
    tell(Finding(_BROKER[0], "fail", said, cure))
    for name in _BROKER[1:]:
        tell(Finding(name, "unknown", "the broker does not let this device in"))


def _log_in(link: MqttLink, *, patient: bool) -> str | None:
    """None once the broker has let us in, else why it did not. patient: a broker that just closes is asked until it is clear why."""
    until_s = time.monotonic() + LOGIN_S
    said = f"the broker did not answer in {LOGIN_S:g} s"
    while time.monotonic() < until_s:
        for event in link.poll(0.5):
            if isinstance(event, Disconnected):
                said = event.reason
                if event.needs_help or not (patient and said.startswith(CLOSED)):
                    return said
            if isinstance(event, Connected):
                return None
    return said


def _try_rights(link: MqttLink, subject: Subject, tell: Tell) -> None:
    device, deaf = subject.device, False
    tell(Finding(_BROKER[0], "ok", f"the broker lets {device} in"))
    rights = Rights(device, secrets.token_bytes(16))
    leads: set[str] = set()
    link.perform(Subscribe((CLAIMS,) if subject.identity is None else (CLAIMS, topics.coordinator_keys(device))))
    for effect in rights.begin(time.monotonic()):
        link.perform(effect)  # type: ignore[arg-type]  # rights only say and listen
    until_s = time.monotonic() + LISTEN_S
    while time.monotonic() < until_s and not (leads and rights.over(time.monotonic())):
        for event in link.poll(0.2):
            if isinstance(event, Received) and event.topic.endswith("/claim") and event.payload:
                leads.add(event.topic.split("/")[2])
            deaf = deaf or _is_strange(subject, event)
            for effect in rights.step(event, time.monotonic()):
                link.perform(effect)  # type: ignore[arg-type]
        for effect in rights.step(None, time.monotonic()):
            link.perform(effect)  # type: ignore[arg-type]
    tell(rights.finding())
    if deaf:
        tell(_deaf(subject))
    elif leads:
        tell(Finding(_BROKER[2], "ok", f"a gateway leads {', '.join(sorted(leads))}"))
    else:
        cure = "start `regrow serve`, or compare the broker's access rules with docs/deploy.md"
        tell(Finding(_BROKER[2], "warn", f"no gateway was heard in {LISTEN_S:g} s", cure))


def _is_strange(subject: Subject, event: Event) -> bool:
    """Whether this is the coordinator's word on its keys, sealed by one that the device does not know."""
    keys_topic = topics.coordinator_keys(subject.device)
    if subject.identity is None or not isinstance(event, Received) or event.topic != keys_topic or not event.payload:
        return False
    try:
        open_seal(keys_topic, event.payload, Identity.look(subject.identity).coordinator_keys, verify)
    except SealError as error:
        return error.kind == UNKNOWN_KEY
    return False


def _deaf(subject: Subject) -> Finding:
    said = "this device hears nothing that the gateway says: it does not know the key, and was off when the fleet changed it"
    return Finding(_BROKER[2], "fail", said, new_claim(subject.device, subject.identity or "DIR"))


def _by_health(state: Path, subject: Subject, tell: Tell) -> None:
    """What the running agent last wrote of itself."""
    fields: dict[str, object] = {}
    with suppress(OSError, ValueError):
        fields = dict(json.loads((state / HEALTH).read_bytes()))
    written_s, connected_s, started_s = (fields.get(name) for name in ("written_s", "connected_s", "started_s"))
    ask = "ask through the gateway: regrow doctor --device NAME"
    if fields.get("boot") != boot_id() or not isinstance(written_s, float) or time.monotonic() - written_s > FRESH_S:
        cure = "its loop may be stuck: `systemctl status regrow-agent` and its log"
        tell(Finding(_BROKER[0], "warn", "an agent runs, but has not written its health for minutes", cure))
    elif isinstance(connected_s, float) and time.monotonic() - connected_s < FRESH_S:
        tell(Finding(_BROKER[0], "ok", f"the running agent is connected; it is {fields.get('phase')}"))
    elif connected_s is None and isinstance(started_s, float) and written_s - started_s < WRITE_S:
        tell(Finding(_BROKER[0], "unknown", "an agent has just been started", "it writes its health once a minute: ask again then"))
    else:
        tell(Finding(_BROKER[0], "fail", "the running agent has no connection", "look at the steps of network and tls, and at its log"))
    tell(Finding(_BROKER[1], "unknown", "not tried: it would end the running agent's connection", ask))
    if fields.get("deaf") is True:
        tell(_deaf(subject))
    else:
        tell(Finding(_BROKER[2], "unknown", "not tried: it would end the running agent's connection", ask))
