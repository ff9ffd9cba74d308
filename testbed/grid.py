"""What a comparison runs: methods x settings x seeds, and the equal tuning budget that each of them gets before."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import tomllib

from regrow.errors import UsageError
from testbed.outcome import Outcome, Spec

Settings = Mapping[str, Any]
Choices = Mapping[str, Sequence[Any]]
"""Keys of task.toml, dotted, with the values to try."""


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: `settings` are its own, above those that all rows share; `cell` are those that came from the grid."""

    method: str
    settings: Settings
    cell: Settings
    name: str


@dataclass(frozen=True)
class Choice:
    """What tuning gave: the chosen values, and the validation accuracy of each combination tried, in order; None where the run failed.

    `tuned_as` names the row whose runs decided, with this seed and so many virtual seconds."""

    chosen: Settings
    tried: Sequence[tuple[Settings, float | None]]
    tuned_as: str
    seed: int
    seconds: float


def variants_of(methods: Sequence[str], grid: Choices, own: Sequence[tuple[str, str, Any]]) -> list[Variant]:
    """A variant for each cell of the grid and method, the grid's first cell first.

    Args:
        methods: names, each once.
        grid: keys and their values; nothing gives one variant a method.
        own: (method, key, value) of settings for one method.

    Raises:
        LocalError: `own` names a method that is not compared, or a key of the grid.
    """
    for method, key, _ in own:
        if method not in methods:
            raise UsageError(f"--set-for {method}: it is not among --methods {','.join(methods)}")
        if key in grid:
            raise UsageError(f"--set-for {method}:{key}: --grid varies this key; give it once")
    variants = []
    for cell in cells_of(grid):
        for method in methods:
            settings = {key: value for name, key, value in own if name == method}
            variants.append(Variant(method, {**settings, **cell}, cell, row_name(method, cell)))
    return variants


def cells_of(choices: Choices) -> list[dict[str, Any]]:
    """Every combination of values, the last key changing first; one empty combination where there is nothing to choose."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def row_name(method: str, cell: Settings) -> str:
    """`method`, or `method[key=value,...]` with the keys' last parts where these tell them apart."""
    if not cell:
        return method
    last = [key.rpartition(".")[2] for key in cell]
    keys = last if len(set(last)) == len(last) else list(cell)
    return f"{method}[{','.join(f'{key}={as_text(value)}' for key, value in zip(keys, cell.values(), strict=True))}]"


def as_text(value: object) -> str:
    """A setting's value for people; text without its quotes."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def specs_of(base: Spec, variants: Sequence[Variant], seeds: int, choices: Mapping[str, Choice] | None = None) -> dict[str, list[Spec]]:
    """The runs of each row: one for each seed, with what tuning chose for it."""
    rows = {}
    for variant in variants:
        tuned = choices[variant.name].chosen if choices else {}
        settings = {**base.settings, **variant.settings, **tuned}
        rows[variant.name] = [
            msgspec.structs.replace(base, method=variant.method, settings=settings, seed=base.seed + index) for index in range(seeds)
        ]
    return rows


def by_seed(rows: Mapping[str, Sequence[Spec]]) -> list[Spec]:
    """All runs, the seeds outside: an interrupted comparison is still one of all rows."""
    return [spec for specs in zip(*rows.values(), strict=True) for spec in specs]


# ---- tuning ------------------------------------------------------------------------------------------------------------------------


def base_method(method: str) -> str:
    """The method that an ablation or a restored method comes from: `fiarse` of `fiarse+restore`."""
    return re.split(r"[+-]", method, maxsplit=1)[0]


def tuning_seed(base: Spec, seeds: int) -> int:
    """A seed, hence a split and link draws, that no compared run has."""
    return base.seed - 1 if base.seed else base.seed + seeds


def tuning_variants(variants: Sequence[Variant], tune: Choices, with_base: bool) -> dict[str, Variant]:
    """By row: the variant whose tuning decides for it: itself, or its base method's in the same cell of the grid.

    Raises:
        LocalError: a row's own setting or the grid gives a key that is to be tuned.
    """
    by_name = {variant.name: variant for variant in variants}
    deciding = {}
    for variant in variants:
        for key in tune:
            if key in variant.settings:
                raise UsageError(f"--tune {key}: {variant.name} has a value for it from --grid or --set-for; give it once")
        method = base_method(variant.method) if with_base else variant.method
        name = row_name(method, variant.cell)
        deciding[variant.name] = by_name.get(name) or Variant(method, variant.cell, variant.cell, name)
    return deciding


def tuning_specs(base: Spec, variants: Sequence[Variant], tune: Choices, seed: int, seconds: float) -> dict[str, list[Spec]]:
    """For each row that is tuned: one run with each combination of values, in order."""
    common = msgspec.structs.replace(base, seed=seed, seconds=seconds)
    return {
        variant.name: [
            msgspec.structs.replace(common, method=variant.method, settings={**base.settings, **variant.settings, **cell})
            for cell in cells_of(tune)
        ]
        for variant in variants
    }


def choose(row: str, tune: Choices, outcomes: Sequence[Outcome | None], seed: int, seconds: float) -> Choice | None:
    """The combination with the best accuracy on the devices' own validation data, the first of equals; None where every run failed.

    Test data has no say.

    Args:
        row: what was tuned.
        tune: the keys and values of `tuning_specs`.
        outcomes: its outcomes in this order; None for a run that failed.
        seed: of these runs.
        seconds: virtual seconds of each.
    """
    cells = cells_of(tune)
    tried = [(cell, None if outcome is None else outcome.validation_accuracy) for cell, outcome in zip(cells, outcomes, strict=True)]
    scores = [-1.0 if accuracy is None else accuracy for _, accuracy in tried]
    if max(scores) < 0:
        return None
    return Choice(cells[scores.index(max(scores))], tried, row, seed, seconds)


# ---- options -----------------------------------------------------------------------------------------------------------------------


def parse_settings(texts: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`table.key=value` settings, values as in TOML.

    Raises:
        LocalError: not of this form.
    """
    form = "write TABLE.KEY=VALUE as in task.toml, for example training.local_steps=5; text in quotes"
    return {key: value for text in texts for key, value in [_parsed(text, option, "{}", form)]}


def parse_choices(texts: Sequence[str], option: str) -> dict[str, list[Any]]:
    """`table.key=v1,v2,...` settings with several values each, as in TOML.

    Raises:
        LocalError: not of this form, a key twice, or a value twice.
    """
    form = "write TABLE.KEY=V1,V2,... as in task.toml, for example training.learning_rate=0.05,0.1; text in quotes"
    choices: dict[str, list[Any]] = {}
    for text in texts:
        key, values = _parsed(text, option, "[{}]", form)
        if key in choices:
            raise UsageError(f"{option} {text!r}: {key} is there twice; give all its values at once")
        if not values or len({as_text(value) for value in values}) < len(values):
            raise UsageError(f"{option} {text!r}: give one value or more, each once")
        choices[key] = values
    return choices


def parse_own(texts: Sequence[str]) -> list[tuple[str, str, Any]]:
    """`method:table.key=value` settings of one method, as (method, key, value).

    Raises:
        LocalError: not of this form.
    """
    own = []
    for text in texts:
        method, colon, setting = text.partition(":")
        if not colon:
            raise UsageError(f"--set-for {text!r}: write METHOD:TABLE.KEY=VALUE, for example fedavg:training.learning_rate=0.1")
        own += [(method.strip(), key, value) for key, value in parse_settings([setting], "--set-for").items()]
    return own


def _parsed(text: str, option: str, brackets: str, form: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        parsed = tomllib.loads(f"value = {brackets.format(value)}")
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{option} {text!r}: {form}") from error
    if not equals or not key.strip() or set(parsed) != {"value"}:
        raise UsageError(f"{option} {text!r}: {form}")
    return key.strip(), parsed["value"]
