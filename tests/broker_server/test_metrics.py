"""/metrics of a real gateway, read with Prometheus's own parser, and the dashboard, which must use nothing else."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker_server.metrics import CLASS_SERIES, DEVICE_SERIES, OTHER, Metrics, serving
from cli.main import main
from export.models import digits_mlp
from regrow import wire
from regrow.errors import LocalError
from regrow.machine import Note
from tests.docs.generate import ROOT
from tests.testbed.processes import Fleet, task_text, until

DASHBOARD = ROOT / "deploy" / "grafana" / "regrow.json"


def read(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value of every sample."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert all(family.documentation for family in families)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[(name, tuple(sorted(labels.items())))]


def total(found: dict[Any, float], name: str) -> float:
    return sum(number for (each, _), number in found.items() if each == name)


@pytest.mark.timeout(180)
def test_a_gateway_at_work_tells_its_numbers(tmp_path: Path) -> None:
    with Fleet(tmp_path, digits_mlp(0), task_text("digits", stop="aggregations = 100000")) as fleet:
        gateway = fleet.serve("--metrics-port", 0)
        port = int(gateway.said(r"^metrics on http://127\.0\.0\.1:(\d+)/metrics$")[1])
        before = read(port)
        assert value(before, "regrow_version") == 0
        assert [name for name, _ in before if name in ("regrow_score", "regrow_mean_density")] == []  # not known yet, which is not 0
        assert value(before, "regrow_updates_total", result="accepted") == 0
        fleet.add({"d1": 4000, "d2": 4000})
        for name in ("d1", "d2"):
            fleet.device(name)
        fleet.reach_version(12)

        def look() -> dict[Any, float] | None:
            now = read(port)
            return now if value(now, "regrow_version") >= 12 and total(now, "regrow_device_received_bytes_total") > 1000 else None

        found = until(look, "the metrics of version 12")
        (run,) = (labels for name, labels in found if name == "regrow_run_info")
        assert dict(run) == {"run": fleet.run.name, "task": "digits", "method": "fedgmr-pace"}
        assert value(found, "regrow_devices") == 2
        assert total(found, "regrow_devices_online") == 2
        accepted = value(found, "regrow_updates_total", result="accepted")
        assert accepted >= 12
        assert value(found, "regrow_update_staleness_versions_count") == accepted
        assert value(found, "regrow_update_staleness_versions_bucket", le="+Inf") == accepted
        assert value(found, "regrow_aggregations_total") >= 12
        assert (
            value(found, "regrow_device_updates_total", device="d1") + value(found, "regrow_device_updates_total", device="d2") == accepted
        )
        assert 0 < value(found, "regrow_mean_density") <= 1
        assert 0 < value(found, "regrow_score") <= 1
        assert total(found, "regrow_device_received_bytes_total") > 1000
        assert value(found, "regrow_broker_connected") == 1
        assert value(found, "regrow_broker_restarts_total") == 0
        assert value(found, "regrow_store_written_bytes_total") > 1000
        assert 0 <= value(found, "regrow_store_lag_seconds") < 30
        assert 1e7 < value(found, "process_resident_memory_bytes") < 1e9
        assert value(found, "regrow_device_heard_timestamp_seconds", device="d1") > 1.7e9
        assert gateway.stop() == 0


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = made()
    with serving(metrics, "127.0.0.1", 0) as port:
        taken = pytest.raises(LocalError, match=f"127.0.0.1:{port}: .*; choose another --metrics-port")
        with taken, serving(metrics, "127.0.0.1", port):
            pass
    with pytest.raises(LocalError, match="--metrics-host"), serving(metrics, "192.0.2.1", 0):
        pass
    with pytest.raises(SystemExit):
        main(["serve", "t", "--metrics-port", "70000"])
    assert "is not a port" in capsys.readouterr().err


# ---- bounds --------------------------------------------------------------------------------------------------------------------------


def made(**devices: float) -> Metrics:
    """Of a gateway that has these devices, by first density."""
    known = {name: SimpleNamespace(first_density=first) for name, first in devices.items()}
    counts: dict[float, int] = {}
    for first in devices.values():
        counts[first] = counts.get(first, 0) + 1
    task = SimpleNamespace(method=SimpleNamespace(name="fedgmr"), fleet=SimpleNamespace(heartbeat_s=10.0))
    ledger = SimpleNamespace(task=task, devices=known, version=3, global_score=None, level_scores={})
    roster = SimpleNamespace(classes=SimpleNamespace(counts=counts), mean_density=lambda: 0.5, limits={})
    told = {name: heartbeat(None, None, None) for name in devices}
    coordinator = SimpleNamespace(names=SimpleNamespace(run="r", task="t"), ledger=ledger, roster=roster, telemetry=told)
    gateway: Any = SimpleNamespace(coordinator=coordinator, store=SimpleNamespace(bytes_written=0), store_lag_s=0.0, connected=True)
    return Metrics(gateway)


def heartbeat(watts: float | None, temperature_c: float | None, rtt_s: float | None) -> wire.Telemetry:
    power, link = wire.PowerState(watts, "test", temperature_c), wire.LinkState(1.0, 2.0, rtt_s)
    return wire.Telemetry(install=bytes(16), phase="waiting", power=power, link=link)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with serving(metrics, "127.0.0.1", 0) as port:
        return read(port)


def telemetry(who: str, up: int, down: int) -> Note:
    return Note("telemetry", {"device": who, "bytes_up": up, "bytes_down": down, "uplink_bps": 8000.0})


def test_labels_are_bounded_whatever_the_fleet() -> None:
    metrics = made(**{f"d{number}": number / 1000 for number in range(1, 500)})
    for number in range(1, 500):
        metrics.note(telemetry(f"d{number}", 0, 0))
        metrics.note(telemetry(f"d{number}", 10, 20))
        metrics.note(Note("update", {"device": f"d{number}", "staleness": 1}))
    metrics.note(Note("refused", {"topic": "x", "reason": "y"}))
    metrics.look()
    found = samples(metrics)
    per_device = [labels for name, labels in found if name == "regrow_device_updates_total"]
    assert len(per_device) == DEVICE_SERIES
    assert value(found, "regrow_devices_without_series") == 499 - DEVICE_SERIES
    assert len([labels for name, labels in found if name == "regrow_devices_online"]) == CLASS_SERIES + 1
    assert total(found, "regrow_devices_online") == 499
    assert value(found, "regrow_devices_online", **{"class": OTHER}) == 499 - CLASS_SERIES
    assert total(found, "regrow_device_sent_bytes_total") == 4990
    assert total(found, "regrow_device_received_bytes_total") == 9980
    assert value(found, "regrow_messages_refused_total") == 1


def test_a_device_that_counts_anew_takes_nothing_back() -> None:
    metrics = made(d1=0.5)
    for up, down in ((1000, 5000), (1500, 6000), (200, 100), (300, 100)):  # the first word is of before this process
        metrics.note(telemetry("d1", up, down))
    found = samples(metrics)
    assert value(found, "regrow_device_sent_bytes_total", **{"class": "0.5"}) == 500 + 200 + 100
    assert value(found, "regrow_device_received_bytes_total", **{"class": "0.5"}) == 1000 + 100
    assert value(found, "regrow_device_uplink_bytes_per_second", device="d1") == 1000


def test_what_a_device_does_not_measure_has_no_value() -> None:
    metrics = made(d1=0.5, d2=0.5)
    told = metrics._gateway.coordinator.telemetry
    told["d1"] = heartbeat(4.0, 61.5, 0.03)
    for who in ("d1", "d2", "d1", "d2"):
        metrics.note(telemetry(who, 0, 0))
    found = samples(metrics)
    assert value(found, "regrow_device_power_watts", device="d1") == 4.0
    assert value(found, "regrow_device_temperature_celsius", device="d1") == 61.5
    assert value(found, "regrow_device_round_trip_seconds", device="d1") == 0.03
    assert 0 < value(found, "regrow_device_energy_joules_total", **{"class": "0.5"}) < 4.0
    assert not [labels for name, labels in found if name.startswith("regrow_device_power") and dict(labels)["device"] == "d2"]
    told["d1"] = heartbeat(None, None, None)
    metrics.note(telemetry("d1", 0, 0))
    assert not [name for name, _ in samples(metrics) if name.endswith(("_watts", "_celsius", "_round_trip_seconds"))]


# ---- what Grafana shows --------------------------------------------------------------------------------------------------------------

# The units of Grafana that fit the ending of a name; "short" is a number without unit.
UNITS = {"bytes": "bytes", "seconds": "s", "bytes_per_second": "Bps", "watts": "watt", "joules": "joule", "celsius": "celsius"}
ENDINGS = ("bytes_per_second", "bytes_total", "joules_total", "bytes", "seconds", "watts", "celsius")
WORDS = {"rate", "increase", "sum", "by", "le", "class", "histogram_quantile", "time", "level", "device", "result"}


def exported() -> set[str]:
    metrics = made(d1=0.5)
    metrics._gateway.coordinator.telemetry["d1"] = heartbeat(4.0, 61.5, 0.03)
    metrics.note(telemetry("d1", 1, 1))
    metrics.note(telemetry("d1", 1, 1))
    metrics.note(Note("update", {"device": "d1", "staleness": 1, "density": 0.5}))
    metrics._gateway.coordinator.ledger.level_scores = {0.5: 0.9}
    metrics._gateway.coordinator.ledger.global_score = 0.9
    metrics.look()
    return {name for name, _ in samples(metrics)}


def panels() -> list[dict[str, Any]]:
    board = json.loads(DASHBOARD.read_text())
    found: list[dict[str, Any]] = [panel for panel in board["panels"] if panel["type"] != "row"]
    return found


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*", re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", "", expression))) - WORDS


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    there = exported() | {"up"}
    asked = {name for panel in panels() for target in panel["targets"] for name in names_in(target["expr"])}
    assert asked <= there, asked - there
    assert len(asked) >= 20


def test_every_panel_has_the_unit_of_what_it_shows() -> None:
    ids, there = [panel["id"] for panel in panels()], exported()
    assert len(set(ids)) == len(ids)
    for panel in panels():
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            expression = target["expr"]
            wanted = "short"
            for name in names_in(expression) & there:
                ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
                wanted = UNITS.get(ending.removesuffix("_total"), wanted)
                wanted = "Bps" if ending == "bytes_total" and "rate(" in expression else wanted
                wanted = "watt" if ending == "joules_total" and "rate(" in expression else wanted
            assert unit == wanted or (wanted == "short" and unit in ("percentunit", "none", "ops")), (
                f"{panel['title']}: {unit}, not {wanted}"
            )
