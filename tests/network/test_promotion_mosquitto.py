"""The way of a model into use, on a real mosquitto."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.models import digits_mlp
from tests.testbed.processes import Fleet, task_text
from tests.testbed.test_promotion import a_model_comes_into_use

pytestmark = [pytest.mark.network, pytest.mark.timeout(120)]


def test_a_model_comes_into_use(tmp_path: Path) -> None:
    with Fleet(tmp_path / "fleet", digits_mlp(1), task_text("used", stop="seconds = 100"), kind="mosquitto") as fleet:
        a_model_comes_into_use(fleet, "mosquitto")
