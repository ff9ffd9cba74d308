"""What is asked of a gateway beside what is asked of any machine: its secrets, its broker, its runs, and who leads them."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import secrets
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path

from broker_server.broker import _PROBE
from broker_server.credentials import COORDINATOR, Credentials, check_password
from broker_server.fleet.registry import MEMBERS, Registry
from broker_server.runs import list_runs
from broker_server.transport import MqttBus
from broker_server.vitals import HEALTH
from regrow.broker_url import BrokerAddress, parse_broker_url
from regrow.errors import LocalError
from regrow.findings import Finding
from regrow.machine import Connected, Disconnected, Event, Publish, Received, Subscribe

FRESH_S = 45.0
ANSWER_S = 8.0
ECHO = "regrow/v1/doctor/echo/gateway"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def access(home: Path, fleet: Path) -> Finding:
    """Whether the secrets check out, and what the broker was given is made from them.

    Args:
        home: of the gateway.
        fleet: folder of the fleet, if there is one.
    """
    name = "gateway.access"
    if not (home / "credentials.json").exists():
        return Finding(name, "unknown", f"{home} holds no passwords of devices", "name the gateway's folder: --runs")
    try:
        credentials = Credentials(home)
    except LocalError as error:
        return Finding(name, "fail", str(error), "restore it from a backup")
    except PermissionError:
        return Finding(name, "unknown", f"this user may not read {home}", "ask as the user of the service")
    devices = credentials.devices()
    try:
        hashes = dict(json.loads((home / "users.json").read_bytes()))
    except (OSError, ValueError):
        return Finding(name, "ok", f"{len(devices)} devices have passwords{_members(fleet)}; no broker of ours has run yet")
    wanted = {COORDINATOR: credentials.coordinator_password, **{device: credentials.password(device) for device in devices}}
    stale = [user for user, password in wanted.items() if not check_password(password, str(hashes.get(user, "")))]
    stale += sorted(hashes.keys() - wanted.keys())
    if stale:
        cure = "a running gateway takes them over within a second; is it running, as the same user?"
        return Finding(name, "warn", f"the broker does not know the passwords as they are now of {', '.join(stale[:5])}", cure)
    return Finding(name, "ok", f"{len(devices)} devices have passwords{_members(fleet)}")


def _members(fleet: Path) -> str:
    if not fleet.is_dir():
        return ""
    devices = Registry(fleet).devices().values()
    return f", {sum(device.state in MEMBERS for device in devices)} of {len(devices)} in the fleet may connect"


def devices(fleet: Path) -> Finding:
    """Whether every device of the fleet believes what the gateway says. fleet: its folder."""
    from broker_server.fleet import coordinator_key  # which needs cryptography, as only a fleet does

    name, registry = "gateway.devices", Registry(fleet)
    members = {device: known for device, known in registry.devices().items() if known.state in MEMBERS}
    missed = coordinator_key.missed(registry.fleet(), members)
    if missed:
        said = f"{', '.join(missed)} missed the change of the coordinator's key and cannot hear the gateway any more"
        return Finding(name, "warn", said, "`regrow fleet list` says the commands that let each in anew")
    return Finding(name, "ok", "every device of the fleet knows the coordinator's key")


def listener_of(home: Path) -> BrokerAddress | None:
    """Where the broker listens that we last started; None without one."""
    found: dict[float, tuple[str, int]] = {}
    with suppress(OSError, ValueError, IndexError):
        line = next(line for line in (home / "mosquitto.conf").read_text().splitlines() if line.startswith("listener "))
        found[(home / "mosquitto.conf").stat().st_mtime] = (line.split()[2], int(line.split()[1]))
    with suppress(OSError, ValueError, KeyError, TypeError):
        fields = json.loads((home / "embedded.json").read_bytes())
        found[(home / "embedded.json").stat().st_mtime] = (str(fields["host"]), int(fields["port"]))
    if not found:
        return None
    host, port = found[max(found)]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return parse_broker_url(f"mqtt://{f'[{host}]' if ':' in host else host}:{port}")


def answers(address: BrokerAddress) -> Finding:
    """Whether a broker is there that turns strangers away."""
    name, where = "broker.answers", f"{address.host}:{address.port}"
    try:
        with socket.create_connection((address.host, address.port), timeout=3.0) as sock:
            if not address.tls:
                refused = anonymous_is_refused(sock)
            else:
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whose it is, another check says
                with context.wrap_socket(sock) as wrapped:
                    refused = anonymous_is_refused(wrapped)
    except ssl.SSLError:
        return Finding(name, "ok", f"{where} speaks TLS and turns away who shows no certificate")
    except OSError as error:
        cure = "is the gateway running? `systemctl status regrow-gateway`; its broker's log is broker.log beside the secrets"
        return Finding(name, "fail", f"{where}: {error.strerror or error}", cure)
    if refused is None:
        return Finding(name, "fail", f"what listens on {where} is no MQTT broker", "another program has the port: choose another --port")
    if not refused:
        return Finding(name, "fail", f"the broker on {where} lets anybody in", "forbid anonymous users there: docs/deploy.md")
    return Finding(name, "ok", f"{where} answers, and turns strangers away")


def anonymous_is_refused(sock: socket.socket) -> bool | None:
    """Say a CONNECT without a name; None if no MQTT broker answers it."""
    sock.sendall(_PROBE)
    answer = sock.recv(4)
    return None if answer[:1] != b"\x20" or len(answer) < 4 else answer[3] != 0


def rights(url: str, runs: Path) -> Finding:
    """Log in as the coordinator and hear what it says; not while a gateway runs, whose connection that would end."""
    name, address = "broker.rights", parse_broker_url(url)
    if served_runs(runs):
        return Finding(name, "unknown", "not tried: it would end the running gateway's connection", "gateway.coordinator says how that is")
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    user, password, word = address.username or "", address.password or "", secrets.token_bytes(16)
    bus = MqttBus(url, client_id=user, username=user, password=password, on_event=events.put)
    bus.start()
    until_s = time.monotonic() + ANSWER_S
    try:
        while (left_s := until_s - time.monotonic()) > 0:
            with suppress(queue.Empty):
                event = events.get(timeout=min(left_s, 1.0))
                if isinstance(event, Disconnected):
                    return Finding(name, "fail", event.reason, "see that the broker runs and knows the coordinator")
                if isinstance(event, Connected):
                    bus.perform(Subscribe((ECHO,)))
                if isinstance(event, Received) and event.payload == word:
                    return Finding(name, "ok", "the coordinator may say and hear")
            bus.perform(Publish(ECHO, word))
    finally:
        bus.close()
    return Finding(name, "fail", "the broker does not deliver what the coordinator says", "its access rules are in docs/deploy.md")


def runs_of(runs: Path) -> Finding:
    """Whether every run can be read."""
    name, found = "gateway.runs", list(list_runs(runs))
    broken = [info.path.name for info in found if info.finished.startswith("unreadable")]
    said = f"{len(found)} runs, {sum(not info.finished for info in found)} unfinished"
    if broken:
        return Finding(name, "fail", f"{said}; unreadable: {', '.join(broken[:3])}", "restore them from a backup, or remove them")
    return Finding(name, "ok" if found else "unknown", said if found else f"no runs in {runs}")


def served_runs(runs: Path) -> list[Path]:
    """The folders of the runs that processes hold; cheap, whatever their logs' size."""
    return [log.parent for log in sorted(runs.glob("*/log.sqlite")) if is_served(log.parent)]


def unfinished(runs: Path) -> list[Path]:
    """The folders of the runs that go on; reads their logs."""
    return [info.path for info in list_runs(runs) if not info.finished]


def coordinator(runs: Path) -> Finding:
    """Whether somebody serves what is unfinished, connected and leading."""
    name, served = "gateway.coordinator", served_runs(runs)
    if not served:
        left = [folder.name for folder in unfinished(runs)]
        if not left:
            return Finding(name, "unknown", "no run is unfinished", "start one: regrow serve TASK")
        return Finding(name, "warn", f"nobody serves {', '.join(left[:3])}", "regrow serve, or start the service")
    for folder in served:
        fields: dict[str, object] = {}
        with suppress(OSError, ValueError):
            fields = dict(json.loads((folder / HEALTH).read_bytes()))
        written_s, connected_s, now = fields.get("written_s"), fields.get("connected_s"), time.monotonic()
        same_boot = not _BOOT_ID.exists() or fields.get("boot") == _BOOT_ID.read_text().strip()
        if not same_boot or not isinstance(written_s, float) or now - written_s > FRESH_S or fields.get("phase") == "stuck":
            cure = "`systemctl status regrow-gateway` and its log say where; restart it"
            return Finding(name, "fail", f"{folder.name} is served by a process that gets nowhere", cure)
        if not isinstance(connected_s, float) or now - connected_s > FRESH_S:
            return Finding(name, "fail", f"who serves {folder.name} has no connection to the broker", "look at broker.answers, and its log")
        if fields.get("phase") != "leading":
            cure = "another gateway leads this task, or the broker is full or unwell and throws it out: its log, and broker.log, say which"
            return Finding(name, "warn", f"who serves {folder.name} is {fields.get('phase')}", cure)
    return Finding(name, "ok", f"connected and leading: {', '.join(folder.name for folder in served)}")


def is_served(run: Path) -> bool:
    """Whether a process holds the run."""
    try:
        descriptor = os.open(run / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
