"""The broker as a supervised child process: mosquitto where it is installed, the embedded amqtt elsewhere.

Strategy: everything is configured explicitly and nothing is persistent: the coordinator republishes what is live,
whatever became of the broker. Ready means that a real MQTT connection without a password was answered, and refused.

With a fleet there are two listeners: one on loopback, for the coordinator and its password, and the fleet's door, where devices show a
certificate. Putting a device out takes three things, found by trial with mosquitto 2.0.11: SIGHUP makes it read the new list of revoked
certificates, but for new connections only; the access list, read at the same moment, leaves a live session without any topic; and
connecting once with the device's client id from the loopback listener ends that session, and no other. Restarting the broker would end
everybody's; the dynamic security plugin would be a second place to keep rights. TLS sessions must not be resumed, for a resumed one
is not held against the list; mosquitto has no setting for it, but its OpenSSL reads one.
"""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from broker_server.credentials import COORDINATOR, BrokerFiles, Credentials
from broker_server.durable import write_private
from broker_server.fleet.registry import Registry
from broker_server.stopping import ending_with_parent
from regrow.errors import LocalError

Kind = Literal["mosquitto", "amqtt"]

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0
BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 30.0
STABLE_S = 30.0
MESSAGE_LIMIT_BYTES = 1024 * 1024  # a chunk is at most 256 KiB
MAX_CONNECTIONS = 2000
MEMORY_BYTES = 1024 * 1024 * 1024
FULL = 0.95  # of it: whoever connects then is let in and thrown out, the coordinator too, so nobody could clear it
_NO_RESUMPTION = """openssl_conf = all
[all]
ssl_conf = ssl
[ssl]
system_default = server
[server]
NumTickets = 0
Options = -SessionTicket
"""
_EXPOSED = (
    "this would let passwords travel in the clear: beyond loopback, the embedded amqtt and the coordinator's own listener are not to be "
    "reached without TLS; `regrow fleet init NAME` makes a fleet with certificates (and mosquitto is the broker for real use)"
)
LOG_BYTES = 1_000_000
# An anonymous CONNECT (MQTT 3.1.1, clean session, client id "r"); the answer must be a CONNACK that refuses it.
_PROBE = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x0a\x00\x01r"


def find_mosquitto() -> str | None:
    """Path of the mosquitto on this machine; Debian keeps it in /usr/sbin, which is not on every user's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/local/sbin:/usr/sbin:/usr/local/bin")


@dataclass(frozen=True, slots=True)
class Door:
    """Where the devices of a fleet come in, by TLS. registry: who they are; the broker's certificate lies in its folder."""

    registry: Registry
    host: str
    port: int


class Broker:
    """A broker child: start() waits until it serves, poll() restarts it when it died, stop() ends it.

    Call start() and poll() from a thread that lives as long as the broker shall: Linux ends the child with that thread.

    Args:
        home: folder for its configuration, hashes and log; made when missing.
        credentials: rendered into home at every start and reload.
        host: address to listen on; loopback unless told otherwise.
        port: 0 = a free one, which a restart keeps.
        kind: "mosquitto", "amqtt", or None = mosquitto where it is installed.
        door: of a fleet; host must then be a loopback address.

    Raises:
        LocalError: kind is "mosquitto" and there is none; passwords would travel in the clear where that is not to be.
    """

    def __init__(
        self,
        home: Path,
        credentials: Credentials,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        kind: Kind | None = None,
        door: Door | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.kind: Kind = kind or ("mosquitto" if find_mosquitto() else "amqtt")
        if self.kind == "mosquitto" and find_mosquitto() is None:
            raise LocalError("mosquitto is not installed; install it (Debian: apt install mosquitto) or use amqtt")
        if not _is_loopback(host) and (door is not None or self.kind == "amqtt"):
            raise LocalError(_EXPOSED)
        self.host, self.port, self.door = host, port, door
        self.log_path = home / "broker.log"
        self.restarts = 0
        self._home, self._credentials = home, credentials
        self._rng = rng or random.Random()
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at_s = 0.0
        self._backoff_s = BACKOFF_MIN_S
        self._retry_at_s: float | None = None

    @property
    def url(self) -> str:
        """Where clients on this machine connect."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"mqtt://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start the child and wait until it answers.

        Raises:
            LocalError: it ended, or did not answer in time; the message holds the end of its log.
        """
        if self._child is not None:
            raise LocalError("this broker is running already")
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.port = self.port or _free_port(self.host)
        if self.door is not None and not self.door.port:
            self.door = replace(self.door, port=_free_port(self.door.host))
        for host, port in ((self.host, self.port), *([(self.door.host, self.door.port)] if self.door is not None else [])):
            self._check_address(host, port)
        self._spawn()
        deadline_s = time.monotonic() + START_TIMEOUT_S
        try:
            while not self._answers():
                if self._child is None or self._child.poll() is not None:
                    raise LocalError(f"{self.kind} ended at once on {self.host}:{self.port}\n{self._log_tail()}")
                if time.monotonic() >= deadline_s:
                    raise LocalError(f"{self.kind} did not answer in {START_TIMEOUT_S:g} s\n{self._log_tail()}")
                time.sleep(0.02)
        except LocalError:
            self.stop()
            raise

    def _check_address(self, host: str, port: int) -> None:
        """Raise LocalError while the reason is plain; the broker's own log buries it."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            cure = "stop what listens there, or choose another --port (0 picks a free one) or --host"
            raise LocalError(f"cannot listen on {host}:{port}: {error.strerror}; {cure}") from error

    def poll(self) -> str | None:
        """Look after the child without waiting, about once a second; returns what happened, for the log, or None."""
        now = time.monotonic()
        self._bound_log()
        if self._child is None:
            if self._retry_at_s is None or now < self._retry_at_s:
                return None
            self._retry_at_s = None
            self.restarts += 1
            self._spawn()
            return f"{self.kind} started again"
        code = self._child.poll()
        if code is None:
            return self._end_if_full()
        self._child = None
        if now - self._started_at_s >= STABLE_S:
            self._backoff_s = BACKOFF_MIN_S
        wait_s = self._rng.uniform(0.5, 1.0) * self._backoff_s
        self._backoff_s = min(BACKOFF_MAX_S, 2 * self._backoff_s)
        self._retry_at_s = now + wait_s
        return f"{self.kind} ended with code {code}; next start in {wait_s:.1f} s\n{self._log_tail()}"

    def _end_if_full(self) -> str | None:
        """Let a mosquitto start anew that has no memory left; what is live is published again, and nothing else is worth keeping."""
        if self.kind != "mosquitto" or self._child is None:
            return None
        with contextlib.suppress(psutil.Error):
            held_bytes = psutil.Process(self._child.pid).memory_info().rss
            if held_bytes > FULL * MEMORY_BYTES:
                self._child.kill()  # it keeps nothing that an orderly end would save
                self._child.wait()
                return f"mosquitto holds {held_bytes // 2**20} MiB, nearly all that it may, so nobody can stay: it is started again, empty"
        return None

    def stop(self) -> None:
        """End the child: SIGTERM, and SIGKILL if it does not listen; does nothing when there is none."""
        child, self._child, self._retry_at_s = self._child, None, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def reload(self, credentials: Credentials | None = None) -> None:
        """Make the credentials (new ones, when given) the broker's; connections of removed devices end."""
        self._credentials = credentials or self._credentials
        self._render()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGHUP)

    def end_session(self, device: str) -> bool:
        """End a device's live connection, after `reload`, and nobody else's. False: try again later, nothing answers.

        The broker takes a client id's newer connection for the older one; amqtt looks through its connections at a reload.
        """
        if self.kind == "amqtt":
            return True
        texts = (device.encode(), COORDINATOR.encode(), self._credentials.coordinator_password.encode())
        body = b"\x00\x04MQTT\x04\xc2\x00\x0a" + b"".join(len(text).to_bytes(2, "big") + text for text in texts)
        with contextlib.suppress(OSError), socket.create_connection(self._local_address(), timeout=1.0) as sock:
            sock.sendall(b"\x10" + bytes((len(body) & 127 | 128, len(body) >> 7)) + body)
            answer = sock.recv(4)
            sock.sendall(b"\xe0\x00")
            return answer == b"\x20\x02\x00\x00"
        return False

    def _render(self) -> BrokerFiles:
        if self.door is None:
            return self._credentials.render(self._home)
        # Not those who have only a claim: they are in a moment before the next reload.
        denied = [name for name, device in self.door.registry.devices().items() if device.state in ("revoked", "wiped")]
        return self._credentials.render(self._home, passwords=self.kind == "amqtt", denied=denied)

    def _spawn(self) -> None:
        files = self._render()
        environment = dict(os.environ)
        if self.kind == "mosquitto":
            config = self._home / "mosquitto.conf"
            write_private(config, mosquitto_config(self, files.passwords, files.access).encode())
            if self.door is not None:
                write_private(self._home / "openssl.cnf", _NO_RESUMPTION.encode())
                environment["OPENSSL_CONF"] = str(self._home / "openssl.cnf")
            command = [str(find_mosquitto()), "-c", str(config)]
        else:
            config = self._home / "embedded.json"
            settings = {
                "host": self.host,
                "port": self.port,
                "users": str(files.embedded),
                "log": str(self.log_path),
                "message_limit_bytes": MESSAGE_LIMIT_BYTES,
                "max_connections": MAX_CONNECTIONS,
                **({} if self.door is None else {"door": _embedded_door(self.door)}),
            }
            write_private(config, json.dumps(settings, indent=1).encode())
            command = [sys.executable, "-m", "broker_server.embedded_broker", str(config)]
        rooms = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (rooms, environment.get("PYTHONPATH"))))
        with self.log_path.open("ab") as output:
            self.log_path.chmod(0o600)
            self._child = subprocess.Popen(
                ending_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                process_group=0,  # Ctrl-C at a terminal is for us: an orderly end needs the broker longer
            )
        self._started_at_s = time.monotonic()

    def _answers(self) -> bool:
        """Whether an MQTT broker is there that turns an anonymous client away."""
        with contextlib.suppress(OSError), socket.create_connection(self._local_address(), timeout=1.0) as sock:
            sock.sendall(_PROBE)
            answer = sock.recv(4)
            if answer[:1] == b"\x20" and answer[3:4] == b"\x00":
                raise LocalError(f"the broker on port {self.port} lets anybody in; is another one running there?")
            return answer[:1] == b"\x20" and len(answer) == 4
        return False

    def _local_address(self) -> tuple[str, int]:
        return self.url.removeprefix("mqtt://").rsplit(":", 1)[0].strip("[]"), self.port

    def _bound_log(self) -> None:
        """Empty mosquitto's log when it is too long: it appends, and whoever fails to log in makes it write a line."""
        with contextlib.suppress(OSError):
            if self.log_path.stat().st_size > LOG_BYTES:
                os.truncate(self.log_path, 0)

    def _log_tail(self) -> str:
        try:
            tail = self.log_path.read_text(errors="replace").splitlines()[-15:]
        except OSError as err:
            return f"(its log cannot be read: {err})"
        return f"{self.log_path} ends with:\n" + "\n".join(f"    {line}" for line in tail)


def mosquitto_config(broker: Broker, passwords: Path, access: Path) -> str:
    """What mosquitto is told to be this broker."""
    lines = [
        "per_listener_settings false",
        "allow_anonymous false",
        f"password_file {passwords}",
        f"acl_file {access}",
        "persistence false",
        "retain_available true",
        "set_tcp_nodelay true",
        f"max_packet_size {MESSAGE_LIMIT_BYTES + 4096}",  # refused before it is read into memory
        "max_inflight_messages 200",
        "max_queued_messages 20000",  # the default, 1000, drops silently
        f"max_queued_bytes {256 * 1024 * 1024}",  # per client
        "queue_qos0_messages false",
        f"memory_limit {MEMORY_BYTES}",
        "sys_interval 0",
        f"log_dest file {broker.log_path}",
        "log_type error",
        "log_type warning",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        "connection_messages false",
        f"listener {broker.port} {broker.host}",
        f"max_connections {MAX_CONNECTIONS}",
        # So a device cannot push another one out by taking its client id. With a fleet nobody but the coordinator is on this listener,
        # and it may: that is how it ends a session.
        f"use_username_as_clientid {'true' if broker.door is None else 'false'}",
    ]
    if broker.door is not None:
        lines += _mosquitto_door(broker.door)
    if os.geteuid() == 0:  # else mosquitto becomes the user `mosquitto`, who cannot read these files
        lines.append(f"user {getpass.getuser()}")
    return "\n".join(lines) + "\n"


def _mosquitto_door(door: Door) -> list[str]:
    folder = door.registry.folder.resolve()
    return [
        f"listener {door.port} {door.host}",
        f"max_connections {MAX_CONNECTIONS}",
        f"cafile {folder / 'ca.crt'}",
        f"certfile {folder / 'broker.crt'}",
        f"keyfile {folder / 'broker.key'}",
        f"crlfile {folder / 'crl.pem'}",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "tls_version tlsv1.2",  # at least
    ]


def _embedded_door(door: Door) -> dict[str, object]:
    return {"host": door.host, "port": door.port, "fleet": str(door.registry.folder.resolve())}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])
