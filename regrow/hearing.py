"""What a device listens to, and what a message on one of these topics is to it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from regrow import topics, wire
from regrow.machine import Event, Received


def own_topics(names: topics.Run, device: str, *, quiet: bool = False) -> tuple[str, ...]:
    """What a device hears of its run, whatever it is doing; quiet: without the claim, which comes every two seconds."""
    own = (names.assignment(device), names.receipt(device))
    return own if quiet else (topics.claim(names.task), *own)


def recognise(
    event: Event, device: str, names: topics.Run | None, assignment: wire.Assignment | None, parts: Container[str]
) -> tuple[Any, Any]:
    """(kind, what it says) of an event; the kind is that of TRANSITIONS, (None, None) for what is nobody's.

    Args:
        event: a message becomes what it says; any other event is its own kind.
        device: who hears it.
        names: the device's run, or None without one.
        assignment: at hand, or None.
        parts: topics of the parts that it has asked for.

    Raises:
        PeerError: the message is not what its topic promises.
    """
    if not isinstance(event, Received):
        return type(event), event
    if event.topic == topics.tasks(device):
        return "tasks", wire.decode(event.payload, wire.Tasks)[0]
    if names is None or not event.payload:
        return None, None
    if event.topic == topics.claim(names.task):
        return "claim", wire.decode(event.payload, wire.Claim)[0]
    if event.topic == names.assignment(device):
        return "assignment", wire.decode(event.payload, wire.Assignment)[0]
    if event.topic == names.receipt(device):
        return "receipt", wire.decode(event.payload, wire.Receipt)[0]
    if assignment is not None and event.topic == names.manifest(assignment.version):
        return "manifest", wire.decode(event.payload, wire.Manifest)[0]
    return ("part", event) if event.topic in parts else (None, None)
