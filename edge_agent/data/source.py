"""A bounded ring of labelled samples whose validation part never leaks across time.

Per group (a recording, say) the last `validation_fraction` in time is validation and everything earlier training, with
`gap` samples between them used for neither, since overlapping windows share raw data. As samples arrive the boundary
only moves forward: validation samples become gap and then training samples, and a training sample never goes back.
Samples that come with an explicit part keep it.

Samples have a sequence number for life; its remainder by the capacity is the slot. Training draws sequence numbers and
skips those whose slot was taken over since, so it never sees a newer, perhaps validation, sample in an old one's place.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError
from regrow.examples import Examples, check_labels, check_tokens

TRAIN, VALIDATION = 0, 1
_BY_RULE = -1
_FLOATS = ("float16", "float32", "float64")
_TOKENS = ("int32", "int64")


class DataSource:
    """Samples of one shape and dtype; every method may be called from any thread."""

    def __init__(self, capacity: int, validation_fraction: float = 0.2, gap: int = 0, name: str = "the data") -> None:
        """An empty source.

        Args:
            capacity: samples kept, >= 1; beyond it the oldest make room.
            validation_fraction: share of each group, by time, that is validation; 0 <= fraction < 1.
            gap: samples of each group between training and validation that are used for neither, >= 0.
            name: where they come from, for errors.
        """
        if capacity < 1 or not 0.0 <= validation_fraction < 1.0 or gap < 0:
            raise LocalError(
                f"a data source needs capacity >= 1, 0 <= validation_fraction < 1, gap >= 0; not {capacity}, {validation_fraction}, {gap}"
            )
        self.capacity = capacity
        self.validation_fraction = validation_fraction
        self.gap = gap
        self._name = name
        self._mutex = threading.Lock()
        self._x: NDArray[Any] | None = None
        self._y: NDArray[Any] = np.zeros(capacity, np.int64)  # replaced by the first samples' kind
        self._group = np.zeros(capacity, np.int64)  # position of the sample's group in the three lists below
        self._place = np.zeros(capacity, np.int64)  # of the sample in its group, counted over those split by the rule
        self._part = np.zeros(capacity, np.int8)
        self._oldest = 0  # sequence numbers of the samples kept: oldest <= number < next
        self._next = 0
        self._codes: dict[int, int] = {}
        self._first: list[int] = []  # per group: place of the oldest sample kept,
        self._count: list[int] = []  # samples seen,
        self._boundary: list[int] = []  # place of the first validation sample

    def append(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        group: int | NDArray[Any] | None = None,
        part: NDArray[Any] | None = None,
    ) -> None:
        """Add samples in the order of time; beyond the capacity the oldest go.

        Args:
            x: [m, ...] uint8 or uint16 (kept so, given out divided by the type's maximum: 0..1), float16/32/64
                (kept as float32; finite), or int32/64 (tokens, kept as int64). Shape and dtype are those of the first call.
            y: [m] any integer type, >= 0: class numbers; or [m, ...] float16/32/64, finite: values to come near to. The same in all calls.
            group: whose time runs on its own: one for all, or [m]; by default one group 0 for everything.
            part: [m], 0 training, 1 validation: overrides the rule.

        Raises:
            LocalError: what is wrong with the arguments; nothing was added.
        """
        x, y = np.asarray(x), np.asarray(y)
        check_samples(x, y)
        groups = np.broadcast_to(np.asarray(0 if group is None else group), y.shape[:1]) if _is_one(group) else group
        groups = _integers("group", groups, len(y))
        parts = np.full(len(y), _BY_RULE, np.int8) if part is None else _integers("part", part, len(y)).astype(np.int8)
        if part is not None and not np.isin(part, (TRAIN, VALIDATION)).all():
            raise LocalError("part must be 0 (training) or 1 (validation) for every sample")
        x, y = stored(x), stored_target(y)
        with self._mutex:
            if self._x is None:
                self._x, self._y = self._ring(x), self._ring(y)
            if x.shape[1:] != self._x.shape[1:] or x.dtype != self._x.dtype:
                raise LocalError(f"samples are {x.dtype}{list(x.shape[1:])}, earlier ones {self._x.dtype}{list(self._x.shape[1:])}")
            if y.shape[1:] != self._y.shape[1:] or y.dtype != self._y.dtype:
                raise LocalError(f"y is {y.dtype}{list(y.shape[1:])}, earlier ones were {self._y.dtype}{list(self._y.shape[1:])}")
            for start in range(0, len(y), self.capacity):
                piece = slice(start, start + self.capacity)
                self._insert(self._x, x[piece], y[piece], groups[piece], parts[piece])

    def _ring(self, x: NDArray[Any]) -> NDArray[Any]:
        try:
            return np.zeros((self.capacity, *x.shape[1:]), x.dtype)
        except (MemoryError, ValueError) as error:
            raise LocalError(f"no memory for {self.capacity} samples: choose a smaller capacity ({error})") from error

    def _insert(self, ring: NDArray[Any], x: NDArray[Any], y: NDArray[Any], groups: NDArray[Any], parts: NDArray[Any]) -> None:
        """Put at most `capacity` samples into the ring and move the boundaries of the groups concerned."""
        touched = self._drop(len(y) - (self.capacity - (self._next - self._oldest)))
        codes = np.array([self._code(int(group)) for group in groups], np.int64)
        slots = np.arange(self._next, self._next + len(y)) % self.capacity
        ring[slots], self._y[slots], self._group[slots], self._part[slots] = x, y, codes, parts
        for code in np.unique(codes):
            mine = slots[(codes == code) & (parts == _BY_RULE)]
            self._place[mine] = self._count[code] + np.arange(len(mine))
            self._count[code] += len(mine)
        self._next += len(y)
        for code in touched | set(codes.tolist()):
            first, count = self._first[code], self._count[code]
            # Grows with both arguments. The 1e-9 keeps 0.8 * 5 from being a little more than 4.
            boundary = math.ceil(first * self.validation_fraction + count * (1 - self.validation_fraction) - 1e-9)
            self._boundary[code] = max(self._boundary[code], boundary)

    def _drop(self, count: int) -> set[int]:
        """Forget the `count` oldest samples; returns the groups that lost some."""
        if count <= 0:
            return set()
        slots = np.arange(self._oldest, self._oldest + count) % self.capacity
        slots = slots[self._part[slots] == _BY_RULE]
        np_first = dict(zip(self._group[slots].tolist(), (self._place[slots] + 1).tolist(), strict=True))
        for code, first in np_first.items():
            self._first[code] = first
        self._oldest += count
        return set(np_first)

    def _code(self, group: int) -> int:
        if group not in self._codes:
            self._codes[group] = len(self._codes)
            self._first.append(0)
            self._count.append(0)
            self._boundary.append(0)
        return self._codes[group]

    def _numbers(self, part: int) -> NDArray[np.int64]:
        """Sequence numbers of one part, ascending; the mutex is held."""
        numbers = np.arange(self._oldest, self._next)
        slots = numbers % self.capacity
        if not len(slots):
            return numbers
        parts, places = self._part[slots], self._place[slots]
        boundary = np.array(self._boundary)[self._group[slots]]
        by_rule = places >= boundary if part == VALIDATION else places < boundary - self.gap
        return numbers[np.where(parts == _BY_RULE, by_rule, parts == part)]

    def _samples(self, numbers: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        if self._x is None:
            raise LocalError("there are no samples yet: append some, or wait for the first")
        slots = numbers % self.capacity
        return given_out(self._x[slots]), self._y[slots]

    def __len__(self) -> int:
        with self._mutex:
            return self._next - self._oldest

    def check(self, form: Examples, since: int = 0) -> int:
        """Look at all samples from number `since` on, validation too; returns the number of the next to come.

        Args:
            form: what the task takes.
            since: samples before it are known to fit.

        Raises:
            LocalError: they do not fit; it names the data, the row (samples count from 0 as they came), the value and what may be there.
        """
        with self._mutex:
            first = max(since, self._oldest)
            if self._x is None or first >= self._next:
                return self._next
            slots = np.arange(first, self._next) % self.capacity
            try:
                form.check(given_out(self._x[slots[:1]]), self._y[slots[:1]], first=first)
                if form.y_dtype is not None:
                    check_labels(self._y[slots], form.classes, first)
                if form.tokens:
                    check_tokens(self._x[slots], form.tokens, first)
            except LocalError as error:
                raise LocalError(f"{self._name}: {error}") from error
            return self._next

    @property
    def appended(self) -> int:
        """Samples that ever came, so that somebody can see whether more have come since."""
        with self._mutex:
            return self._next

    @property
    def training_size(self) -> int:
        """Samples that training may use now."""
        with self._mutex:
            return len(self._numbers(TRAIN))

    @property
    def validation_size(self) -> int:
        """Samples that validation may use now."""
        with self._mutex:
            return len(self._numbers(VALIDATION))

    def class_counts(self) -> dict[int, int]:
        """How many training samples each label has, ascending by label; labels without any are absent, and values are no labels."""
        if self._y.dtype != np.int64:
            return {}
        with self._mutex:
            labels, counts = np.unique(self._y[self._numbers(TRAIN) % self.capacity], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    def validation(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """A copy of the validation part as it is now, oldest first: x float32 or int64 [m, ...], y int64 [m] or float32 [m, ...]."""
        with self._mutex:
            return self._samples(self._numbers(VALIDATION))

    def everything(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """A copy of all samples, oldest first: for data that is held out as a whole."""
        with self._mutex:
            return self._samples(np.arange(self._oldest, self._next))

    def batches(self, rng: np.random.Generator, batch: int, steps: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield exactly `steps` batches of copies, x [<= batch, ...] and y, as `validation` gives them.

        Shuffled epochs without replacement; the last batch of an epoch may be short. Each epoch starts from the training
        part at that moment; samples that leave the ring before their turn are skipped.

        Raises:
            LocalError: `batch` or `steps` < 1, or no training samples.
        """
        if batch < 1 or steps < 1:
            raise LocalError(f"batch and steps must be at least 1, not {batch} and {steps}")
        if not self.training_size:
            raise LocalError("no training samples: append some, or lower validation_fraction or gap")
        return self._draw(rng, batch, steps)

    def _draw(self, rng: np.random.Generator, batch: int, steps: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        left = np.zeros(0, np.int64)
        for _ in range(steps):
            with self._mutex:
                left = left[left >= self._oldest]
                if not len(left):
                    left = rng.permutation(self._numbers(TRAIN))
                if not len(left):
                    raise LocalError("the training samples are gone: newer ones with part 1 took all their places")
                drawn = self._samples(left[:batch])
            left = left[batch:]
            yield drawn


def check_samples(x: NDArray[Any], y: NDArray[Any]) -> None:
    """Refuse samples that could not be trained on.

    Raises:
        LocalError: dtype, length, a label or token below 0, or a value that is not finite; with its place and the cure.
    """
    if x.dtype.name not in ("uint8", "uint16", *_TOKENS, *_FLOATS):
        raise LocalError(f"x is {x.dtype}: store it as uint8 or uint16 (scaled to 0..1), as float32, or as int64 (tokens)")
    if x.ndim < 2:
        raise LocalError(f"x has shape {list(x.shape)}: the first axis counts samples, at least one more holds features")
    if y.dtype.name in _FLOATS:
        _check_values(y, len(x))
    else:
        _check_labels(y, len(x))
    if x.dtype.kind == "f":
        _check_finite("x", x)
    elif x.dtype.name in _TOKENS and x.size and x.min() < 0:
        first = tuple(np.argwhere(x < 0)[0].tolist())
        raise LocalError(f"x{list(first)} is {x[first]}: tokens count from 0")


def stored(x: NDArray[Any]) -> NDArray[Any]:
    """Features as they are kept: pixels as they came, numbers as float32, tokens as int64."""
    if x.dtype.name in _FLOATS:
        return x.astype(np.float32, copy=False)
    return x.astype(np.int64, copy=False) if x.dtype.name in _TOKENS else x


def stored_target(y: NDArray[Any]) -> NDArray[Any]:
    """Class numbers as int64, values as float32."""
    return y.astype(np.float32 if y.dtype.kind == "f" else np.int64, copy=False)


def given_out(x: NDArray[Any]) -> NDArray[Any]:
    """Kept features as training takes them. Scaled on the way out, so that images stay one byte per pixel in the ring."""
    return x.astype(np.float32) / np.float32(np.iinfo(x.dtype).max) if x.dtype.kind == "u" else x


def _check_values(y: NDArray[Any], length: int) -> None:
    if y.shape[:1] != (length,):
        raise LocalError(f"y has shape {list(y.shape)}, but x has {length} samples: one target per sample")
    _check_finite("y", y)


def _check_labels(y: NDArray[Any], length: int) -> None:
    _integers("y", y, length)
    if len(y) and int(y.min()) < 0:
        raise LocalError(f"y[{int(y.argmin())}] is {int(y.min())}: labels count from 0")
    if len(y) and int(y.max()) > np.iinfo(np.int32).max:
        raise LocalError(f"y[{int(y.argmax())}] is {int(y.max())}: labels are class numbers below 2**31")


def _check_finite(name: str, array: NDArray[Any]) -> None:
    finite = np.isfinite(array.astype(np.float32, copy=False))
    if not finite.all():
        raise LocalError(f"{name}{np.argwhere(~finite)[0].tolist()} is not a finite float32: remove or repair that sample")


def _is_one(group: int | NDArray[Any] | None) -> bool:
    return group is None or np.ndim(group) == 0


def _integers(name: str, values: Any, length: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise LocalError(f"{name} is {array.dtype}: store it as integers, for example int64")
    if array.shape != (length,):
        raise LocalError(f"{name} has shape {list(array.shape)}, but x has {length} samples: one number per sample")
    return array
