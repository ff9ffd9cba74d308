"""The checks of a device against trees of files, real sockets and real certificates: each is right, fails for a reason, or says unknown."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.checkup import Checkup
from edge_agent.doctor import checks, host, network, service, training
from edge_agent.doctor.certificates import certificate, dated
from edge_agent.doctor.checks import Check, run_checks
from edge_agent.doctor.device import Subject, live_checks, state_folder
from edge_agent.doctor.rights import LISTEN_S, Rights
from edge_agent.identity import fleet_context
from edge_agent.state import MAGIC, StateFolder
from regrow import topics, wire
from regrow.broker_url import BrokerAddress
from regrow.errors import LocalError
from regrow.findings import CHECK, TEXT_MOST, Finding, bounded, failed, in_words
from regrow.machine import Connected, Publish, Received, Subscribe, Unsubscribe

DAY_S = 86_400.0
NOW_S = 1_780_000_000.0  # 2026


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def told(run: Any, *arguments: Any) -> dict[str, Finding]:
    found: list[Finding] = []
    run(*arguments, found.append)
    return {finding.check: finding for finding in found}


# ---- running ---------------------------------------------------------------------------------------------------------------------------


def test_a_check_that_hangs_or_breaks_is_unknown_and_takes_nobody_along() -> None:
    def half(tell: Any) -> None:
        tell(Finding("b.first", "ok", "found"))
        raise RuntimeError("in the\nmiddle")

    hangs = threading.Event()
    began_s = time.monotonic()
    found = run_checks(
        [
            Check(("a",), lambda _: hangs.wait(), timeout_s=0.3),  # type: ignore[arg-type, return-value]
            Check(("b.first", "b.second"), half),
            Check(("c",), lambda tell: tell(Finding("c", "warn", "x" * 2 * TEXT_MOST))),
        ]
    )
    assert time.monotonic() - began_s < 3
    hangs.set()
    assert [(finding.check, finding.state) for finding in found] == [
        ("a", "unknown"),
        ("b.first", "ok"),
        ("b.second", "unknown"),
        ("c", "warn"),
    ]
    assert "no answer in 0.3 s" in found[0].said
    assert "RuntimeError: in the middle" in found[2].said
    assert len(found[3].said) == TEXT_MOST


def test_what_a_check_says_of_a_fault_is_a_failure_with_its_cure() -> None:
    def refuses(_: Any) -> None:
        raise LocalError("device.key is damaged; ask for a new claim")

    assert run_checks([Check(("a", "b"), refuses)]) == [
        Finding(name, "fail", "device.key is damaged", "ask for a new claim") for name in ("a", "b")
    ]


def test_the_whole_has_its_time_too() -> None:
    hangs = threading.Event()
    began_s = time.monotonic()
    run_checks([Check((name,), lambda _: hangs.wait(), timeout_s=60) for name in ("a", "b", "c")], total_s=0.5)  # type: ignore[arg-type, return-value]
    assert time.monotonic() - began_s < 3
    hangs.set()


def test_a_finding_is_one_line_and_travels() -> None:
    finding = bounded(Finding("disk.free", "fail", "3 MB\nare free", "make room"))
    assert in_words(finding) == "fail    disk.free           3 MB are free; make room"
    report = wire.DoctorReport(number=1, findings=[finding])
    assert wire.decode(wire.encode(report), wire.DoctorReport)[0] == report
    assert failed([finding])
    assert not failed([Finding("a", "unknown", ""), Finding("b", "warn", ""), Finding("c", "ok", "")])


# ---- clock -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("now_s", "state"), [(0.0, "fail"), (NOW_S, "ok"), (5e9, "fail")])
def test_an_absurd_year(now_s: float, state: str) -> None:
    assert host.clock_year(now_s).state == state


@pytest.mark.parametrize(
    ("now_s", "state", "said"),
    [
        (NOW_S + DAY_S, "ok", ""),
        (NOW_S - 30, "ok", ""),
        (NOW_S - 2 * DAY_S, "warn", "2.0 days behind the fleet's time as this device knows it (2026-05-28)"),
        (NOW_S + 4000 * DAY_S, "warn", "4000.0 days ahead of the fleet's time"),
        (0.0, "warn", "days behind the fleet's time"),
    ],
)
def test_a_clock_beside_the_fleets_time(now_s: float, state: str, said: str) -> None:
    found = host.clock_year(now_s, NOW_S)
    assert found.state == state
    assert said in found.said


@pytest.mark.parametrize(("ahead_s", "state"), [(0, "ok"), (-59, "ok"), (61, "warn"), (-3 * DAY_S, "fail")])
def test_the_difference_from_the_gateways_clock(ahead_s: float, state: str) -> None:
    found = host.clock_difference(lambda: NOW_S + ahead_s, lambda: NOW_S)
    assert found.state == state
    assert ("behind" in found.said) == (ahead_s < 0)


def test_nobody_to_compare_the_clock_with_is_unknown() -> None:
    assert host.clock_difference(time.time, lambda: None).state == "unknown"


def test_who_keeps_the_clock_right(tmp_path: Path) -> None:
    assert host.clock_synchronised(tmp_path).state == "unknown"
    assert host.clock_synchronised(tree(tmp_path, {"run/systemd/timesync/synchronized": ""})).state == "ok"
    assert host.clock_synchronised(Path("/")).state in ("ok", "warn", "unknown")


# ---- disk ------------------------------------------------------------------------------------------------------------------------------


def usage(free: int, *, flags: int = 0, names: int = 1000) -> os.statvfs_result:
    return os.statvfs_result((4096, 4096, 10_000_000, free // 4096, free // 4096, 10_000, names, names, flags, 255))


@pytest.mark.parametrize(
    ("found", "state", "word"),
    [
        (usage(5_000_000_000), "ok", "5.0 GB of 41.0 GB"),
        (usage(400_000_000), "warn", "400 MB"),
        (usage(40_000_000), "fail", "40 MB"),
        (usage(5_000_000_000, flags=os.ST_RDONLY), "fail", "read-only"),
        (usage(5_000_000_000, names=0), "fail", "inodes"),
    ],
)
def test_free_space(tmp_path: Path, found: os.statvfs_result, state: str, word: str) -> None:
    finding = host.disk_free(tmp_path, found)
    assert (finding.state, word in finding.said) == (state, True)


def test_a_folder_that_is_not_there_yet_is_looked_at_by_its_parent(tmp_path: Path) -> None:
    found = told(host.disk, tmp_path / "not" / "yet")
    assert found["disk.write"].state == "ok"
    assert str(tmp_path) in found["disk.free"].said
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert host.disk_write(tmp_path / "file").state == "fail"
    assert host.disk_write(Path("/proc")).state in ("fail", "unknown")


KMSG = "6,1,1,-;mmc0: new high speed SDHC card\n"


@pytest.mark.parametrize(
    ("files", "state", "word"),
    [
        ({}, "unknown", "nothing that counts"),
        ({"sys/fs/ext4/mmcblk0p2/errors_count": "0\n"}, "ok", "ext4"),
        ({"sys/fs/ext4/mmcblk0p2/errors_count": "3\n"}, "fail", "mmcblk0p2 had 3 errors"),
        ({"sys/block/mmcblk0/device/pre_eol_info": "0x01\n"}, "ok", "wear"),
        ({"sys/block/mmcblk0/device/pre_eol_info": "0x02\n"}, "warn", "mmcblk0"),
        ({"sys/block/mmcblk0/device/pre_eol_info": "0x03\n"}, "fail", "mmcblk0"),
        ({"sys/block/mmcblk0/device/pre_eol_info": "0x00\n"}, "unknown", "nothing"),
        ({"dev/kmsg": KMSG}, "ok", "kernel's log"),
        ({"dev/kmsg": KMSG + "3,2,2,-;mmcblk0: error -110 sending status command\n"}, "fail", "-110"),
        ({"dev/kmsg": KMSG + "3,2,2,-;EXT4-fs (mmcblk0p2): Remounting filesystem read-only\n"}, "fail", "read-only"),
        ({"sys/fs/ext4/mmcblk0p2/errors_count": "nonsense"}, "unknown", "nothing"),
    ],
)
def test_errors_of_the_card(tmp_path: Path, files: dict[str, str], state: str, word: str) -> None:
    finding = host.card(tree(tmp_path, files))
    assert (finding.state, word in finding.said) == (state, True), finding


def test_a_state_folder_whole_damaged_and_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert state_folder(path).state == "unknown"
    with StateFolder(path) as folder:
        folder.put("uplink", b"{}")
        assert "an agent holds it" in state_folder(path).said
    assert (state_folder(path).state, "an agent" in state_folder(path).said) == ("ok", False)
    (path / "part.1").write_bytes(MAGIC + hashlib.sha256(b"whole").digest() + b"torn")
    damaged = state_folder(path)
    assert (damaged.state, "part.1" in damaged.said) == ("warn", True)
    (path / "part.1").rename(path / "part.1.rejected")
    assert "set aside as damaged: part.1.rejected" in state_folder(path).said
    assert sorted(file.name for file in path.iterdir()) == ["lock", "part.1.rejected", "uplink"]  # nothing was changed


# ---- memory, heat, power ---------------------------------------------------------------------------------------------------------------


def test_memory(tmp_path: Path) -> None:
    assert {finding.state for finding in told(host.memory, tmp_path).values()} == {"unknown"}
    for free_kb, state in ((1_000_000, "ok"), (150_000, "warn"), (50_000, "fail")):
        tree(tmp_path, {"proc/meminfo": f"MemTotal:  1900000 kB\nMemAvailable:  {free_kb} kB\n", "proc/vmstat": "oom_kill 0\n"})
        found = told(host.memory, tmp_path)
        assert (found["memory.free"].state, found["memory.killed"].state) == (state, "ok")
    tree(tmp_path, {"proc/vmstat": "pgfault 3\noom_kill 2\n"})
    assert (told(host.memory, tmp_path)["memory.killed"].state, "2 processes" in told(host.memory, tmp_path)["memory.killed"].said) == (
        "warn",
        True,
    )


def test_the_cap_of_the_unit_counts_as_memory(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/regrow-agent.service"
    files = {
        "proc/meminfo": "MemTotal:  8000000 kB\nMemAvailable:  6000000 kB\n",
        "proc/self/cgroup": "0::/system.slice/regrow-agent.service\n",
        f"{group}/memory.max": "100000000\n",
        f"{group}/memory.current": "60000000\n",
        f"{group}/memory.stat": "inactive_file 0\n",
    }
    assert told(host.memory, tree(tmp_path, files))["memory.free"].state == "fail"


@pytest.mark.parametrize(
    ("zones", "state", "word"),
    [
        ({}, "unknown", "no thermal zone"),
        ({"cpu": "0"}, "unknown", "no thermal zone"),
        ({"cpu": "48300"}, "ok", "48 C at cpu"),
        ({"cpu": "48300", "gpu": "78000"}, "warn", "78 C at gpu"),
        ({"cpu": "86000"}, "fail", "86 C"),
        ({"cpu": "-256000", "gpu": "50000"}, "ok", "50 C at gpu"),
    ],
)
def test_temperature(tmp_path: Path, zones: dict[str, str], state: str, word: str) -> None:
    for number, (kind, value) in enumerate(zones.items()):
        zone = f"sys/class/thermal/thermal_zone{number}"
        tree(tmp_path, {f"{zone}/type": f"{kind}\n", f"{zone}/temp": f"{value}\n"})
    finding = host.temperature(tmp_path)
    assert (finding.state, word in finding.said) == (state, True)


PI = "sys/devices/platform/soc/soc:firmware/get_throttled"
CORE = "sys/devices/system/cpu/cpufreq/policy0"


@pytest.mark.parametrize(
    ("files", "state", "word"),
    [
        ({}, "unknown", "does not tell"),
        ({PI: "0\n"}, "ok", "none"),
        ({PI: "50005\n"}, "fail", "now: under-voltage, throttled"),
        ({PI: "50000\n"}, "warn", "since the start: under-voltage, throttled"),
        ({PI: "8\n"}, "warn", "soft temperature"),
        ({f"{CORE}/scaling_max_freq": "1500000\n", f"{CORE}/cpuinfo_max_freq": "1500000\n"}, "ok", "no core"),
        ({f"{CORE}/scaling_max_freq": "729600\n", f"{CORE}/cpuinfo_max_freq": "1510400\n"}, "warn", "policy0 at 48%"),
    ],
)
def test_throttling(tmp_path: Path, files: dict[str, str], state: str, word: str) -> None:
    finding = host.throttling(tree(tmp_path, files))
    assert (finding.state, word in finding.said) == (state, True), finding


def test_power_sensors(tmp_path: Path) -> None:
    assert host.power_sensor(tmp_path).state == "unknown"
    tree(tmp_path, {"sys/class/hwmon/hwmon0/name": "cpu_thermal\n"})
    assert host.power_sensor(tmp_path).state == "unknown"
    tree(tmp_path, {"sys/class/hwmon/hwmon1/name": "ina3221\n", "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n"})
    assert host.power_sensor(tmp_path).said == "ina3221 (VDD_IN)"


# ---- the network -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def walked(host_name: str, port: int, tls: ssl.SSLContext | None = None, *, encrypted: bool = False) -> dict[str, Finding]:
    return told(network.walk, BrokerAddress(host_name, port, encrypted), None if tls is None else lambda: tls)


def test_a_broker_that_is_there_and_one_that_is_not(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert [finding.state for finding in walked("127.0.0.1", port).values()] == ["ok", "ok", "ok"]
    listener.close()
    found = walked("localhost", port)
    assert [finding.state for finding in found.values()] == ["ok", "ok", "fail"]
    assert "nothing listens on that port" in found["network.tcp"].cure


def test_a_name_that_nobody_knows() -> None:
    found = walked("no-such-host.invalid", 1883)
    assert [finding.state for finding in found.values()] == ["fail", "unknown", "unknown"]


def test_a_port_without_tls(listener: socket.socket) -> None:
    def close_at_once() -> None:
        listener.accept()[0].close()

    threading.Thread(target=close_at_once, daemon=True).start()
    found = walked("127.0.0.1", listener.getsockname()[1], encrypted=True)
    assert (found["tls.handshake"].state, found["tls.broker"].state) == ("fail", "unknown")
    assert "mqtts" in found["tls.handshake"].cure


class Authority:
    """A CA, and certificates of it with chosen dates; of the tests' own making."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("cryptography")
        from cryptography.hazmat.primitives.asymmetric import ec

        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = self.sign("ca", -1, 1000, None)

    def sign(self, name: str, from_days: float, to_days: float, of: Any = "self") -> Path:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = self.key if of is None else ec.generate_private_key(ec.SECP256R1())
        day = datetime.timedelta(days=1)
        now = datetime.datetime.now(datetime.timezone.utc)
        called = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])  # noqa: E731
        builder = (
            x509.CertificateBuilder()
            .subject_name(called(name))
            .issuer_name(called("ca"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + from_days * day)
            .not_valid_after(now + to_days * day)
            .add_extension(x509.BasicConstraints(ca=of is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        )
        signed = builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (self.folder / f"{name}.crt").write_bytes(signed)
        (self.folder / f"{name}.pem").write_bytes(signed + private)
        return self.folder / f"{name}.crt"

    def served(self, listener: socket.socket, name: str) -> None:
        """Speak TLS with this certificate to the next who comes."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"{name}.pem")

        def accept() -> None:
            try:
                with context.wrap_socket(listener.accept()[0], server_side=True) as wrapped:
                    wrapped.recv(1)
            except OSError:  # who comes may well refuse us
                pass

        threading.Thread(target=accept, daemon=True).start()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.mark.parametrize(
    ("days", "trusted", "handshake", "broker"),
    [
        ((-1, 100), True, "ok", "ok"),
        ((-1, 3), True, "ok", "warn"),
        ((-9, -1), True, "fail", "fail"),
        ((1, 9), True, "fail", "fail"),
        ((-1, 100), False, "fail", "unknown"),
    ],
)
def test_tls(authority: Authority, listener: socket.socket, days: tuple[float, float], trusted: bool, handshake: str, broker: str) -> None:
    authority.sign("broker", *days)
    context = ssl.create_default_context(cafile=str(authority.file) if trusted else None)
    authority.served(listener, "broker")
    found = walked("localhost", listener.getsockname()[1], context, encrypted=True)
    assert (found["tls.handshake"].state, found["tls.broker"].state) == (handshake, broker), found


def test_certificates_on_the_disk(authority: Authority, tmp_path: Path) -> None:
    now_s = time.time()
    assert certificate("tls.own", authority.sign("d1", -1, 90), now_s, "renew").state == "ok"
    assert certificate("tls.own", authority.sign("d2", -9, -1), now_s, "renew") == Finding(
        "tls.own", "fail", f"expired on {time.strftime('%Y-%m-%d', time.gmtime(now_s - DAY_S))}", "renew"
    )
    (tmp_path / "bad.crt").write_text("nonsense")
    assert certificate("tls.own", tmp_path / "bad.crt", now_s, "renew").state == "fail"
    assert certificate("tls.own", tmp_path / "none.crt", now_s, "renew").state == "fail"


@pytest.mark.parametrize(("device", "named"), [("d1", "d1"), ("", "NAME")])
def test_an_expired_certificate_is_told_with_the_commands_that_let_the_device_in_again(
    authority: Authority, tmp_path: Path, device: str, named: str
) -> None:
    authority.sign("device", -9, -1)
    subject = Subject(device, "", None, tmp_path / "state", identity=tmp_path)
    (check,) = [check for check in live_checks(subject, lambda: None) if check.names == ("tls.own",)]
    (found,) = run_checks([check])
    assert found.said.startswith("expired on ")
    assert f"`regrow fleet revoke {named}` and `regrow fleet add {named}` on the gateway" in found.cure
    assert f"`regrow join {named}.claim.json --identity {tmp_path}`" in found.cure


def test_dates_are_not_judged_by_a_clock_that_cannot_be_right() -> None:
    assert dated("tls.own", NOW_S, NOW_S + 90 * DAY_S, 0.0, "renew").state == "unknown"
    assert dated("tls.own", NOW_S, NOW_S + 90 * DAY_S, NOW_S - DAY_S, "renew").state == "fail"


def test_dates_are_judged_by_the_fleets_time_where_it_is_known() -> None:
    def judged(now_s: float, fleet_s: float) -> Finding:
        return dated("tls.own", NOW_S, NOW_S + 90 * DAY_S, now_s, "renew", fleet_s)

    assert judged(0.0, NOW_S + DAY_S).state == "ok"
    assert judged(NOW_S + DAY_S, NOW_S + 91 * DAY_S).state == "fail"
    found = judged(NOW_S + 4000 * DAY_S, NOW_S + DAY_S)
    assert (found.state, found.cure) == ("warn", "set the clock if it is wrong; if it is right: renew")
    assert "by the fleet's time (2026-05-29) it is not" in found.said


def test_a_brokers_certificate_that_is_over_in_the_fleets_time_is_told_with_dates(authority: Authority, listener: socket.socket) -> None:
    authority.sign("broker", -1, 100)
    authority.served(listener, "broker")
    context = fleet_context(authority.file.read_text(), lambda: time.time() + 200 * DAY_S)
    found = walked("localhost", listener.getsockname()[1], context, encrypted=True)
    assert [found[name].state for name in ("tls.handshake", "tls.broker")] == ["fail", "fail"]
    assert re.match(
        r"the server's certificate is valid from \d{4}-\d\d-\d\d to \d{4}-\d\d-\d\d, and it is \d{4}-\d\d-\d\d\Z", found["tls.broker"].said
    )
    assert "mqtts://" not in found["tls.handshake"].cure


# ---- training --------------------------------------------------------------------------------------------------------------------------


def test_the_step_is_real_and_in_a_process_of_its_own() -> None:
    found = told(training.in_another_process)
    assert [finding.state for finding in found.values()] == ["ok", "ok"], found
    assert [finding.state for finding in told(training.here).values()] == ["ok", "ok"]


def test_a_step_that_is_wrong_and_a_process_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = training.expected(*training.example())
    monkeypatch.setattr(training, "expected", lambda *_: right + np.float32(0.01))
    assert told(training.here)["training.step"].state == "fail"
    crash = tmp_path / "crash"
    crash.write_text(f"#!{sys.executable}\nimport os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    crash.chmod(0o755)
    monkeypatch.setattr(training.sys, "executable", str(crash))
    found = told(training.in_another_process)
    assert (found["onnxruntime"].state, "died of SIGILL" in found["onnxruntime"].said) == ("fail", True)


def test_processors(tmp_path: Path) -> None:
    assert training.processor(tmp_path).state == "unknown"
    pi = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nprocessor\t: 1\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
    assert training.processor(tree(tmp_path, {"proc/cpuinfo": pi})).said == "2 cores with asimd"
    assert training.processor(tree(tmp_path, {"proc/cpuinfo": "processor : 0\nflags : fpu sse2\n"})).state == "warn"


def test_what_fits() -> None:
    needs = {"watch": ((100_000_000, 300_000_000), (0.3, 1.0)), "leaf": ((400_000_000,), (1.0,))}
    assert training.model_fit({}, 1).state == training.model_fit(needs, None).state == "unknown"
    assert training.model_fit(needs, 500_000_000).state == "ok"
    short = training.model_fit(needs, 200_000_000)
    assert short.state == "fail"
    assert "watch: density 0.3 of 1 (needs 100 to 300 MB), leaf: density 0 of 1" in short.said


# ---- systemd ---------------------------------------------------------------------------------------------------------------------------

RUNS = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "NRestarts": "0",
    "Result": "success",
    "WatchdogUSec": "1min 30s",
}


@pytest.mark.parametrize(
    ("changes", "unit", "watchdog"),
    [
        ({}, "ok", "ok"),
        ({"StatusText": "connected; waiting"}, "ok", "ok"),
        ({"NRestarts": "17"}, "warn", "ok"),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, "warn", "ok"),
        ({"ActiveState": "failed", "Result": "watchdog"}, "fail", "fail"),
        ({"ActiveState": "inactive", "SubState": "dead"}, "warn", "ok"),
        ({"WatchdogUSec": "0"}, "ok", "warn"),
        ({"LoadState": "not-found"}, "unknown", "unknown"),
    ],
)
def test_what_systemd_says(changes: dict[str, str], unit: str, watchdog: str) -> None:
    fields = RUNS | changes
    assert service.unit_state("regrow-agent", fields).state == unit
    assert service.watchdog("regrow-agent", fields).state == watchdog
    assert changes.get("StatusText", "") in service.unit_state("regrow-agent", fields).said


def test_without_systemd_the_process_knows_of_its_own_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert {finding.state for finding in told(service.service, "regrow-agent", tmp_path).values()} == {"unknown"}
    monkeypatch.setenv("WATCHDOG_USEC", "90000000")
    assert told(service.service, "regrow-agent", tmp_path)["service.watchdog"].state == "ok"


# ---- rights, and the companion ---------------------------------------------------------------------------------------------------------


def test_rights_are_what_comes_back() -> None:
    rights = Rights("d1", b"word")
    listen, *said = rights.begin(0.0)
    assert isinstance(listen, Subscribe)
    assert [effect.topic for effect in said if isinstance(effect, Publish)] == list(listen.topics)
    for effect in said[:-1]:
        assert isinstance(effect, Publish)
        rights.step(Received(effect.topic, b"word"), 0.1)
    rights.step(Received(listen.topics[-1], b"another's"), 0.1)
    assert [effect.topic for effect in rights.step(None, 1.5) if isinstance(effect, Publish)] == [listen.topics[-1]]  # once more
    assert not rights.over(LISTEN_S - 0.1)
    assert rights.over(LISTEN_S)
    assert rights.finding().state == "fail"
    assert "updates is not delivered" in rights.finding().said
    rights.step(Received(listen.topics[-1], b"word"), LISTEN_S)
    assert rights.finding().state == "ok"


def asked(number: int) -> Received:
    return Received(topics.doctor_request("d1"), wire.encode(wire.DoctorRequest(number=number, now_s=NOW_S)))


def test_the_agent_examines_itself_once_a_question() -> None:
    examined: list[float] = []
    done = threading.Event()

    def examine(gateway_s: Any) -> list[Finding]:
        examined.append(gateway_s())
        done.set()
        return [Finding("disk.free", "ok", "much")]

    checkup = Checkup("d1", examine, lambda: 7)
    assert checkup.step(Connected(), 0.0) == [Subscribe((topics.doctor_request("d1"),))]
    assert checkup.step(Received(topics.doctor_request("d1"), b"nonsense"), 0.0) == []
    listen, *echoes = checkup.step(asked(5), 1.0)
    assert checkup.step(asked(6), 1.0) == []  # one at a time
    assert done.wait(10)
    for effect in echoes:
        assert isinstance(effect, Publish)
        answers = checkup.step(Received(effect.topic, bytes(effect.payload)), 1.1)
    until_s = time.monotonic() + 10
    while not answers and time.monotonic() < until_s:
        answers = checkup.step(None, 1.2)
    assert isinstance(listen, Subscribe)
    stop, answer = answers
    assert stop == Unsubscribe(listen.topics)
    assert isinstance(answer, Publish)
    assert answer.topic == topics.doctor_report("d1")
    report = wire.decode(bytes(answer.payload), wire.DoctorReport)[0]
    assert (report.number, report.memory_bytes, [found.check for found in report.findings]) == (5, 7, ["disk.free", "broker.rights"])
    assert examined == [pytest.approx(NOW_S, abs=5)]
    assert checkup.step(asked(5), 3.0) == [answer]  # it did not arrive
    assert checkup.step(asked(4), 3.0) == []  # the past
    assert len(examined) == 1
    assert checkup.step(asked(7), 4.0)


def test_ids_are_stable_names() -> None:
    names = [name for check in checks_of_everything() for name in check.names]
    assert all(CHECK.match(name) for name in names)
    assert len(set(names)) == len(names)


def checks_of_everything() -> list[checks.Check]:
    from edge_agent.doctor.device import Subject, device_checks

    return device_checks(Subject("d1", "mqtts://localhost", "", Path("state"), identity=Path("identity")), {})
