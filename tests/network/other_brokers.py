"""Brokers that are not ours, as children on free loopback ports, with everything in one folder: RabbitMQ's MQTT plugin, and NATS.

Each lets the coordinator and two devices in, with the access list of `broker_server.credentials` as far as that broker can say it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from broker_server.credentials import COORDINATOR, COORDINATOR_TOPICS, DEVICE_READS, DEVICE_WRITES, Credentials
from tests.testbed.processes import until

START_S = 90.0
RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"
PAYLOAD_BYTES = 1024 * 1024


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        found = [held.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in found]


@contextmanager
def child(command: Sequence[str], home: Path, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block, and whatever it has started with it."""
    with (home / f"{Path(command[0]).name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=home, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def answers(port: int, process: subprocess.Popen[bytes], home: Path) -> None:
    """Wait until it listens."""

    def listens() -> bool:
        assert process.poll() is None, "\n".join(file.read_text(errors="replace")[-3000:] for file in home.rglob("*.log"))
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    until(listens, f"a listener on port {port}", START_S)


# ---- RabbitMQ ------------------------------------------------------------------------------------------------------------------------


@contextmanager
def rabbitmq(home: Path, credentials: Credentials) -> Iterator[int]:
    """The port of a RabbitMQ node with the MQTT plugin."""
    mqtt, dist, epmd = free_ports(3)
    users = {COORDINATOR: credentials.coordinator_password, **{name: credentials.password(name) for name in credentials.devices()}}
    (home / "definitions.json").write_text(json.dumps(rabbitmq_definitions(users)))
    settings = {
        "listeners.tcp": "none",
        "mqtt.listeners.tcp.default": f"127.0.0.1:{mqtt}",
        "mqtt.allow_anonymous": "false",
        "load_definitions": str(home / "definitions.json"),
        "log.file": str(home / "rabbit.log"),
        "log.file.level": "warning",
    }
    (home / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    (home / "plugins").write_text("[rabbitmq_mqtt].\n")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))},
        "HOME": str(home),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd),
        "RABBITMQ_NODENAME": "regrow@localhost",
        "RABBITMQ_DIST_PORT": str(dist),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": str(home / "none"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
        "RABBITMQ_PID_FILE": str(home / "pid"),
    }
    with child([str(shutil.which("epmd"))], home, environment) as names:
        answers(epmd, names, home)
        with child([RABBITMQ], home, environment) as node:
            answers(mqtt, node, home)
            yield mqtt


def rabbitmq_definitions(users: dict[str, str]) -> dict[str, object]:
    """Users, and who may use which topics: RabbitMQ checks the routing key, where `.` stands for `/`."""
    devices = [{"user": name, "read": DEVICE_READS, "write": DEVICE_WRITES} for name in users if name != COORDINATOR]
    rules = [{"user": COORDINATOR, "read": COORDINATOR_TOPICS, "write": COORDINATOR_TOPICS}, *devices]
    return {
        "vhosts": [{"name": "/"}],
        "users": [{"name": name, "password": password, "tags": ""} for name, password in users.items()],
        "permissions": [{"user": name, "vhost": "/", "configure": "^mqtt-subscription-", "write": ".*", "read": ".*"} for name in users],
        "topic_permissions": [
            {"user": rule["user"], "vhost": "/", "exchange": "amq.topic"}
            | {right: _patterns(rule[right], str(rule["user"])) for right in ("read", "write")}  # type: ignore[arg-type]
            for rule in rules
        ],
    }


def _patterns(rules: Sequence[str], user: str) -> str:
    def pattern(rule: str) -> str:
        parts = ["[^.]+" if part == "+" else re.escape(user if part == "%u" else part) for part in rule.removesuffix("/#").split("/")]
        return r"\.".join(parts) + (r"(\..*)?" if rule.endswith("/#") else "")

    return f"^({'|'.join(pattern(rule) for rule in rules)})$"


# ---- NATS ----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def nats(home: Path, credentials: Credentials) -> Iterator[int]:
    """The port of a NATS server that speaks MQTT."""
    mqtt, own = free_ports(2)
    users = {COORDINATOR: credentials.coordinator_password, **{name: credentials.password(name) for name in credentials.devices()}}
    rules = {name: (COORDINATOR_TOPICS, COORDINATOR_TOPICS) if name == COORDINATOR else (DEVICE_WRITES, DEVICE_READS) for name in users}
    config = {
        "listen": f"127.0.0.1:{own}",
        "server_name": "regrow",
        "max_payload": 2 * PAYLOAD_BYTES,
        "jetstream": {"store_dir": str(home / "jetstream")},
        "mqtt": {"listen": f"127.0.0.1:{mqtt}", "max_ack_pending": 100},  # x 655 subscriptions; its own default is x 63
        "authorization": {
            "users": [
                {
                    "user": name,
                    "password": password,
                    "permissions": {
                        "publish": [subject for rule in rules[name][0] for subject in nats_subjects(rule, name)],
                        "subscribe": [subject for rule in rules[name][1] for subject in nats_subjects(rule, name)] + ["$MQTT.sub.>"],
                    },
                }
                for name, password in users.items()
            ]
        },
    }
    (home / "nats.conf").write_text(json.dumps(config, indent=1))
    with child([str(shutil.which("nats-server") or "/usr/sbin/nats-server"), "-c", str(home / "nats.conf")], home) as server:
        answers(mqtt, server, home)
        yield mqtt


def nats_subjects(rule: str, user: str) -> list[str]:
    """The subjects of a rule; `#` matches the topic above it, too, and NATS's `>` does not."""
    parts = [{"+": "*", "%u": user}.get(part, part) for part in rule.split("/")]
    return [".".join(parts)] if parts[-1] != "#" else [".".join(parts[:-1]), ".".join([*parts[:-1], ">"])]


BROKERS: dict[str, Callable[[Path, Credentials], object]] = {"rabbitmq": rabbitmq, "nats": nats}
