"""Facts of the link from fake trees and made-up answers, and from real sockets; whatever the system says, nothing raises."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest

from edge_agent.link_facts import (
    Counters,
    RadioFacts,
    RadioWatch,
    Run,
    TcpFacts,
    Unknown,
    counted_since,
    counters_of,
    interface_to,
    parse_iw_link,
    parse_modem,
    parse_modems,
    parse_tcp_info,
    parse_wireless,
    radio_of,
    tcp_facts,
)

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

WIRELESS = """Inter-| sta-|   Quality        |   Discarded packets               | Missed | WE
 face | tus | link level noise |  nwid  crypt   frag  retry   misc | beacon | 22
 wlan0: 0000   54.  -56.  -256        0      0      0      1      0        0
 wlan1: 0000   70.  200.  -256        0      0      0      1      0        0
 wlan2: 0000    3.    0.     0        0      0      0      1      0        0
"""
IW = """Connected to 02:00:00:00:00:01 (on wlan0)
	SSID: signal: -11 dBm home
	freq: 5180.0
	RX: 1000 bytes (10 packets)
	signal: -52 dBm
	rx bitrate: 433.3 MBit/s
	tx bitrate: 390.0 MBit/s VHT-MCS 8 80MHz short GI VHT-NSS 1
"""
MODEM = {
    "modem": {"generic": {"access-technologies": ["lte"], "ports": ["cdc-wdm0 (qmi)", "wwan0 (net)"], "signal-quality": {"value": "60"}}}
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def answers(**said: str) -> Run:
    """Programs that say this, by name; others are not installed."""

    def run(command: Sequence[str]) -> str:
        if command[0] not in said:
            raise FileNotFoundError(2, "not installed")
        return said[command[0]]

    return run


def test_tcp_tells_of_a_real_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        peer, _ = server.accept()
        with peer:
            sock.sendall(bytes(5000))
            assert len(peer.recv(5000, socket.MSG_WAITALL)) == 5000
            facts = tcp_facts(sock)
    assert isinstance(facts, TcpFacts)
    assert (facts.retransmitted, facts.delivered_bytes) == (0, 5001)  # the SYN counts
    assert 0 < facts.rtt_s < 1
    assert facts.least_rtt_s is not None
    assert facts.congestion
    assert isinstance(tcp_facts(sock), Unknown)  # closed


def test_what_is_no_tcp_socket_is_unknown() -> None:
    with socket.socketpair()[0] as sock:
        assert isinstance(tcp_facts(sock), Unknown)


def test_an_older_kernels_shorter_answer_still_tells_what_it_has() -> None:
    info = bytearray(104)
    struct.pack_into("=I", info, 68, 25_000)
    struct.pack_into("=I", info, 100, 7)
    assert parse_tcp_info(bytes(info), b"cubic\0\0") == TcpFacts(0.025, None, 7, None, "cubic")
    assert isinstance(parse_tcp_info(bytes(103), b""), Unknown)


def test_the_interface_is_the_one_whose_address_packets_leave_from() -> None:
    assert [interface_to(host) for host in ("127.0.0.1", "127.9.9.9", "localhost")] == ["lo"] * 3
    assert "no-such-host" in str(interface_to("no-such-host.invalid"))
    assert "not connected" in str(interface_to(""))
    assert isinstance(interface_to("x" * 100), Unknown)


def test_an_address_that_no_interface_has_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.net_if_addrs", dict)
    assert isinstance(interface_to("127.0.0.1"), Unknown)


def test_counters_and_what_lies_between_two_looks(tmp_path: Path) -> None:
    folder = "sys/class/net/eth0/statistics"
    root = tree(tmp_path, {f"{folder}/tx_bytes": "1000\n", f"{folder}/rx_bytes": "70\n"})
    first = counters_of("eth0", root)
    assert first == Counters(1000, 70)
    assert counted_since(first, Counters(1500, 75)) == Counters(500, 5)
    assert counted_since(first, Counters(20, 75)) == Unknown("the interface's counters began anew")
    assert isinstance(counted_since(Unknown("no"), first), Unknown)
    assert isinstance(counters_of("eth9", root), Unknown)
    tree(root, {f"{folder}/tx_bytes": "-5\n"})
    assert counters_of("eth0", root) == Unknown("tx_bytes of eth0 is no number")


def test_iw_tells_signal_rate_and_band_and_never_the_name() -> None:
    facts = parse_iw_link(IW)
    assert facts == RadioFacts("wifi", -52.0, 390e6, 5180e6)
    assert "home" not in repr(facts)
    assert isinstance(parse_iw_link("Not connected.\n").signal_dbm, Unknown)


def test_wifi_without_iw_has_the_kernels_table(tmp_path: Path) -> None:
    root = tree(tmp_path, {"sys/class/net/wlan0/wireless/x": "", "proc/net/wireless": WIRELESS})
    facts = radio_of("wlan0", root, answers())
    assert facts == RadioFacts("wifi", -56.0, Unknown("iw: not installed"), Unknown("iw: not installed"))
    assert radio_of("wlan0", root, answers(iw=IW)) == parse_iw_link(IW)
    assert parse_wireless(WIRELESS, "wlan1") == -56.0
    assert isinstance(parse_wireless(WIRELESS, "wlan2"), Unknown)  # 0: the driver does not know
    assert isinstance(parse_wireless(WIRELESS, "wlan9"), Unknown)


def test_a_modem_says_its_technology(tmp_path: Path) -> None:
    path = "/org/freedesktop/ModemManager1/Modem/0"
    root = tree(tmp_path, {"sys/class/net/wwan0/uevent": "DEVTYPE=wwan\nINTERFACE=wwan0\n"})

    def mmcli(command: Sequence[str]) -> str:
        return json.dumps({"modem-list": [path]} if "-L" in command else MODEM)

    facts = radio_of("wwan0", root, mmcli)
    assert isinstance(facts, RadioFacts)
    assert facts.technology == "lte"
    assert isinstance(facts.signal_dbm, Unknown)
    assert isinstance(radio_of("wwan1", root, mmcli), Unknown)
    assert isinstance(radio_of("ppp0", root, mmcli), RadioFacts)
    assert radio_of("wwan0", root, answers()) == Unknown("mmcli: not installed")
    assert isinstance(radio_of("eth0", root, mmcli), Unknown)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), subprocess.TimeoutExpired("iw", 3), ValueError("null byte")])
def test_a_program_that_fails_is_a_reason(error: Exception, tmp_path: Path) -> None:
    root = tree(tmp_path, {"sys/class/net/wlan0/phy80211/x": ""})

    def fails(_: Sequence[str]) -> str:
        raise error

    facts = radio_of("wlan0", root, fails)
    assert isinstance(facts, RadioFacts)
    assert isinstance(facts.signal_dbm, Unknown)


@given(st.binary(max_size=300), st.binary(max_size=20))
def test_any_tcp_info_is_facts_or_a_reason(info: bytes, congestion: bytes) -> None:
    facts = parse_tcp_info(info, congestion)
    assert isinstance(facts, Unknown) or (facts.rtt_s >= 0 and len(facts.congestion) <= 32)


NASTY = st.one_of(
    st.text(),
    st.tuples(st.sampled_from([WIRELESS, IW, json.dumps(MODEM)]), st.integers(0, 400), st.text(max_size=9)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    ),
)


@given(NASTY)
def test_any_answer_is_a_fact_within_bounds_or_a_reason(text: str) -> None:
    facts = parse_iw_link(text)
    assert isinstance(facts.signal_dbm, Unknown) or -150 <= facts.signal_dbm <= 30
    assert isinstance(facts.radio_hz, Unknown) or 1e8 <= facts.radio_hz <= 1e11
    assert isinstance(facts.radio_bps, Unknown) or 0 <= facts.radio_bps <= 1e12
    level = parse_wireless(text, "wlan0")
    assert isinstance(level, Unknown) or -150 <= level < 0
    modem = parse_modem(text, "wwan0")
    assert isinstance(modem, Unknown) or len(modem.technology) <= 64
    assert all(isinstance(name, str) for name in parse_modems(text))


@given(NASTY)
def test_any_counter_is_a_number_or_a_reason(text: str) -> None:
    with mock.patch("edge_agent.link_facts._read", return_value=text):
        counted = counters_of("eth0")
    assert isinstance(counted, Unknown) or counted.sent_bytes >= 0


def test_the_radio_is_asked_now_and_then_by_somebody_else() -> None:
    asked: list[str] = []

    allowed = threading.Event()

    def look(interface: str) -> Unknown:
        assert allowed.wait(10)
        asked.append(interface)
        return Unknown(f"look {len(asked)}")

    watch = RadioWatch(30.0, look)
    assert watch.facts("wlan0", 0.0) == Unknown("not looked at yet")
    allowed.set()
    _settled(watch, "look 1", 1.0)
    assert asked == ["wlan0"]
    watch.facts("wlan0", 31.0)
    _settled(watch, "look 2", 32.0)


def _until(done: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.001)


def _settled(watch: RadioWatch, why: str, now: float) -> None:
    _until(lambda: watch.facts("wlan0", now) == Unknown(why), why)
