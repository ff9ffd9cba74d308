"""`regrow serve` and the simulator are the same machines: from the same sequence of arrivals they make the same model, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from regrow import records
from tests.testbed.parity import Replay, Run, Setting, begun, prepare, serve, sources

pytestmark = pytest.mark.timeout(300)
# Whatever the issue names for real MQTT; one word more for one method more.
METHODS = ("fedavg", "fedasync", "heterofl", "fedmr", "prfl", "fedgmr", "fjord", "subfedavg")
SETTINGS = [
    *map(Setting, METHODS),
    Setting("fiarse+restore"),
    Setting("prfl", "int8", "unit", aggregations=9),
    Setting("fedgmr", "int8", "unit"),
    Setting("fedgmr", "int8", "unit", model="batch_norm"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[Setting, Future[Run]]]:
    with begun(tmp_path_factory.mktemp("parity"), "amqtt", SETTINGS) as checks:
        yield checks


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_simulator_makes_the_served_model(running: Mapping[Setting, Future[Run]], setting: Setting) -> None:
    served = running[setting].result()
    if setting.method == "fedgmr":
        assert any(entry.densities for entry in served.of(records.Restored))
        assert served.of(records.Refreshed)
        assert len({level for _, _, level, _ in served.arrivals()}) > 1


def test_another_sequence_of_arrivals_makes_another_model(tmp_path: Path) -> None:
    """So the agreement is that of the arrivals, and not of anything that would come out anyway."""
    prepare(tmp_path, Setting("fedasync"))
    served = serve(tmp_path, "amqtt")
    accepted = served.of(records.Accepted)
    other = next(number for number, entry in enumerate(accepted) if entry.device != accepted[0].device)
    reordered = [accepted.pop(other), *accepted]
    each = records.Aggregated(version=0, elapsed_s=0.0)  # it aggregates at every arrival
    simulated = Replay(served, sources(tmp_path), [entry for arrival in reordered for entry in (arrival, each)]).run()
    assert simulated.arrivals()[0] == served.arrivals()[other]
    assert not np.array_equal(simulated.weights, served.weights)
