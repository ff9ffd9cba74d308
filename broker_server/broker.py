"""The broker as a supervised child process: mosquitto where it is installed, the embedded amqtt elsewhere.

Strategy: everything is configured explicitly and nothing is persistent: the coordinator republishes what is live,
whatever became of the broker. Ready means that a real MQTT connection without a password was answered, and refused.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from broker_server.credentials import Credentials, write_private
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
LOG_BYTES = 1_000_000
# An anonymous CONNECT (MQTT 3.1.1, clean session, client id "r"); the answer must be a CONNACK that refuses it.
_PROBE = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x0a\x00\x01r"


def find_mosquitto() -> str | None:
    """Path of the mosquitto on this machine; Debian keeps it in /usr/sbin, which is not on every user's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/local/sbin:/usr/sbin:/usr/local/bin")


class Broker:
    """A broker child: start() waits until it serves, poll() restarts it when it died, stop() ends it.

    Call start() and poll() from a thread that lives as long as the broker shall: Linux ends the child with that thread.

    Args:
        home: folder for its configuration, hashes and log; made when missing.
        credentials: rendered into home at every start and reload.
        host: address to listen on; loopback unless told otherwise.
        port: 0 = a free one, which a restart keeps.
        kind: "mosquitto", "amqtt", or None = mosquitto where it is installed.

    Raises:
        LocalError: kind is "mosquitto" and there is none.
    """

    def __init__(
        self,
        home: Path,
        credentials: Credentials,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        kind: Kind | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.kind: Kind = kind or ("mosquitto" if find_mosquitto() else "amqtt")
        if self.kind == "mosquitto" and find_mosquitto() is None:
            raise LocalError("mosquitto is not installed; install it (Debian: apt install mosquitto) or use amqtt")
        self.host, self.port = host, port
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
        self._check_address()
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

    def _check_address(self) -> None:
        """Raise LocalError while the reason is plain; the broker's own log buries it."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.host, self.port))
        except OSError as error:
            cure = "stop what listens there, or choose another --port (0 picks a free one) or --host"
            raise LocalError(f"cannot listen on {self.host}:{self.port}: {error.strerror}; {cure}") from error

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
            return None
        self._child = None
        if now - self._started_at_s >= STABLE_S:
            self._backoff_s = BACKOFF_MIN_S
        wait_s = self._rng.uniform(0.5, 1.0) * self._backoff_s
        self._backoff_s = min(BACKOFF_MAX_S, 2 * self._backoff_s)
        self._retry_at_s = now + wait_s
        return f"{self.kind} ended with code {code}; next start in {wait_s:.1f} s\n{self._log_tail()}"

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
        self._credentials.render(self._home)
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGHUP)

    def _spawn(self) -> None:
        files = self._credentials.render(self._home)
        if self.kind == "mosquitto":
            config = self._home / "mosquitto.conf"
            write_private(config, _mosquitto_config(self, files.passwords, files.access).encode())
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
            }
            write_private(config, json.dumps(settings, indent=1).encode())
            command = [sys.executable, "-m", "broker_server.embedded_broker", str(config)]
        environment = dict(os.environ)
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
            )
        self._started_at_s = time.monotonic()

    def _answers(self) -> bool:
        """Whether an MQTT broker is there that turns an anonymous client away."""
        host = self.url.removeprefix("mqtt://").rsplit(":", 1)[0].strip("[]")
        with contextlib.suppress(OSError), socket.create_connection((host, self.port), timeout=1.0) as sock:
            sock.sendall(_PROBE)
            answer = sock.recv(4)
            if answer[:1] == b"\x20" and answer[3:4] == b"\x00":
                raise LocalError(f"the broker on port {self.port} lets anybody in; is another one running there?")
            return answer[:1] == b"\x20" and len(answer) == 4
        return False

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


def _mosquitto_config(broker: Broker, passwords: Path, access: Path) -> str:
    lines = [
        "per_listener_settings false",
        f"listener {broker.port} {broker.host}",
        "allow_anonymous false",
        f"password_file {passwords}",
        f"acl_file {access}",
        "use_username_as_clientid true",  # so a device cannot push another one out by taking its client id
        "persistence false",
        "retain_available true",
        "set_tcp_nodelay true",
        f"max_connections {MAX_CONNECTIONS}",
        f"max_packet_size {MESSAGE_LIMIT_BYTES + 4096}",  # refused before it is read into memory
        "max_inflight_messages 200",
        "max_queued_messages 20000",  # the default, 1000, drops silently
        f"max_queued_bytes {256 * 1024 * 1024}",  # per client
        "queue_qos0_messages false",
        f"memory_limit {1024 * 1024 * 1024}",
        "sys_interval 0",
        f"log_dest file {broker.log_path}",
        "log_type error",
        "log_type warning",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        "connection_messages false",
    ]
    if os.geteuid() == 0:  # else mosquitto becomes the user `mosquitto`, who cannot read these files
        lines.append(f"user {getpass.getuser()}")
    return "\n".join(lines) + "\n"


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])
