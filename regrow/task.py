"""task.toml: what is trained, how, and when it is done. Every key has a default; a key that we do not know is an error with its line."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, Literal

import msgspec

from regrow.errors import LocalError, UsageError
from regrow.local_rules import LocalRule
from regrow.local_step import Step
from regrow.methods import DEFAULT_METHOD, defaults_of, named
from regrow.precision import AUTO_DTYPES
from regrow.values import WireDtype

Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
# Bounded above too: TOML knows inf, and nothing that is computed from a setting may become it.
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
AboveZero = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of task.toml."""


class Method(Section, frozen=True, kw_only=True):
    """Who trains which part, and how updates become one model (algorithms: sections 1, 2, 4 and 7).

    The name chooses the defaults of this table, of [trigger] and of [restoration] (regrow.methods, composed names too); every key can
    still be set.
    """

    name: str = DEFAULT_METHOD
    density: Literal["full", "class", "relative"] = "class"
    ladder: Annotated[tuple[Fraction, ...], msgspec.Meta(min_length=1, max_length=64)] = (0.05, 0.1, 0.2, 0.5, 1.0)
    granularity: Literal["weight", "unit"] = "weight"
    importance: Literal["wg", "g", "w", "first", "rolling"] = "wg"
    layer_floor: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    layer_costs: dict[str, AboveZero] = {}
    refresh_every: AtLeastOne = 25
    refresh_min_rounds: Whole = 2
    full_density_bps: AboveZero | None = None
    aggregation: Literal["mask", "gradient", "plain", "mix", "delta", "adaptive", "recombine"] = "mask"
    recombine_after: Whole = 10
    buffered: bool = True
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    staleness_a: NotNegative = 0.6
    staleness_b: NotNegative = 4.0
    weigh_by_examples: bool = False
    eta_g: Annotated[float, msgspec.Meta(gt=0, le=2)] = 1.0
    mixing: Fraction = 0.6
    max_staleness: Whole = 0
    round_window: AtLeastOne = 5
    local: LocalRule = "plain"


class Training(Step, frozen=True, kw_only=True, omit_defaults=False):
    """The local work of one round: the step, and what is around it; the bounds are those of the wire."""

    local_steps: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 20
    batch: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 20
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 0.05
    max_steps_factor: Annotated[float, msgspec.Meta(ge=1, le=100)] = 1.0
    final_learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] | None = None
    train_last: AtLeastOne | None = None


DEFAULT_TRAINING = Training()


class Trigger(Section, frozen=True, kw_only=True):
    """When the coordinator aggregates (algorithms: section 6). count = 0 means the size of the fastest class."""

    kind: Literal["all", "arrival", "interval", "fastest", "count"] = "fastest"
    count: Whole = 0
    interval_s: NotNegative = 0.5


class Restoration(Section, frozen=True, kw_only=True):
    """Gradual model restoration (algorithms: section 5)."""

    trigger: Literal["none", "plateau", "pace", "fixed", "mixed"] = "pace"
    step: Literal["ladder", "fixed"] = "ladder"
    delta_density: Fraction = 0.2
    patience: AtLeastOne = 5
    min_delta: NotNegative = 0.001
    every: AtLeastOne = 5
    planned_s: AboveZero | None = None
    full_model_every: Whole = 20


class Wire(Section, frozen=True, kw_only=True):
    """What the values travel as, and how many versions are kept for devices that still need them."""

    up: WireDtype | Literal["auto"] = "auto"
    down: Literal["float32", "float16"] = "float16"
    versions_on_broker: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    versions_held: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16

    @property
    def dtypes(self) -> tuple[WireDtype, ...]:
        """What updates of this run may travel as, the fewest bits first."""
        return AUTO_DTYPES if self.up == "auto" else (self.up,)


class Fleet(Section, frozen=True, kw_only=True):
    """Whom to wait for, and when a device counts as gone."""

    min_devices: AtLeastOne = 1
    join_s: NotNegative = 5.0
    heartbeat_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 10.0
    min_deadline_s: AboveZero = 30.0
    max_rejections: AtLeastOne = 5
    norm_bound: Annotated[float, msgspec.Meta(gt=1, le=1e6)] = 30.0


class Evaluation(Section, frozen=True, kw_only=True):
    """Who scores the model: with `data`, the gateway on that held-out file; without, every device on its own validation data."""

    data: str | None = None


class Stop(Section, frozen=True, kw_only=True):
    """When the run ends; without any of these, when restoration has finished."""

    seconds: AboveZero | None = None
    aggregations: AtLeastOne | None = None
    accuracy: Fraction | None = None


class StoreSettings(Section, frozen=True, kw_only=True):
    """What the gateway keeps on disk."""

    snapshot_every: AtLeastOne = 50
    keep_snapshots: AtLeastOne = 5
    keep_updates: bool = False


class Task(Section, frozen=True, kw_only=True):
    """A whole task.toml."""

    name: str
    model: str = "model.onnx"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0
    method: Method = Method()
    training: Training = Training()
    trigger: Trigger = Trigger()
    restoration: Restoration = Restoration()
    wire: Wire = Wire()
    fleet: Fleet = Fleet()
    evaluation: Evaluation = Evaluation()
    stop: Stop = Stop()
    store: StoreSettings = StoreSettings()

    def __post_init__(self) -> None:
        from regrow.topics import check_name

        check_name(self.name, "task")
        try:
            named(self.method.name)
        except LocalError as error:
            raise UsageError(f"name at $.method: {error}") from error
        ladder = self.method.ladder
        if tuple(sorted(set(ladder))) != ladder or ladder[-1] != 1.0:
            raise UsageError("ladder at $.method: densities must ascend and end at 1.0, for example [0.05, 0.1, 0.2, 0.5, 1.0]")
        if self.restoration.trigger in ("fixed", "mixed") and self.restoration.planned_s is None:
            raise UsageError("trigger at $.restoration: 'fixed' and 'mixed' also need planned_s, the planned duration in seconds")
        planned_end = self.stop.seconds is not None or self.stop.aggregations is not None
        if self.method.granularity == "weight" and self.method.importance in ("first", "rolling"):
            raise UsageError('importance at $.method: "first" and "rolling" are orders of units; set granularity = "unit"')
        if self.method.granularity == "unit":
            self._check_units()
        if self.method.local == "ordered_dropout" and self.training.spans_the_round:
            key, cure = ("optimizer", 'set "sgd"') if self.training.slots else ("proximal_mu", "take it out")
            raise UsageError(f'{key} at $.training: local = "ordered_dropout" takes another part in every step, so nothing lasts; {cure}')
        if self.method.weigh_by_examples and self.method.aggregation in ("mix", "delta", "adaptive", "recombine"):
            raise UsageError("weigh_by_examples at $.method: works with aggregation mask, gradient or plain; take one of the two out")
        rounds_of_full_models = self.method.density == "full" and not self.method.buffered and self.trigger.kind == "all"
        if self.method.aggregation == "recombine" and not rounds_of_full_models:
            raise UsageError('aggregation at $.method: "recombine" needs density = "full", buffered = false and kind = "all" in [trigger]')
        if self.training.final_learning_rate is not None and not planned_end:
            raise UsageError("final_learning_rate at $.training: also needs seconds or aggregations in [stop], to know when the end is")
        if self.wire.versions_held < self.wire.versions_on_broker:
            raise UsageError("versions_held at $.wire: must be at least versions_on_broker")

    def _check_units(self) -> None:
        if self.method.layer_floor or self.method.layer_costs:
            raise UsageError('granularity at $.method: "unit" knows neither layer_floor nor layer_costs; take them out')
        if self.method.local == "personal_masks":
            raise UsageError('local at $.method: "personal_masks" are masks of single weights; set granularity = "weight"')
        if self.training.train_last is not None:
            raise UsageError('train_last at $.training: whole units are of all layers; set granularity = "weight", or take it out')


def parse_task(text: str, place: str = "task.toml") -> Task:
    """The task that the text describes.

    Raises:
        LocalError: with place and line, for anything that is not a valid task.
    """
    if sys.version_info < (3, 11):
        raise LocalError("reading task.toml needs Python 3.11 or newer: the gateway does it, devices never do")
    import tomllib

    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{place}: {error}") from error
    return task_from_tables(table, place, text)


def task_from_tables(tables: dict[str, Any], place: str, text: str = "") -> Task:
    """The task that these tables describe; `text` is where they were read from, for the line of an error.

    Raises:
        LocalError: with place and, where it is known, line, for anything that is not a valid task.
    """
    try:
        return msgspec.convert(with_method_defaults(tables), Task)
    except msgspec.ValidationError as error:
        message = str(error)
    except LocalError as error:
        message = str(error)
    line = _line_of(text, message)
    raise UsageError(f"{place}:{line}: {message}" if line else f"{place}: {message}")


def with_method_defaults(table: dict[str, Any]) -> dict[str, Any]:
    """The tables of a task with what its method's name implies filled in below what they say themselves.

    A table that is malformed stays as it is: validation has the better words for it.
    """
    filled = dict(table)
    method = table.get("method", {})
    name = None
    if isinstance(method, dict):
        filled["method"] = {"name": DEFAULT_METHOD, **method}
        name = filled["method"]["name"]
    for section, defaults in defaults_of(name).items():
        if isinstance(filled.get(section, {}), dict):
            filled[section] = {**defaults, **filled.get(section, {})}
    return filled


def _line_of(text: str, message: str) -> int | None:
    """Line of the key that a validation message names: "unknown field `x` - at `$.method`" or "... - at `$.method.x`"."""
    path = re.search(r"at `?\$((?:\.[A-Za-z_]\w*)*)", message)
    keys = path.group(1).strip(".").split(".") if path and path.group(1) else []
    unknown = re.search(r"unknown field `([^`]*)`|^(\w+) at \$", message)
    if unknown:
        keys.append(unknown.group(1) or unknown.group(2))
    if not keys:
        return None
    table, key = ".".join(keys[:-1]), keys[-1]
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([^\]]+?)\s*\]", line)
        if header:
            current = header.group(1)
            if current == ".".join(keys):
                return number
        elif current == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return number
    return None
