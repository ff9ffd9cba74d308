"""The table of a running task: what it says of devices that get no work."""

from __future__ import annotations

import io

from rich.console import Console

from broker_server.view import FleetView, in_words
from regrow.machine import Note


def shown(view: FleetView) -> str:
    out = io.StringIO()
    Console(width=240, file=out).print(view.render())
    return out.getvalue()


def test_declined_devices_are_counted_until_they_take_part() -> None:
    view = FleetView("watch")
    assert "declined" not in shown(view)
    for who in ("d0", "d1"):
        view.note(Note("declined", {"device": who, "needs_bytes": 4000, "memory_bytes": 399}))
    both = {"needs_bytes": 9000, "needs_bytes_float16": 7000, "storage": "auto", "memory_bytes": 500}
    view.note(Note("declined", {"device": "d1", **both}))
    said = "d1 declined: training takes at least 9,000 bytes of memory, with float16 storage 7,000, it offers 500, 6,500 too few"
    assert said in shown(view)
    view.note(Note("telemetry", {"device": "d1", "phase": "waiting"}))
    picture = shown(view)
    assert "2 declined for memory" in picture.splitlines()[0]
    assert picture.count("too little memory") == 2
    assert "d1 declined: training takes at least 4,000 bytes of memory, it offers 399, 3,601 too few" in picture
    assert "lower [training] batch" in " ".join(picture.split())
    joined = {"device": "d0", "uplink_bps": 1e6, "density": 0.5, "bound_by": "memory"}
    view.note(Note("joined", joined))
    picture = shown(view)
    assert "1 declined for memory" in picture.splitlines()[0]
    assert picture.count("too little memory") == 1


def test_a_device_whose_data_do_not_fit_is_said_to_decline_and_why() -> None:
    view = FleetView("watch")
    view.note(Note("declined", {"device": "d0", "needs_bytes": 4000, "memory_bytes": 399}))
    view.note(Note("declined", {"device": "d2", "reason": "d2.npz: row 17 (the first is 0): label 12, but the task's labels are 0 to 6"}))
    view.note(Note("telemetry", {"device": "d2", "phase": "waiting"}))
    picture = shown(view)
    assert "1 declined for memory  ·  1 declined for data" in picture.splitlines()[0]
    assert picture.count("cannot train") == 1
    assert "d2 declined: d2.npz: row 17 (the first is 0): label 12" in picture
    view.note(Note("assigned", {"device": "d2", "version": 3, "density": 0.5}))
    assert "declined for data" not in shown(view)
    assert "cannot train" not in shown(view)


def test_what_became_of_a_promoted_model_is_an_event() -> None:
    view = FleetView("watch")
    view.note(Note("promotion", {"device": "d1", "promotion": 3, "outcome": "kept", "said": "kept; accuracy 0.750", "accuracy": 0.75}))
    assert "d1: model 3 kept; accuracy 0.750" in shown(view)


def test_a_device_that_is_started_too_often_is_an_event() -> None:
    fields = {"device": "left", "starts": 5, "within_s": 300.0, "wait_s": 140.4}
    said = in_words(Note("restarting", fields))
    assert said == "left was started more than 5 times in 300 s and gets no work meanwhile: its last start counts in 140 s"
