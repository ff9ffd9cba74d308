"""`regrow serve` with its page, `regrow page token` and `regrow top`, as processes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from broker_server.page.access import Access
from broker_server.page.serving import Place, _said
from cli.arguments import page_address
from cli.main import main
from cli.page import pages
from cli.top import picture
from export.models import digits_mlp
from tests.docs.generate import ROOT
from tests.testbed.processes import Fleet, task_text, until


def asked(url: str, token: str = "", body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.timeout(240)
def test_a_run_is_watched_paused_started_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Fleet(tmp_path, digits_mlp(0), task_text("digits", stop="aggregations = 100000")) as fleet:
        gateway = fleet.serve("--page", "127.0.0.1:0")
        url = gateway.said(r"^page on (http://127\.0\.0\.1:\d+); to pause")[1]
        fleet.add({"d1": 4000, "d2": 4000})
        for name in ("d1", "d2"):
            fleet.device(name)
        fleet.reach_version(3)
        until(lambda: asked(f"{url}/api/state")["run"]["version"] >= 3, "version 3 on the page")
        assert main(["page", "token", "--runs", str(fleet.runs)]) == 0
        token, with_token = capsys.readouterr().out.split()
        assert with_token == f"{url}/#token={token}"
        assert main(["top", "--runs", str(fleet.runs), "--once"]) == 0
        said = capsys.readouterr().out
        assert re.search(r"^d1 +(online|silent) +\d\.\d\d", said, re.MULTILINE)
        assert "\x1b" not in said
        with pytest.raises(urllib.error.HTTPError, match="401"):
            asked(f"{url}/api/pause", body={})
        asked(f"{url}/api/pause", token, {})

        def resting() -> bool:
            devices = asked(f"{url}/api/state")["devices"]
            return len(devices) == 2 and all(row["trains"] is None and row["standing"] == "draining" for row in devices.values())

        until(resting, "everybody to rest")
        version = until(lambda: asked(f"{url}/api/state")["run"]["version"], "a version")
        asked(f"{url}/api/start", token, {})
        fleet.reach_version(version + 3)
        asked(f"{url}/api/pause", token, {})
        asked(f"{url}/api/stop", token, {})
        assert gateway.ended() == 0
        assert "stopped: the same command goes on" in gateway.text()
        assert not (fleet.run / "page.json").exists()
        assert (fleet.run / "model.onnx").exists()
        again = fleet.serve("--no-page")
        again.said("the run is paused and gives out no work: remove .*instructions.json")
        assert "page on" not in again.text()
        assert again.stop() == 0
        assert main(["top", "--runs", str(fleet.runs), "--once"]) == 0
        assert re.search(r"^d2 +(online|silent) ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.timeout(120)
def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with Fleet(tmp_path, digits_mlp(0), task_text("digits")) as fleet, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = fleet.serve("--page", f"127.0.0.1:{port}", "--paused")
        assert gateway.said(rf"^page on http://127\.0\.0\.1:(\d+) \(port {port} is taken\)")[1] != str(port)
        gateway.said("the run is paused and gives out no work: start it on the page")
        found = int(gateway.said(r"^page on http://127\.0\.0\.1:(\d+)")[1])
        with socket.create_connection(("127.0.0.1", found), timeout=20) as listener:
            listener.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in listener.recv(65536)
            gateway.process.send_signal(signal.SIGINT)
            while listener.recv(65536):  # up to its end
                pass
        assert gateway.ended() == 130


@pytest.mark.timeout(120)
def test_the_page_of_a_gateway_that_was_killed_is_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Fleet(tmp_path, digits_mlp(0), task_text("digits")) as fleet:
        gateway = fleet.serve("--page", "127.0.0.1:0")
        url = gateway.said(r"^page on (http://127\.0\.0\.1:\d+);")[1]
        until(lambda: pages(fleet.runs) == [url], "the page to be listed")
        gateway.kill()
        assert (fleet.run / "page.json").exists()
        assert main(["page", "token", "--runs", str(fleet.runs)]) == 0
        assert len(capsys.readouterr().out.split()) == 1
        again = fleet.serve("--no-page")
        again.said("^run ")
        until(lambda: pages(fleet.runs) == [], "the old page to be gone")
        assert again.stop() == 0


def test_a_page_for_the_network_is_warned_of() -> None:
    place = Place("192.0.2.1", 8080)
    said = _said(place, place, Access("t" * 43, place.host), Path("runs"))
    assert "open to the network without encryption" in said
    assert "`regrow page token --runs runs` shows the token" in said


@pytest.mark.parametrize(
    ("text", "found"), [("127.0.0.1:8080", ("127.0.0.1", 8080)), ("[::1]:0", ("::1", 0)), ("pi.local:80", ("pi.local", 80))]
)
def test_addresses_of_pages(text: str, found: tuple[str, int]) -> None:
    assert page_address(text) == found


@pytest.mark.parametrize("text", ["8080", ":8080", "::1:80", "[]:80", "host", "host:", "host:99999", "host:x", "on"])
def test_what_is_no_address(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "t", "--page", text])
    assert ended.value.code == 2
    assert "usage: regrow serve" in capsys.readouterr().err


STATE: dict[str, Any] = {
    "now_s": 1000.0,
    "run": {
        "run": "r1",
        "phase": "leading",
        "version": 7,
        "online": 2,
        "score": 0.9,
        "mean_density": 0.5,
        "sent_bytes": 1e6,
        "joules": 12.0,
    },
    "devices": {
        "a": {"online": True, "density": 0.5, "uplink_bps": 8e5, "watts": 3.5, "temperature_c": 51.0, "updates": 3, "updated_s": 990.0},
        "b": {"online": False, "density": 1.0, "updates": 0},
        "c": {"online": True, "standing": "paused", "density": 0.1, "limit": "x"},
    },
    "events": [{"text": "a regrows from 0.2 to 0.5"}],
}


def test_the_picture_needs_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=160).print(picture(STATE, 2, plain=True))
    said = capsys.readouterr().out
    assert "r1  ·  leading  ·  version 7  ·  2 of 3 devices online  ·  accuracy 0.900" in said
    assert re.search(r"^a +online +0\.50 +######\.{6} +800 kbit/s +51 °C +3\.5 W +3 +10 s ago", said, re.MULTILINE)
    resting = {
        **STATE,
        "run": {**STATE["run"], "resting": 1},
        "devices": {"d": {"online": False, "resting": "bytes of the day", "density": 1}},
    }
    Console(width=200).print(picture(resting, 2, plain=True))
    shown = capsys.readouterr().out
    assert "devices online  ·  1 resting" in shown
    assert re.search(r"^d +resting: bytes of the day ", shown, re.MULTILINE)
    assert re.search(r"^b +silent +1\.00 +#{12} +- +- +- +0 +-", said, re.MULTILINE)
    assert "and 1 more devices" in said
    assert "a regrows from 0.2 to 0.5" in said
    assert "\x1b" not in said


@pytest.mark.timeout(60)
def test_top_in_a_terminal_leaves_cleanly(tmp_path: Path) -> None:
    from tests.broker_server.page_rig import page_of

    with page_of(tmp_path) as rig:
        rig.live(10)
        ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LINES": "30", "COLUMNS": "150"}
        command = [sys.executable, "-m", "cli.main", "top", "--url", f"http://127.0.0.1:{rig.port}", "--every", "0.1"]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
        os.close(theirs)
        seen = b""

        def look() -> bool:
            nonlocal seen
            with suppress(OSError):  # its other end is closed
                while select.select([ours], [], [], 0)[0]:
                    seen += os.read(ours, 65536)
            return b"pi-0002" in seen

        try:
            until(look, lambda: seen.decode(errors="replace")[-2000:])
            process.send_signal(signal.SIGINT)
            deadline_s = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline_s:
                look()  # a terminal that nobody reads from holds its writer up
            assert process.returncode == 130
            look()
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert b"\x1b[?1049h" in seen
        assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h"), "the terminal is as it was"
        assert b"\x1b[?25h" in seen
        assert b"Traceback" not in seen


def test_a_page_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        free = silent.getsockname()[1]
    assert main(["top", "--url", f"http://127.0.0.1:{free}", "--once"]) == 1
    assert "see that `regrow serve` runs there" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert main(["top", "--runs", str(tmp_path / "runs"), "--once"]) == 2
    assert "no runs in" in capsys.readouterr().err
