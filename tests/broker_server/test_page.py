"""The page's HTTP, its stream and what it shows, over a real coordinator; and who may do what."""

from __future__ import annotations

import json
import re
import socket
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from broker_server.page import server
from broker_server.page.access import Access, host_of, token_in
from broker_server.page.board import Board
from broker_server.page.serving import Place, _listening
from broker_server.page.stream import LISTENERS, WAITING, Stream
from regrow import wire
from regrow.errors import LocalError
from regrow.machine import Note
from tests.broker_server.page_rig import TOKEN, Rig, make_run, page_of
from tests.testbed.processes import until


class Stranger:
    """One who listens to the stream over a socket of its own."""

    def __init__(self, rig: Rig) -> None:
        self.socket = socket.create_connection(("127.0.0.1", rig.port), timeout=20)
        self.socket.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self._file = self.socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        while self._file.readline().strip():
            pass

    def next(self) -> tuple[str, Any]:
        """(kind, what it says) of the next event."""
        kind = ""
        while line := self._file.readline().decode():
            if line.startswith("event: "):
                kind = line[7:].strip()
            elif line.startswith("data: "):
                return kind, json.loads(line[6:])
        return "end", None

    def close(self) -> None:
        self._file.close()
        self.socket.close()


# ---- what it shows -----------------------------------------------------------------------------------------------------------------------


def test_a_page_tells_the_fleet_and_then_only_what_has_changed(tmp_path: Path) -> None:
    with page_of(tmp_path) as rig:
        rig.live(20)
        rig.power["pi-0001"] = wire.PowerState(3.5, "INA3221", 51.0, True)
        rig.live(5)
        status, _, state = rig.ask("/api/state")
        assert status == 200
        assert set(state["devices"]) == {"pi-0000", "pi-0001", "pi-0002"}
        row, ledger = state["devices"]["pi-0001"], rig.gateway.coordinator.ledger
        assert row["online"] is True
        assert row["density"] == ledger.devices["pi-0001"].density
        assert row["updates"] == ledger.devices["pi-0001"].updates > 0
        assert (row["watts"], row["temperature_c"], row["throttled"]) == (3.5, 51.0, True)
        assert "watts" not in state["devices"]["pi-0000"]
        assert state["devices"]["pi-0000"]["joules"] is None
        assert state["run"]["version"] == ledger.version > 0
        assert sum(level["updates"] for level in state["run"]["contributions"]) == sum(each.updates for each in ledger.devices.values())
        until(lambda: not rig.board._changed, "the stream to have taken what there was")
        listener = Stranger(rig)
        kind, whole = listener.next()
        assert kind == "whole"
        assert whole["devices"] == state["devices"]
        assert [event["kind"] for event in whole["events"]].count("joined") == 3
        rig.power["pi-0001"] = wire.PowerState(4.5, "INA3221", 51.0, True)
        rig.live(0.5)
        heard: dict[str, Any] = {}
        while "pi-0001" not in heard:
            kind, changes = listener.next()
            assert kind == "changes"
            heard |= changes["devices"]
        assert heard["pi-0001"]["watts"] == 4.5
        assert not {"online", "temperature_c", "first_density"} & heard["pi-0001"].keys()
        listener.close()


def test_a_silent_device_is_said_to_be_silent_without_another_word(tmp_path: Path) -> None:
    with page_of(tmp_path) as rig:
        rig.live(20)
        rig.world.kill("pi-0002")
        rig.live(10)
        state = rig.board.whole()
        assert [row["online"] for _, row in sorted(state["devices"].items())] == [True, True, False]
        assert state["run"]["online"] == 2


def test_a_device_at_rest_is_not_silent_and_is_counted_apart(tmp_path: Path) -> None:
    with page_of(tmp_path) as rig:
        rig.live(20)
        rig.world.kill("pi-0002")
        roster = rig.gateway.coordinator.roster
        roster.limit("pi-0002", wire.Limit("the day's bytes are used", 3600.0))
        rig.live(60)
        state = rig.board.whole()
        assert not roster.live("pi-0002")
        assert [row["online"] for _, row in sorted(state["devices"].items())] == [True, True, False]
        assert [row["resting"] for _, row in sorted(state["devices"].items())] == ["", "", "the day's bytes are used"]
        assert (state["run"]["online"], state["run"]["resting"]) == (2, 1)
        roster.silence("pi-0002")  # its will
        rig.live(5)
        state = rig.board.whole()
        assert (state["devices"]["pi-0002"]["resting"], state["run"]["resting"]) == ("", 0)


def test_a_value_that_is_gone_is_taken_back(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        rig.live(10)
        rig.power["pi-0000"] = wire.PowerState(3.5, "meter")
        rig.live(2)
        rig.board.changes()
        rig.power.clear()
        rig.live(3)
        changes = rig.board.changes()
        assert changes is not None
        assert changes["devices"]["pi-0000"]["watts"] is None
        assert "watts" not in rig.board.whole()["devices"]["pi-0000"]


def test_what_devices_say_stays_bounded(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        for number in range(1000):
            rig.board.note(Note("rejected", {"device": "pi-0000", "reason": f"{number} <img src=x onerror=alert(1)>" + "x" * 5000}))
        events = rig.board.whole()["events"]
        assert len(events) == 200
        assert events[-1]["id"] == 1000
        assert max(len(event["text"]) for event in events) == 300


def test_a_run_a_device_and_the_list_of_runs(tmp_path: Path) -> None:
    with page_of(tmp_path) as rig:
        rig.live(30)
        make_run(tmp_path, "two")
        runs = rig.ask("/api/runs")[2]
        assert runs["served"] == "one"
        assert {run["run"] for run in runs["runs"]} == {"one", "two"}
        run = rig.ask("/api/run/one")[2]
        assert run["version"][-1] == rig.gateway.coordinator.ledger.version
        assert len(run["elapsed_s"]) == len(run["score"]) == len(run["sent_bytes"]) == len(run["mean_density"])
        assert run["joules"] is None
        assert run["energy"]["joules"] is None
        assert {event["kind"] for event in run["events"]} >= {"joined"}
        assert rig.ask("/api/run/two")[2]["version"] == []
        device = rig.ask("/api/device/pi-0001")[2]
        assert device["uplink_bps"]
        assert device["staleness"]
        settings = rig.ask("/api/settings")[2]
        sources = {setting["name"]: setting["source"] for setting in settings["task"]}
        assert sources["training.local_steps"] == "task.toml"
        assert sources["restoration.trigger"] == "method fedgmr-pace"
        assert sources["method.mixing"] == "default"


def test_one_that_was_declined_before_it_joined_is_shown_with_the_reason(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        rig.board.note(Note("declined", {"device": "small", "needs_bytes": 4000, "memory_bytes": 399}))
        rig.live(5)
        row = rig.ask("/api/state")[2]["devices"]["small"]
        assert "training takes at least 4,000 bytes of memory, it offers 399" in row["declined"]
        assert row["density"] is None


# ---- what it refuses ---------------------------------------------------------------------------------------------------------------------

NOTHING = (
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/static/../page-token",
    "/.gateway/page-token",
    "/page-token",
    "//etc/passwd",
    "/api",
    "/api/",
    "/api/run/..",
    "/api/run/..%2f..%2fetc",
    "/api/run/.gateway",
    "/api/run/none",
    "/api/device/none",
    "/api/device/UPPER",
    "/api/state/more",
    "/index.html",
    "/%00",
)


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        token_in(rig.run.parent / ".gateway")
        for path in NOTHING:
            status, headers, said = rig.ask(path)
            assert status == 404, path
            assert said == {"error": "there is nothing of this name"}
            assert headers["Content-Security-Policy"] == server.POLICY
        for path in ("/api/nothing", "/", "/page.js", "/api/state"):
            assert rig.ask(path, "POST", {}, token=TOKEN)[0] == 404


def raw(rig: Rig, data: bytes) -> bytes:
    """What a connection that says this is answered, up to its end."""
    with socket.create_connection(("127.0.0.1", rig.port), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(80)) + b"Host: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: evil.example:8080\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 421),
        (b"GET /api/state HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 421),
        (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 501),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
        (b"nonsense\r\n\r\n", 400),
        (b"POST /api/pause HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        (b"POST /api/pause HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 411),
        (b"POST /api/pause HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /api/pause HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n", 413),
    ],
)
def test_what_is_no_request_for_us_gets_one_answer(tmp_path: Path, request_: bytes, status: int) -> None:
    with page_of(tmp_path, 1) as rig:
        answer = raw(rig, request_)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert f" {status} ".encode() in answer[:40]
        assert b"\r\nConnection: close" in head
        assert json.loads(body)["error"]
        assert answer.count(b"HTTP/1.1") == 1
        assert rig.ask("/")[0] == 200


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "localhost:9999", "192.168.1.7:8080", socket.gethostname()])
def test_this_machine_has_several_names(tmp_path: Path, name: str) -> None:
    with page_of(tmp_path, 1) as rig:
        assert rig.ask("/api/state", headers={"Host": name})[0] == 200


def test_hosts_are_read_strictly() -> None:
    assert host_of("Pi.Local:80") == "pi.local"
    assert host_of("[::1]:80") == "::1"
    assert [host_of(text) for text in ("", ":80", "a:b", "[::1", "[]", "[::1]x", "a:1:2")] == [None] * 7


def test_only_the_token_lets_one_do_something(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        for wrong in ("", "wrong", TOKEN[:-1], TOKEN + "t", "ü"):
            headers = {"Authorization": f"Bearer {wrong}".encode().decode("latin-1")} if wrong else {}
            status, answered, said = rig.ask("/api/pause", "POST", {}, headers)
            assert status == 401
            assert answered["WWW-Authenticate"] == "Bearer"
            assert "regrow page token" in said["error"]
        assert rig.ask("/api/pause", "POST", {}, {"Authorization": f"Basic {TOKEN}"})[0] == 401
        assert rig.ask(f"/api/pause?token={TOKEN}", "POST", {})[0] == 401
        assert rig.ask("/api/pause", "POST", {}, {"Cookie": f"token={TOKEN}"})[0] == 401
        assert not rig.instructions.told.paused
        assert rig.ask("/api/token", token="wrong")[2] == {"valid": False}
        assert rig.ask("/api/token", token=TOKEN)[2] == {"valid": True}
        for other in (
            {"Origin": "http://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Origin": "null"},
        ):
            assert rig.ask("/api/pause", "POST", {}, other, token=TOKEN)[0] == 403
        assert rig.ask("/api/pause", "POST", "{}", {"Content-Type": "text/plain"}, token=TOKEN)[0] == 415
        assert not rig.instructions.told.paused
        assert rig.ask("/api/pause", "POST", {}, {"Origin": f"http://127.0.0.1:{rig.port}"}, token=TOKEN)[0] == 200
        assert rig.instructions.told.paused


def test_another_site_may_not_even_look(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        for other in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, link):
            for path in ("/api/state", "/api/events", "/api/runs", "/page.js"):
                assert rig.ask(path, headers=other)[0] == 403, (path, other)
            assert rig.ask("/", headers=other)[0] == (200 if other is link else 403)
        for own in ({"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Origin": f"http://127.0.0.1:{rig.port}"}):
            assert rig.ask("/api/state", headers=own)[0] == rig.ask("/page.js", headers=own)[0] == 200


def test_beyond_this_machine_looking_needs_the_token_too(tmp_path: Path) -> None:
    with page_of(tmp_path, 1, host="0.0.0.0") as rig:
        assert rig.ask("/")[0] == rig.ask("/page.js")[0] == 200
        for path in (
            "/api/state",
            "/api/events",
            "/api/runs",
            "/api/run/one",
            "/api/device/pi-0000",
            "/api/settings",
            "/api/token",
            "/nothing",
        ):
            assert rig.ask(path)[0] == 401
        assert rig.ask("/api/state", token=TOKEN)[0] == 200


def test_bad_orders_are_refused_with_a_reason(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        for action, body, why in (
            ("end", {"seconds": -1}, "seconds"),
            ("end", {"seconds": "soon"}, "seconds"),
            ("end", {"hours": 1}, "hours"),
            ("end", "[" * 4000, "Expected"),
            ("device", {"device": "pi-0000", "do": "pause"}, "fleet init"),
        ):
            status, _, said = rig.ask(f"/api/{action}", "POST", body, token=TOKEN)
            assert status == 400
            assert re.search(why, said["error"])


# ---- listeners and the end ---------------------------------------------------------------------------------------------------------------


def test_too_many_listeners_are_refused_and_make_room_when_they_go(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        rig.live(5)
        listeners = [Stranger(rig) for _ in range(LISTENERS)]
        assert [listener.status for listener in listeners] == [200] * LISTENERS
        assert [listener.next()[0] for listener in listeners] == ["whole"] * LISTENERS
        late = Stranger(rig)
        assert late.status == 503
        rig.live(1)
        assert [listener.next()[0] for listener in listeners] == ["changes"] * LISTENERS
        late.close()
        for listener in listeners:
            listener.close()

        def room() -> bool:
            rig.live(1)
            return rig.page.stream.listening == 0

        until(room, "a place for another listener")


def test_one_who_does_not_keep_up_is_let_go_and_holds_up_nobody() -> None:
    changes: list[dict[str, Any]] = []
    stream = Stream(lambda: {"whole": 1}, lambda: changes.pop() if changes else None, every_s=0.001)
    slow, fast = stream.join(), stream.join()
    assert slow is not None
    assert fast is not None
    assert fast.next() == b'event: whole\ndata: {"whole":1}\n\n'
    for number in range(2 * WAITING):
        changes.append({"n": number})
        assert fast.next() == b'event: changes\ndata: {"n":%d}\n\n' % number
    assert stream.listening == 1
    assert slow.next() is None
    stream.close()
    assert fast.next() is None
    assert stream.join() is None


def test_closing_ends_every_connection_and_every_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with page_of(tmp_path, 1) as rig:
        rig.live(5)
        listeners = [Stranger(rig) for _ in range(5)]
        idle = [socket.create_connection(("127.0.0.1", rig.port)) for _ in range(5)]
        idle[0].sendall(b"GET / HTT")
        port = rig.port
        until(lambda: rig.page.stream.listening == 5, "listeners")
    for listener in listeners:
        while listener.next()[0] != "end":
            pass
        listener.close()
    for connection in idle:
        connection.close()
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_more_connections_than_there_is_room_for_are_sent_away(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        idle = [socket.create_connection(("127.0.0.1", rig.port)) for _ in range(server.CONNECTIONS)]
        until(lambda: len(rig.page._open) == server.CONNECTIONS, "all places taken")
        with socket.create_connection(("127.0.0.1", rig.port), timeout=20) as late:
            assert b" 503 " in late.recv(1000)
        for connection in idle:
            connection.close()
        until(lambda: not rig.page._open, "all places free")
        assert rig.ask("/")[0] == 200


def test_a_port_that_is_taken_gives_another_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        tried: list[Place] = []

        def opened(place: Place) -> Any:
            tried.append(place)
            return socket.create_server((place.host, place.port), reuse_port=False)

        _listening(Place("127.0.0.1", port), opened).close()
        assert tried == [Place("127.0.0.1", port), Place("127.0.0.1", 0)]
        with pytest.raises(LocalError, match=r"192\.0\.2\.1:0: .*; choose another --page, or --no-page"):
            _listening(Place("192.0.2.1", 0), opened)


# ---- the token ---------------------------------------------------------------------------------------------------------------------------


def test_the_token_is_the_owners_alone(tmp_path: Path) -> None:
    home = tmp_path / ".gateway"
    token = token_in(home)
    file = home / "page-token"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 40
    assert token_in(home) == token
    assert token_in(tmp_path / "other") != token
    file.chmod(0o640)
    with pytest.raises(LocalError, match="chmod 600"):
        token_in(home)
    file.chmod(0o600)
    for bad in (b"", b"short\n", "ü".encode() * 40, b"\xff" * 50):
        file.write_bytes(bad)
        with pytest.raises(LocalError, match="remove"):
            token_in(home)


def test_only_loopback_is_local() -> None:
    assert [Access(TOKEN, host).local for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == [True] * 4
    assert [Access(TOKEN, host).local for host in ("0.0.0.0", "::", "192.168.1.2", "gateway.local")] == [False] * 4


# ---- the files ---------------------------------------------------------------------------------------------------------------------------


def test_the_files_need_nothing_from_elsewhere_and_nothing_inline() -> None:
    static = resources.files("broker_server.page").joinpath("static")
    files = {entry.name: entry.read_text() for entry in static.iterdir()}
    page = files["index.html"]
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    asked = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    for name, text in files.items():
        if name.endswith(".js") and not name.startswith("uPlot"):
            asked |= {found.removeprefix("./") for found in re.findall(r"from '([^']+)'", text)}
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
            assert len(text.splitlines()) <= 400
        if not name.startswith("uPlot"):
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
    assert asked <= files.keys()
    assert files["uPlot.LICENSE"].startswith("The MIT License")
    assert "uPlot (v1.6.32)" in files["uPlot.iife.min.js"][:100]


def test_files_are_told_apart_by_their_content(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        _, headers, data = rig.ask("/page.css")
        assert headers["Content-Type"].startswith("text/css")
        assert data
        status, _, nothing = rig.ask("/page.css", headers={"If-None-Match": headers["ETag"]})
        assert (status, nothing) == (304, b"")
        assert rig.ask("/page.css", "HEAD")[2] == b""
        assert rig.ask("/api/events", "HEAD")[0] == 200


def test_what_the_store_knew_before_is_counted_on(tmp_path: Path) -> None:
    with page_of(tmp_path, 1) as rig:
        rig.live(20)
        before = rig.board.whole()["run"]
        from broker_server.page.past import spent_by_device, updates_by_device, updates_by_level

        after = Board(
            rig.gateway,
            spent=spent_by_device(rig.run),
            updates=updates_by_device(rig.run),
            by_level=updates_by_level(rig.run),
        )
        after.look()
        assert after.whole()["run"]["sent_bytes"] == before["sent_bytes"]
        assert after.whole()["run"]["contributions"] == before["contributions"]
        assert after.whole()["devices"]["pi-0000"]["updated_s"] is not None


def test_a_device_of_a_fleet_is_told_to_rest_and_to_go_on(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from broker_server.fleet import members
    from broker_server.fleet.authority import Authority
    from broker_server.fleet.registry import Registry
    from tests.broker_server.fleet.test_members import joined

    members.init(tmp_path / "fleet", "farm", ["192.0.2.1"])
    registry = Registry(tmp_path / "fleet")
    joined(registry, Authority(registry.folder), "pi-0000")
    with page_of(tmp_path, 1) as rig:
        rig.page.controls._registry = registry
        assert rig.ask("/api/settings")[2]["fleet"] is True
        for order, state in (("pause", "paused"), ("drain", "draining"), ("resume", "active")):
            status, _, said = rig.ask("/api/device", "POST", {"device": "pi-0000", "do": order}, token=TOKEN)
            assert (status, said) == (200, {"done": f"pi-0000: {state}"})
            assert registry.devices()["pi-0000"].state == state
        assert rig.ask("/api/device", "POST", {"device": "none", "do": "pause"}, token=TOKEN)[0] == 400
        assert rig.ask("/api/device", "POST", {"device": "pi-0000", "do": "wipe"}, token=TOKEN)[0] == 400
        assert rig.ask("/api/device", "POST", {"device": "pi-0000", "do": "pause"})[0] == 401
