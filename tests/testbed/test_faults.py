"""Real processes on the embedded broker, hurt in every way of faults.py; several fleets at once, since they mostly wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.testbed import faults

pytestmark = pytest.mark.timeout(300)
AT_ONCE = 3
Scenario = Callable[..., Any]


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[Scenario, Future[Any]]]:
    """Every scenario that was asked for, begun."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield begin(request, tmp_path_factory.mktemp("faults"), pool, "amqtt")


def begin(request: pytest.FixtureRequest, folder: Path, pool: ThreadPoolExecutor, kind: str) -> dict[Scenario, Future[Any]]:
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.module is request.module]
    wanted: list[Any] = [item.callspec.params["scenario"] for item in items if hasattr(item, "callspec")]
    return {scenario: pool.submit(scenario, folder / str(number), kind) for number, scenario in enumerate(wanted)}


@pytest.mark.parametrize("scenario", faults.ALL, ids=lambda scenario: scenario.__name__)
def test_scenario(running: Mapping[Scenario, Future[Any]], scenario: Scenario) -> None:
    measured = running[scenario].result()
    if measured:
        print(measured)
        assert measured["disk_bytes_per_update_d200"] < 20_000
        assert measured["gateway_peak_bytes"] < 200e6
