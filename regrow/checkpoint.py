"""The ledger as JSON and arrays, and back: a restart then replays only the records after it. Loading gives the same bits as replaying."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow import restoration
from regrow.aggregate import Update
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.member import Device
from regrow.order import Order
from regrow.parameters import Layout
from regrow.publication import CodedOrder, Publication
from regrow.shelf import Buffered, Shelf, in_memory, shelved
from regrow.task import Task
from regrow.units import Units
from regrow.values import WireDtype


class _OrderMeta(msgspec.Struct, frozen=True):
    epoch: int
    lengths: list[int]
    always_kept: int


class _BufferedMeta(msgspec.Struct, frozen=True):
    device: str
    version: int
    examples: int


class _PublishedMeta(msgspec.Struct, frozen=True):
    version: int
    epoch: int
    dtype: WireDtype
    chunk_bytes: int


class _Meta(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    epoch: int
    since_refresh: int
    elapsed_s: float
    began_s: float = 0.0
    devices: dict[str, Device]
    arrived: list[str]
    recombined: int = 0
    buffer: list[_BufferedMeta]
    orders: list[_OrderMeta]
    published: list[_PublishedMeta]
    retired: list[tuple[int, int]]
    retired_orders: list[tuple[int, list[int]]] = []
    norms: dict[int, list[float]]
    restoration: restoration.RestorationState
    global_score: float | None
    level_scores: dict[str, float]
    trained_out: bool
    finished: str
    term: int = 0


def dump(ledger: Ledger) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """(JSON, arrays) of a ledger; the arrays are the caller's to keep, the ledger never changes them in place."""
    meta = _Meta(
        version=ledger.version,
        epoch=ledger.order.epoch,
        since_refresh=ledger.since_refresh,
        elapsed_s=ledger.elapsed_s,
        began_s=ledger.began_s,
        devices=ledger.devices,
        arrived=list(ledger.arrived),
        recombined=len(ledger.recombined),
        buffer=[_BufferedMeta(who, held.version, held.examples) for who, held in ledger.buffer.items()],
        orders=[_OrderMeta(epoch, list(coded.order.lengths), coded.order.always_kept) for epoch, coded in ledger.orders.items()],
        published=[_PublishedMeta(version, item.order.epoch, item.dtype, item.chunk_bytes) for version, item in ledger.published.items()],
        retired=ledger.retired,
        retired_orders=ledger.retired_orders,
        norms=ledger.norms,
        restoration=ledger.restoration,
        global_score=ledger.global_score,
        level_scores={str(level): score for level, score in ledger.level_scores.items()},
        trained_out=ledger.trained_out,
        finished=ledger.finished,
        term=ledger.term,
    )
    arrays: dict[str, NDArray[Any]] = {
        "weights": ledger.weights,
        "anchor": ledger.anchor,
        "squares": ledger.squares,
        "flat_weights": ledger.flat_weights,
    }
    for slot, model in enumerate(ledger.recombined):
        arrays[f"recombined.{slot}"] = model
    for epoch, coded in ledger.orders.items():
        arrays[f"order.{epoch}"] = coded.order.coordinates
    for who, held in ledger.buffer.items():
        arrays[f"buffer.{who}.values"] = held.update.values
        if held.update.presence is not None:
            arrays[f"buffer.{who}.presence"] = held.update.presence
        if held.base is not None:
            arrays[f"buffer.{who}.base"] = held.base
    for version, item in ledger.published.items():
        arrays[f"published.{version}"] = np.frombuffer(item.data, np.uint8)
    return msgspec.json.encode(meta), arrays


def load(
    task: Task,
    layout: Layout,
    meta_json: bytes,
    arrays: Mapping[str, NDArray[Any]],
    units: Units | None = None,
    shelf: Shelf = in_memory,
) -> Ledger:
    """The ledger that was dumped, with its latest updates on the shelf.

    Raises:
        LocalError: the snapshot does not belong to this task or does not check out.
    """
    try:
        meta = msgspec.json.decode(meta_json, type=_Meta)
        orders = {
            item.epoch: CodedOrder.of(Order(item.epoch, arrays[f"order.{item.epoch}"].copy(), tuple(item.lengths), item.always_kept))
            for item in meta.orders
        }
        published = {
            item.version: Publication(
                item.version, orders[item.epoch].order, item.dtype, arrays[f"published.{item.version}"].tobytes(), item.chunk_bytes
            )
            for item in meta.published
        }
        weights = arrays["weights"]
        if weights.shape != (layout.size,):
            raise LocalError(f"snapshot: {weights.size} weights, the task's model has {layout.size}; was task.toml changed?")
        return Ledger(
            task=task,
            layout=layout,
            weights=weights,
            coded=orders[meta.epoch],
            anchor=arrays["anchor"],
            squares=arrays["squares"],
            recombined=[arrays[f"recombined.{slot}"] for slot in range(meta.recombined)],
            version=meta.version,
            since_refresh=meta.since_refresh,
            elapsed_s=meta.elapsed_s,
            began_s=meta.began_s,
            devices=meta.devices,
            buffer={item.device: shelved(_buffered(item, arrays), shelf) for item in meta.buffer},
            arrived=dict.fromkeys(meta.arrived),
            orders=orders,
            published=published,
            retired=meta.retired,
            retired_orders=meta.retired_orders,
            norms=meta.norms,
            restoration=meta.restoration,
            global_score=meta.global_score,
            level_scores={float(level): score for level, score in meta.level_scores.items()},
            trained_out=meta.trained_out,
            finished=meta.finished,
            term=meta.term,
            units=units,
            shelf=shelf,
        )
    except (msgspec.DecodeError, ValueError, KeyError) as error:
        raise LocalError(f"snapshot: {error}; `regrow rollback` offers older ones") from error


def _buffered(item: _BufferedMeta, arrays: Mapping[str, NDArray[Any]]) -> Buffered:
    name = f"buffer.{item.device}"
    update = Update(arrays[f"{name}.values"], arrays.get(f"{name}.presence"))
    return Buffered(update, item.version, item.examples, arrays.get(f"{name}.base"))
