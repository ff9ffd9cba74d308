"""The runs of tests/testbed/test_parity.py on a real mosquitto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future

import pytest

from tests.testbed.parity import Run, Setting, begun
from tests.testbed.test_parity import SETTINGS

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[Setting, Future[Run]]]:
    with begun(tmp_path_factory.mktemp("parity"), "mosquitto", SETTINGS) as checks:
        yield checks


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_simulator_makes_the_served_model(running: Mapping[Setting, Future[Run]], setting: Setting) -> None:
    running[setting].result()
