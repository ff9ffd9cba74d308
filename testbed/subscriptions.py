"""Which clients listen to a topic: MQTT filters of plain levels and `+`, found without looking at every client."""

from __future__ import annotations


def matches(pattern: str, topic: str) -> bool:
    """Whether an MQTT filter of plain levels and `+` matches a topic."""
    wanted, levels = pattern.split("/"), topic.split("/")
    return len(wanted) == len(levels) and all(w in ("+", level) for w, level in zip(wanted, levels, strict=True))


class Subscriptions:
    """Who listens to what; the listeners are found in a time that depends on the shapes in use (a handful), not on the filters.

    A filter's shape is where its `+` stand: a topic has one possible filter of each shape, which is looked up by its text.
    """

    def __init__(self) -> None:
        self._listeners: dict[str, set[str]] = {}
        self._shapes: dict[int, dict[tuple[int, ...], int]] = {}  # levels -> shape -> how many filters have it

    def add(self, name: str, pattern: str) -> None:
        if pattern not in self._listeners:
            levels, shape = shape_of(pattern)
            shapes = self._shapes.setdefault(levels, {})
            shapes[shape] = shapes.get(shape, 0) + 1
        self._listeners.setdefault(pattern, set()).add(name)

    def remove(self, name: str, pattern: str) -> None:
        names = self._listeners.get(pattern, set())
        names.discard(name)
        if not names and self._listeners.pop(pattern, None) is not None:
            levels, shape = shape_of(pattern)
            self._shapes[levels][shape] -= 1
            if not self._shapes[levels][shape]:
                del self._shapes[levels][shape]

    def listeners(self, topic: str) -> set[str]:
        """Everybody with a filter that matches."""
        found: set[str] = set()
        levels = topic.split("/")
        for shape in self._shapes.get(len(levels), ()):
            pattern = topic
            if shape:
                wanted = levels.copy()
                for place in shape:
                    wanted[place] = "+"
                pattern = "/".join(wanted)
            found.update(self._listeners.get(pattern, ()))
        return found


def shape_of(pattern: str) -> tuple[int, tuple[int, ...]]:
    """How many levels a filter has, and which of them are `+`."""
    levels = pattern.split("/")
    return len(levels), tuple(place for place, level in enumerate(levels) if level == "+")
