"""The supervised broker and the embedded amqtt, as real child processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from broker_server.broker import Broker
from broker_server.credentials import Credentials
from broker_server.embedded_broker import UNREAD_LIMIT_BYTES
from regrow.errors import LocalError
from regrow.machine import Publish, Subscribe, Unsubscribe
from tests.broker_server import scenarios
from tests.broker_server.scenarios import DEADLINE_S, Rig, connect_raw, in_every_scenario, rig_on

rig = rig_on("amqtt")


@in_every_scenario
def test_scenario(rig: Rig, scenario: Callable[[Rig], None]) -> None:
    scenario(rig)


def test_ten_devices_fetch_retained_chunks(rig: Rig) -> None:
    scenarios.ten_devices_fetch_retained_chunks(rig, chunks=40, chunk_bytes=64 * 1024)


def test_another_client_id_than_the_user_is_refused(rig: Rig) -> None:
    sock, code = connect_raw(rig, "coordinator", "d4", rig.credentials.password("d4"))
    sock.close()
    assert code == 5


def test_a_foreign_will_is_refused_at_once(rig: Rig) -> None:
    sock, code = connect_raw(rig, "d3", "d3", rig.credentials.password("d3"), will=("regrow/v1/t/claim", b"mine"))
    sock.close()
    assert code == 5


def closed_within(sock: socket.socket, seconds: float) -> bool:
    sock.settimeout(seconds)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_a_packet_over_the_limit_ends_the_connection(rig: Rig) -> None:
    sock, code = connect_raw(rig, "d5", "d5", rig.credentials.password("d5"))
    assert code == 0
    sock.sendall(b"\x30\xff\xff\xff\x7f\x00\x1bregrow/v1/device/d5/hello/x")  # announces 256 MiB
    assert closed_within(sock, DEADLINE_S)
    sock.close()


def test_a_packet_over_the_limit_before_connect_ends_the_connection(rig: Rig) -> None:
    sock = socket.create_connection((rig.broker.host, rig.broker.port))
    sock.sendall(b"\x30\xff\xff\xff\x7f" + b"\x00" * 64)
    assert closed_within(sock, DEADLINE_S)
    sock.close()


def test_a_silent_client_is_dropped_after_its_keepalive(rig: Rig) -> None:
    sock, code = connect_raw(rig, "d6", "d6", rig.credentials.password("d6"), keepalive_s=1)
    assert code == 0
    assert closed_within(sock, DEADLINE_S)
    sock.close()


def test_a_client_that_does_not_read_is_cut_off(rig: Rig) -> None:
    sock, code = connect_raw(rig, "d7", "d7", rig.credentials.password("d7"))
    assert code == 0
    topic = b"regrow/v1/t/r/chunk/1/0"
    sock.sendall(b"\x82" + bytes((5 + len(topic),)) + b"\x00\x01" + struct.pack("!H", len(topic)) + topic + b"\x01")
    assert len(sock.recv(5)) == 5
    chunk = bytes(256 * 1024)
    rig.bus.perform(Unsubscribe(("regrow/v1/#",)))
    rig.publish(*(Publish(topic.decode(), chunk) for _ in range(UNREAD_LIMIT_BYTES // len(chunk) + 64)))
    rig.bus.perform(Subscribe(("regrow/v1/#",)))
    rig.flush()
    sock.settimeout(DEADLINE_S)
    read_bytes = 0
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 20):
            read_bytes += len(part)
    sock.close()
    assert read_bytes < UNREAD_LIMIT_BYTES
    assert "wait for it" in rig.broker.log_path.read_text()


def test_bytes_that_are_not_mqtt_leave_the_broker_standing(rig: Rig) -> None:
    rig.flush()
    for garbage in (b"", b"\x10", b"GET / HTTP/1.1\r\n\r\n", b"\x10\x02\x00\x04", b"\x00" * 100, b"\xff" * 100):
        sock = socket.create_connection((rig.broker.host, rig.broker.port))
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        assert closed_within(sock, DEADLINE_S), garbage
        sock.close()
    assert rig.flush() == []


def test_secrets_and_log_are_private_and_the_log_is_quiet(rig: Rig) -> None:
    for path in rig.broker.log_path.parent.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
        text = path.read_text()
        assert not any(rig.credentials.password(device) in text for device in rig.credentials.devices()), path
    assert "Traceback" not in rig.broker.log_path.read_text()


def test_a_killed_broker_comes_back(rig: Rig) -> None:
    scenarios.a_killed_broker_comes_back(rig)


def gone_within(pid: int, seconds: float) -> bool:
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=seconds)
    return bool(gone) or not psutil.pid_exists(pid)


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from broker_server.broker import Broker\nfrom broker_server.credentials import Credentials\n"
        "home = Path(sys.argv[1])\nbroker = Broker(home / 'b', Credentials(home / 'c'), kind='amqtt')\n"
        "broker.start()\nprint(broker.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    assert psutil.pid_exists(child_pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone_within(child_pid, DEADLINE_S)


def test_stop_ends_the_child_and_start_works_again(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "b", Credentials(tmp_path / "c"), kind="amqtt")
    broker.start()
    pid, port = broker.pid, broker.port
    with pytest.raises(LocalError, match="running already"):
        broker.start()
    broker.stop()
    assert pid is not None
    assert gone_within(pid, DEADLINE_S)
    assert broker.poll() is None
    broker.stop()
    broker.start()
    assert broker.port == port
    broker.stop()


def test_a_port_in_use_says_so_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        broker = Broker(tmp_path / "b", Credentials(tmp_path / "c"), kind="amqtt", port=taken.getsockname()[1])
        with pytest.raises(LocalError, match=r"cannot listen on .*: Address already in use; stop what listens there"):
            broker.start()
    assert broker.pid is None


def test_a_broker_that_lets_anybody_in_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        broker = Broker(tmp_path / "b", Credentials(tmp_path / "c"), kind="amqtt", port=stranger.getsockname()[1])
        monkeypatch.setattr(broker, "_check_address", lambda *_: None)  # as if it had come just after the check

        def welcome() -> None:
            sock, _ = stranger.accept()
            sock.recv(100)
            sock.sendall(b"\x20\x02\x00\x00")
            sock.close()

        thread = threading.Thread(target=welcome, daemon=True)
        thread.start()
        with pytest.raises(LocalError, match="lets anybody in"):
            broker.start()
        thread.join()


def test_backoff_grows_while_the_broker_keeps_dying(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "b", Credentials(tmp_path / "c"), kind="amqtt")
    broker.start()
    waits = []
    until_s = time.monotonic() + 2 * DEADLINE_S
    while len(waits) < 2 and time.monotonic() < until_s:
        if broker.pid is not None and broker.restarts == len(waits):
            os.kill(broker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, broker.pid, os.WEXITED | os.WNOWAIT)
        message = broker.poll()
        if message and "next start in" in message:
            waits.append(float(message.split("next start in ")[1].split(" s")[0]))
    broker.stop()
    assert 0.2 <= waits[0] <= 0.5 <= waits[1] <= 1.0


def test_the_embedded_broker_does_not_listen_beyond_loopback_without_tls(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "gateway.local", ""):
        with pytest.raises(LocalError, match="passwords travel in the clear"):
            Broker(tmp_path / "b", Credentials(tmp_path / "c"), kind="amqtt", host=host)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        Broker(tmp_path / "b", Credentials(tmp_path / "c"), kind="amqtt", host=host)
