"""The scenarios of tests/testbed/faults.py on a real mosquitto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.testbed import faults
from tests.testbed.test_faults import AT_ONCE, Scenario, begin

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[Scenario, Future[Any]]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield begin(request, tmp_path_factory.mktemp("faults"), pool, "mosquitto")


@pytest.mark.parametrize("scenario", faults.ALL, ids=lambda scenario: scenario.__name__)
def test_scenario(running: Mapping[Scenario, Future[Any]], scenario: Scenario) -> None:
    running[scenario].result()
