"""How long simulated devices train: from a measured step time and a device's slowness, or from recorded steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regrow.errors import LocalError
from regrow.local_rules import drawn_levels
from regrow.machine import Train, Trained, TrainingFailed
from testbed.links import generator, read_rows
from testbed.memory import Deferred, Trainer


@dataclass(frozen=True)
class Compute:
    """A device's training speed; `seconds` is a pure function of the job.

    Args:
        steps_s: seconds of one step at full density: a single measured one, or recorded ones that jobs go through in turn.
        slowdown: how many times slower than where `steps_s` was measured.
        by_density: (density, time of a step relative to density 1) pairs, ascending, straight lines in between. The default is that of
            weight granularity, where a masked step costs as much as a full one; units and width slices: what was measured, such as
            ((0.05, 0.2), (1.0, 1.0)).
        sigma: of the natural logarithm of a job's jitter, whose mean is 1.
        seed, stream: what the jitter is a function of, with the job's number.
    """

    steps_s: tuple[float, ...]
    slowdown: float = 1.0
    by_density: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    sigma: float = 0.0
    seed: int = 0
    stream: str = ""

    def __post_init__(self) -> None:
        numbers = (*self.steps_s, self.slowdown, *(factor for _, factor in self.by_density))
        if not self.steps_s or not self.by_density or not all(math.isfinite(number) and number > 0.0 for number in numbers):
            raise LocalError("compute: step times, slowdown and factors by density must be there, finite and > 0")
        densities = [density for density, _ in self.by_density]
        if densities != sorted(set(densities)) or not all(0.0 <= density <= 1.0 for density in densities):
            raise LocalError(f"compute: by_density has densities {densities}; they must ascend within 0..1")
        if not (math.isfinite(self.sigma) and self.sigma >= 0.0):
            raise LocalError(f"compute: sigma is {self.sigma}, it must be finite and >= 0")

    def seconds(self, job: int, steps: int, density: float) -> float:
        """Seconds that job number `job` >= 0 of `steps` steps takes at this density."""
        return self._full_density_s(job, steps) * self.slowdown * self._factor(density) * self._jitter(job)

    def drawn_seconds(self, job: int, densities: Sequence[float]) -> float:
        """Seconds of a job whose steps have each a density of its own: the time of a mean density would be another."""
        first, recorded = job * len(densities), len(self.steps_s)
        steps = [self.steps_s[(first + index) % recorded] * self._factor(density) for index, density in enumerate(densities)]
        return math.fsum(steps) * self.slowdown * self._jitter(job)

    def _jitter(self, job: int) -> float:
        if not self.sigma:
            return 1.0
        return math.exp(self.sigma * float(generator(self.seed, self.stream, job).standard_normal()) - 0.5 * self.sigma**2)

    @property
    def full_step_s(self) -> float:
        """Mean seconds of a step at full density, without jitter: what a device that has measured it says."""
        return self._full_density_s(0, len(self.steps_s)) / len(self.steps_s) * self.slowdown

    def _full_density_s(self, job: int, steps: int) -> float:
        recorded = len(self.steps_s)
        if recorded == 1:
            return steps * self.steps_s[0]
        rounds, rest = divmod(steps, recorded)
        first = job * steps % recorded
        return rounds * math.fsum(self.steps_s) + math.fsum(self.steps_s[(first + index) % recorded] for index in range(rest))

    def _factor(self, density: float) -> float:
        above = bisect_right(self.by_density, (density, math.inf))
        if above == 0 or above == len(self.by_density):
            return self.by_density[min(above, len(self.by_density) - 1)][1]
        (low, low_factor), (high, high_factor) = self.by_density[above - 1 : above + 1]
        return low_factor + (high_factor - low_factor) * (density - low) / (high - low)


def read_steps(path: Path) -> tuple[float, ...]:
    """Recorded step times in seconds, one a line; the header `seconds_per_step` is optional, `#` begins a comment.

    Raises:
        LocalError: names the file and the line that does not fit.
    """
    steps = []
    for number, (seconds,) in read_rows(path, ("seconds_per_step",)):
        if seconds <= 0.0:
            raise LocalError(f"{path}:{number}: a step of {seconds} s; it must be > 0")
        steps.append(seconds)
    return tuple(steps)


class Busy:
    """How long all devices together have trained. A job that a device takes with it when it leaves counts whole."""

    def __init__(self) -> None:
        self._done_s = 0.0
        self._running: list[tuple[float, float]] = []

    def begin(self, now_s: float, seconds: float) -> None:
        self._running.append((now_s, seconds))

    def until(self, now_s: float) -> float:
        """Device seconds before `now_s`, which never goes back."""
        self._done_s += math.fsum(seconds for started_s, seconds in self._running if started_s + seconds <= now_s)
        self._running = [job for job in self._running if sum(job) > now_s]
        return self._done_s + math.fsum(now_s - started_s for started_s, _ in self._running)


def timed(train: Trainer, fleet: Mapping[str, Compute], parameters: int, begun: Callable[[float], object] = lambda _: None) -> Trainer:
    """The same training, taking the time that each device of `fleet` needs; `parameters` of the full model make density 1.

    `begun` hears how many seconds each job will take, when it begins.
    """

    def run(name: str, job: Train) -> tuple[float, Trained | TrainingFailed | Deferred]:
        _, result = train(name, job)
        if job.widths:
            drawn = drawn_levels(list(job.widths), job.steps, job.seed)
            seconds = fleet[name].drawn_seconds(job.number, [job.widths[level] / parameters for level in drawn])
        else:
            seconds = fleet[name].seconds(job.number, job.steps, job.length / parameters)
        begun(seconds)
        if isinstance(result, Deferred):
            return seconds, Deferred(lambda: _lasting(seconds, result.result()), result.drop)
        return seconds, _lasting(seconds, result)

    return run


def _lasting(seconds: float, result: Trained | TrainingFailed) -> Trained | TrainingFailed:
    return replace(result, seconds=seconds) if isinstance(result, Trained) else result
