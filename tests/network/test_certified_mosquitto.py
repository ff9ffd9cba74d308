"""The life of a fleet with identities on a real mosquitto."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testbed.test_certified import lives

pytest.importorskip("cryptography")
pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]


def test_a_fleet_lives_on_mosquitto(tmp_path: Path) -> None:
    lives(tmp_path, "mosquitto")
