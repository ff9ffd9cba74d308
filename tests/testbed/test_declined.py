"""Real processes: a device whose data do not fit says so once on both sides, and the others go on without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.models import digits_mlp
from tests.testbed.processes import Fleet, notes, task_text


def test_a_wrong_label_is_told_once_on_both_sides_and_nobody_waits(tmp_path: Path) -> None:
    with Fleet(tmp_path / "fleet", digits_mlp(1), task_text("digits", fleet="min_devices = 2", stop="aggregations = 12")) as fleet:
        serve = fleet.serve()
        fleet.add({"d1": 4000.0, "d2": 4000.0})
        with np.load(fleet.folder / "d2.npz") as arrays:
            x, y = arrays["x"], arrays["y"].copy()
        y[117] = 10
        np.savez(fleet.folder / "d2.npz", x=x, y=y)
        fleet.device("d1")
        wrong = fleet.device("d2")
        reason = "d2.npz: row 117 (the first is 0): label 10, but the task's labels are 0 to 9"
        wrong.said(r"declined \{")
        assert serve.ended() == 0, "the run ends without it"
        (told,) = notes(wrong.text(), "declined")
        assert told["reason"] == reason
        assert "start the agent again" in told["cure"]
        assert "gave up" not in wrong.text()
        shown = [line for line in serve.text().splitlines() if "declined" in line]
        assert len(shown) == 1
        assert f"device=d2 reason={reason}" in shown[0]
        assert "device=d2" not in " ".join(line for line in serve.text().splitlines() if "restored" in line)
