"""The systems of the field by name: each is a choice among sub-model, trigger, aggregation and restoration, never code of its own.

A method is three small tables of defaults; whatever task.toml says stands above them. Sources: algorithms.md section 7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from regrow.errors import LocalError, UsageError

NEVER = 1_000_000_000
DEFAULT_METHOD = "fedgmr-pace"  # bench/triggers.py: to the same accuracy sooner than by the papers' patience rule
Defaults = Mapping[str, Mapping[str, Any]]

_NO_RESTORATION: Mapping[str, Any] = {"trigger": "none"}


def _full_model(trigger: Mapping[str, Any], **method: Any) -> Defaults:
    """Everybody trains all of it, and only what arrives counts."""
    return {"method": {"density": "full", "buffered": False, **method}, "trigger": trigger, "restoration": _NO_RESTORATION}


def _sub_models(**method: Any) -> Defaults:
    """Synchronous rounds of fixed classes."""
    chosen = {"buffered": False, "staleness": "constant", **method}
    return {"method": chosen, "trigger": {"kind": "all"}, "restoration": _NO_RESTORATION}


METHODS: Mapping[str, Defaults] = {
    # FedGMR, arXiv 2512.05372: the defaults of every table, but for our own trigger.
    "fedgmr": {"restoration": {"trigger": "plateau"}},
    # PR-FL, arXiv 2403.15439: densities from round times, accumulated gradients, hinge, recovery by 0.2.
    "prfl": {
        "method": {"density": "relative", "importance": "g", "staleness": "hinge"},
        "restoration": {"trigger": "plateau", "step": "fixed"},
    },
    # FedAvg, arXiv 1602.05629.
    "fedavg": _full_model({"kind": "all"}, staleness="constant", weigh_by_examples=True),
    # FedAsync, arXiv 1903.03934: alpha = 0.6, polynomial a = 0.5.
    "fedasync": _full_model({"kind": "arrival"}, aggregation="mix", mixing=0.6, staleness_a=0.5),
    # FedFix, arXiv 2206.10189: whoever arrived in dt, weighted by staleness.
    "fedfix": _full_model({"kind": "interval", "interval_s": 5.0}),
    # FedBuff, arXiv 2106.06639: every K arrivals, 1 / sqrt(1 + tau).
    "fedbuff": _full_model({"kind": "count", "count": 3}, aggregation="delta", staleness_a=0.5),
    # AsyncFedED, arXiv 2205.13797: a step that shrinks with the distance that the model has moved meanwhile.
    "asyncfeded": _full_model({"kind": "arrival"}, aggregation="adaptive", staleness="constant"),
    # FedMR, arXiv 2208.07677: FedAvg first, then layers shuffled among the clients; no client counts more than another.
    "fedmr": _full_model({"kind": "all"}, aggregation="recombine", staleness="constant"),
    # HeteroFL, arXiv 2010.01264: the first units of every layer, always the same.
    "heterofl": _sub_models(granularity="unit", importance="first", refresh_every=NEVER),
    # FedRolex, arXiv 2212.01548: a window of units that moves by one each round.
    "fedrolex": _sub_models(granularity="unit", importance="rolling", refresh_every=1, refresh_min_rounds=0),
    # FIARSE, arXiv 2407.19389: every round, each client's capacity of the largest |w|.
    "fiarse": _sub_models(importance="w", refresh_every=1, refresh_min_rounds=0),
    # FjORD, arXiv 2102.13451: HeteroFL's nested widths, of which a device draws one in every local step. No self-distillation.
    "fjord": _sub_models(granularity="unit", importance="first", refresh_every=NEVER, local="ordered_dropout"),
    # Sub-FedAvg (Un), arXiv 2105.00562: each device prunes a mask of its own, the mean is over those that keep a weight.
    "subfedavg": _sub_models(importance="w", refresh_every=NEVER, local="personal_masks"),
}

ASYNCHRONOUS: Defaults = {
    "method": {"buffered": True, "staleness": "polynomial"},
    "trigger": {"kind": "fastest"},
}
"""What FedGMR adds to a synchronous sub-model method before restoration: it no longer waits, and it keeps everybody's latest update."""

RESTORED: Defaults = {**ASYNCHRONOUS, "restoration": {"trigger": "plateau"}}
"""Gradual model restoration on top of another method."""

ABLATIONS: Mapping[str, Defaults] = {
    "sync": {"trigger": {"kind": "all"}},
    "no-buffer": {"method": {"buffered": False}},
    "no-restore": {"restoration": _NO_RESTORATION},
    "ga": {"method": {"aggregation": "gradient"}},
    "fa": {"method": {"aggregation": "plain"}},
    "fixed": {"restoration": {"trigger": "fixed"}},
    "pace": {"restoration": {"trigger": "pace"}},
}


def defaults_of(name: object) -> Defaults:
    """What a method's name implies; nothing for a name that validation will refuse."""
    try:
        return named(name) if isinstance(name, str) else {}
    except LocalError:
        return {}


def shortened(name: str) -> list[str]:
    """The same method without each of its additions and ablations."""
    base, addition, ablation = _parts(name)
    added, ablated = f"+{addition}" if addition else "", f"-{ablation}" if ablation else ""
    return [*([f"{base}{ablated}"] if added else []), *([f"{base}{added}"] if ablated else [])]


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """Base method, addition, ablation; "" for the base of what has not the form of a name."""
    parts = re.fullmatch(r"(\w+)(?:\+(restore|async))?(?:-([\w-]+))?", name)
    return (parts[1], parts[2], parts[3]) if parts else ("", None, None)


def named(name: str) -> dict[str, dict[str, Any]]:
    """The tables of a method, restored (`fiarse+restore`) or with one part taken away or changed (`fedgmr-fa`, `fedgmr-pace`).

    Raises:
        LocalError: no such name; the message lists them.
    """
    base, addition, ablation = _parts(name)
    if base not in METHODS or (ablation is not None and ablation not in ABLATIONS):
        known = f"known are {', '.join(METHODS)}, each with +restore or +async, or changed in a part: {', '.join(ABLATIONS)}"
        raise UsageError(f"method {name!r}: {known}")
    layers: list[Defaults] = [{"method": {"name": base}}, METHODS[base]]
    if addition:
        layers.append(RESTORED if addition == "restore" else ASYNCHRONOUS)
    if ablation:
        layers.append(ABLATIONS[ablation])
    tables: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            tables[section] = {**tables.get(section, {}), **values}
    return tables
