"""What may happen to a fleet, as scenarios for either broker: each ends with a finished run whose log and model check out."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from broker_server.audit import audit
from broker_server.broker import Kind
from export.models import digits_mlp
from regrow import wire
from tests.testbed import processes
from tests.testbed.impostor import Impostor, far_too_large, not_a_number
from tests.testbed.processes import Child, Fleet, count, notes, task_text, until, wide_mlp

CUT_S = 10.0
SEED = 7


# ---- devices ---------------------------------------------------------------------------------------------------------------------


def a_device_is_killed_while_downloading_training_and_sending(folder: Path, kind: Kind) -> None:
    """One slow device, killed three times in one round: what it had is not fetched, trained for another number or sent again."""
    text = task_text(
        "phases",
        training="local_steps = 6000",
        method="ladder = [1.0]",
        trigger='kind = "arrival"',
        wire='up = "float16"',
        stop="aggregations = 2",
    ).replace("local_steps = 3\n", "")
    with Fleet(folder, wide_mlp(1), text, kind=kind) as fleet:
        serve = fleet.serve()
        fleet.add({"slow": 130.0})
        relay, state = fleet.relays["slow"], folder / "slow.state"

        device = fleet.device("slow")
        device.said("fetching")
        until(lambda: len(list(state.glob("part-*"))) >= 5, "five parts")
        device.kill()
        kept = len(list(state.glob("part-*")))

        device = fleet.device("slow")
        device.said("fetching")
        (again,) = notes(device.text(), "fetching")
        assert 5 <= kept < again["parts"]
        assert again["lacking"] == again["parts"] - kept
        device.said("training")
        device.kill()
        assert not notes(device.text(), "sending")

        device = fleet.device("slow")
        device.said("sending")
        (third,) = notes(device.text(), "fetching")
        assert third["lacking"] == 0
        assert third["number"] == again["number"]  # the same assignment: its lease outlives the device's deaths
        (sending,) = notes(device.text(), "sending")
        before = relay.bytes_up
        until(lambda: relay.bytes_up >= before + 2.3 * wire.MIN_CHUNK_BYTES, "two chunks and a bit")
        device.kill()

        sent_before = relay.bytes_up - before
        device, restarted = fleet.device("slow"), relay.bytes_up
        device.said("accepted")
        sent_again = relay.bytes_up - restarted
        assert not notes(device.text(), "training")
        size = sending["chunks"] * wire.MIN_CHUNK_BYTES
        assert sent_before + sent_again <= size + 1.7 * wire.MIN_CHUNK_BYTES, (sent_before, sent_again, size)
        assert serve.ended() == 0
        assert fleet.check().updates == 2


def the_fast_class_dies_and_links_are_cut_and_impostors_send_rubbish(folder: Path, kind: Kind) -> dict[str, float]:
    """Everything that devices and links can do to a run, in one run. Returns what was measured."""
    honest = {"fast-1": 4000.0, "fast-2": 4000.0, "d800": 800.0, "d400": 400.0, "d200": 200.0}
    forgers = {"nan": not_a_number, "large": far_too_large}
    text = task_text("rough", fleet="min_devices = 7", stop="seconds = 50")
    with Fleet(folder, digits_mlp(1), text, kind=kind) as fleet:
        serve = fleet.serve()
        fleet.add({**honest, **dict.fromkeys(forgers, 5000.0)})
        for name in honest:
            fleet.device(name)
        passwords = {name: fleet.credentials.password(name) for name in forgers}
        impostors = {name: Impostor(name, passwords[name], fleet.port, forge, 5e6) for name, forge in forgers.items()}
        try:
            fleet.reach_version(4)
            fleet.relays["d800"].cut()
            fleet.relays["d400"].stall()
            cut_at_s, told = time.monotonic(), {name: len(notes(fleet.devices[name].text(), "accepted")) for name in ("d800", "d400")}
            fleet.reach_version(8)
            for name in ("fast-1", "fast-2"):
                os.kill(fleet.devices[name].pid, 9)
            _wait_until(cut_at_s + CUT_S)
            assert serve.running
            fleet.relays["d800"].restore()
            fleet.relays["d400"].restore()
            gateway_bytes = processes.peak_memory_bytes(serve.pid)
            for name, seen in told.items():
                _takes_part_again(fleet.devices[name], seen)
            assert serve.ended() == 0
        finally:
            for impostor in impostors.values():
                impostor.close()
        outcome = fleet.check()
        for name, impostor in impostors.items():
            _never_counted(fleet, name, impostor.receipts)
        assert count(fleet.run, "accepted", '"fast-1"') > 0
        return {
            "updates": outcome.updates,
            "worst": outcome.worst,
            "gateway_peak_bytes": gateway_bytes,
            "disk_bytes_per_update_d800": _disk_bytes(fleet.run, "d800"),
            "disk_bytes_per_update_d200": _disk_bytes(fleet.run, "d200"),
        }


def _takes_part_again(device: Child, seen: int) -> None:
    until(lambda: len(notes(device.text(), "accepted")) >= seen + 2, f"{device.output.stem} takes part again")


def _never_counted(fleet: Fleet, name: str, receipts: Sequence[wire.Receipt]) -> None:
    assert count(fleet.run, "accepted", f'"{name}"') == 0
    refusals = count(fleet.run, "rejected", f'"device":"{name}"')
    assert refusals == 5, "bad updates end in exclusion: max_rejections of them and no more"
    assert receipts
    assert all(receipt.outcome == "rejected" and receipt.blame and receipt.reason for receipt in receipts)


def _disk_bytes(run: Path, device: str) -> float:
    """What a device has written to its disk per accepted update, from its last telemetry."""
    rows = json.loads((run / "metrics.json").read_text())
    said = [row["disk_bytes"] for row in rows if row["kind"] == "telemetry" and row["device"] == device]
    return float(said[-1] / count(run, "accepted", f'"device":"{device}"'))


# ---- the gateway -----------------------------------------------------------------------------------------------------------------


def the_coordinator_is_killed_again_and_again(folder: Path, kind: Kind) -> None:
    """kill -9 at random times, right before and right after durable steps, and a full disk: the same command always goes on."""
    rng = random.Random(SEED)
    text = task_text("killed", stop="aggregations = 45")
    with Fleet(folder, digits_mlp(1), text, kind=kind, shared=True) as fleet:
        fleet.add({"d4000": 4000.0, "d800": 800.0, "d200": 200.0})
        serve = fleet.serve()
        for name in ("d4000", "d800", "d200"):
            fleet.device(name)
        for _ in range(3):
            fleet.reach_version(fleet.version() + 2)
            _wait_until(time.monotonic() + rng.uniform(0.0, 0.5))
            serve.kill()
            serve = fleet.serve()
        if kind == "mosquitto" or shutil.which("strace"):  # .ci/run installs both; `make test` does with what is there
            assert serve.stop() == 0
            for point in (9, 16):
                _kill_before_sync(fleet, point)
            for point in (12, 21):
                _kill_after_sync(fleet, point)
            serve = fleet.serve()
        serve = _disk_full(fleet, serve)
        assert serve.ended() == 0
        assert fleet.version() == 45
        fleet.check()


def _wait_until(at_s: float) -> None:
    """The one kind of fault that is a matter of time."""
    until(lambda: time.monotonic() >= at_s, "a moment")


def _kill_before_sync(fleet: Fleet, when: int) -> None:
    """Serve, and kill the gateway as the store's thread enters its `when`-th fdatasync."""
    inject = ["strace", "-f", "-o", fleet.folder / "trace", "-e", "trace=fdatasync", "-e", f"inject=fdatasync:signal=KILL:when={when}"]
    assert fleet.serve(prefix=inject).ended() != 0


def _kill_after_sync(fleet: Fleet, when: int) -> None:
    """Serve, and kill the gateway while the store's thread is held at the end of its `when`-th fdatasync: durable, but nobody was told."""
    trace = fleet.folder / f"trace-{when}"
    delay = f"inject=fdatasync:delay_exit=3000000:when={when}"
    serve = fleet.serve(prefix=["strace", "-f", "--seccomp-bpf", "-o", trace, "-e", "trace=fdatasync", "-e", delay])
    until(lambda: "DELAYED" in trace.read_text(), "the store's thread is held")
    (gateway,) = psutil.Process(serve.pid).children()
    gateway.kill()
    assert serve.ended() != 0


def _disk_full(fleet: Fleet, serve: Child) -> Child:
    """No file may grow any more: the gateway stops with a clear error and promises nothing; with space again it goes on."""
    fleet.reach_version(fleet.version() + 2)
    limit = (fleet.run / "log.sqlite-wal").stat().st_size
    resource.prlimit(serve.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert serve.ended() == 1
    last = serve.text().strip().splitlines()[-1]
    assert last.startswith("regrow: ")
    assert "takes no more writes" in last or "cannot write" in last
    assert "free space" in last
    assert "Traceback" not in serve.text()
    return fleet.serve()


def the_broker_dies_with_and_without_the_gateway_then_a_rollback(folder: Path, kind: Kind) -> None:
    """Broker child killed, gateway and broker killed, stopped, rolled back, served again to the end."""
    text = task_text("broker", stop="aggregations = 24")
    with Fleet(folder, digits_mlp(1), text, kind=kind) as fleet:
        serve = fleet.serve()
        names = ("d4000", "d2000", "d400")
        fleet.add({name: float(name[1:]) for name in names})
        for name in names:
            fleet.device(name)
        fleet.reach_version(4)
        (broker,) = psutil.Process(serve.pid).children()
        broker.kill()
        serve.said("started again")
        fleet.reach_version(fleet.version() + 3)
        (broker,) = psutil.Process(serve.pid).children()
        serve.kill()
        until(lambda: not broker.is_running(), "the broker ends with its gateway")
        serve = fleet.serve()
        fleet.reach_version(fleet.version() + 3)
        assert serve.stop() == 0
        assert "the same command goes on" in serve.text()
        before = fleet.version()
        undo = fleet.start(["rollback", fleet.run], "rollback.log")
        assert undo.ended() == 0
        assert "is now version" in undo.text()
        serve = fleet.serve()
        assert serve.ended() == 0
        assert fleet.version() > before - 4
        fleet.check()
        verify = fleet.start(["verify", fleet.run], "verify.log")
        assert verify.ended() == 0
        assert f"{len(processes.accepted(fleet.run))} receipted updates" in verify.text()


def two_coordinators_want_one_task(folder: Path, kind: Kind) -> None:
    """The second is told who leads; with --takeover it leads, the first stops, and its device goes over to the second's run."""
    text = task_text("claimed", stop="aggregations = 300")
    other = folder / "other-runs"
    with Fleet(folder, digits_mlp(1), text, kind=kind, shared=True) as fleet:
        fleet.add({"d800": 800.0})
        first = fleet.serve()
        fleet.device("d800")
        fleet.reach_version(2)
        second = fleet.start([*_second(fleet, other)], "second.log")
        assert second.ended() == 1
        assert "another coordinator leads task claimed" in second.text()
        assert "--takeover" in second.text()
        assert first.running
        fleet.reach_version(fleet.version() + 2)

        (fleet.task / "task.toml").write_text(task_text("claimed", stop="aggregations = 5"))
        third = fleet.start([*_second(fleet, other), "--new-run", "--run", "taken", "--takeover"], "third.log")
        assert first.ended() == 1
        assert "has taken the task over" in first.text() or "another coordinator leads" in first.text()
        assert third.ended() == 0
        assert count(other / "taken", "aggregated") == 5
        told = fleet.receipted()
        assert told <= {*processes.accepted(fleet.run), *processes.accepted(other / "taken")}
        assert audit(other / "taken").worst <= 1.0


def _second(fleet: Fleet, runs: Path) -> list[object]:
    return ["serve", fleet.task, "--plain", "--runs", runs, "--broker", fleet.broker_url]


# ---- wrong settings --------------------------------------------------------------------------------------------------------------


def wrong_settings_are_named(folder: Path, kind: Kind) -> None:
    """Passwords, addresses and state folders that cannot work: one clear line each; what may heal by itself is tried again."""
    with Fleet(folder, digits_mlp(1), task_text("wrong"), kind=kind, shared=True) as fleet:
        fleet.add({"right": 800.0, "forged": 800.0, "lost": 800.0, "file": 800.0})
        fleet.credentials.add_device("forged")
        bundle = json.loads((folder / "forged.json").read_text())
        (folder / "forged.json").write_text(json.dumps({**bundle, "password": "not this one"}))
        fleet.relays["lost"].cut()
        (folder / "file.state").write_text("not a folder")

        forged, lost, right, no_folder = (fleet.device(name) for name in ("forged", "lost", "right", "file"))
        wrong_url = fleet.broker_url.replace(":" + fleet.credentials.coordinator_password, ":wrong")
        away_url = fleet.broker_url.replace(f":{fleet.port}", f":{_unused_port()}")
        refused = fleet.start(["serve", fleet.task, "--plain", "--runs", folder / "a", "--broker", wrong_url], "refused.log")
        away = fleet.start(["serve", fleet.task, "--plain", "--runs", folder / "b", "--broker", away_url], "away.log")

        forged.said("the broker refused 'forged': .*check that the bundle's device name and password")
        lost.said("WARNING edge_agent.agent: .*(connection lost|Connection re)")
        refused.said("the broker refused the coordinator: .*check its user name and password")
        away.said(r"--broker: cannot connect to 127.0.0.1:\d+; see that the broker runs")
        assert [refused.ended(), away.ended()] == [1, 1]
        assert no_folder.ended() == 1
        assert "regrow: cannot use the state folder file.state" in no_folder.text()
        right.said("connected to")
        twin = fleet.start(["agent", "--bundle", "right.json", "--data", "right.npz", "--state", "right.state"], "twin.log")
        assert twin.ended() == 1
        assert f"is in use by process {right.pid}" in twin.text()
        fleet.relays["lost"].restore()
        lost.said("connected to")
        for child in (forged, lost, right):
            assert child.running
            assert child.stop() == 0
        for child in (forged, lost, right, refused, away):
            assert "Traceback" not in child.text()


def _unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


ALL = (
    the_coordinator_is_killed_again_and_again,
    the_fast_class_dies_and_links_are_cut_and_impostors_send_rubbish,
    a_device_is_killed_while_downloading_training_and_sending,
    the_broker_dies_with_and_without_the_gateway_then_a_rollback,
    two_coordinators_want_one_task,
    wrong_settings_are_named,
)
"""Longest first."""
