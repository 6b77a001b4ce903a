"""What is kept for the next transfer, bounded in number: channels, peers' memories, NIXL's peers and agents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tandem.errors import Overloaded

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(eq=False)
class Kept(Generic[Value]):
    value: Value
    users: set[object] = field(default_factory=set)


class IdlePool(Generic[Key, Value]):
    """At most so many values, by key, each in use by some users or idle. One more takes the place of the one that has
    been idle longest. A pool belongs to one thread.
    """

    def __init__(self, most: int, close: Callable[[Value], None], full: str) -> None:
        """close: gets what makes room. full: what Overloaded says when all are in use."""
        self._most = most
        self._close = close
        self._full = full
        # The one used last at the end. The pool's owner may take one out, and close it.
        self.kept: OrderedDict[Key, Kept[Value]] = OrderedDict()

    def enter(self, key: Key, user: object, make: Callable[[], Value]) -> Value:
        """The value of this key, made if there is none, and in use until `leave`. Raises Overloaded, or as `make`."""
        if key not in self.kept:
            self._make_room()
            self.kept[key] = Kept(make())
        self.kept.move_to_end(key)
        self.kept[key].users.add(user)
        return self.kept[key].value

    def leave(self, key: Key, user: object) -> None:
        """Whether it is a user or not."""
        if key in self.kept:
            self.kept.move_to_end(key)
            self.kept[key].users.discard(user)

    @contextmanager
    def use(self, key: Key, make: Callable[[], Value]) -> Iterator[Value]:
        """From `enter` to `leave`."""
        user = object()
        value = self.enter(key, user, make)
        try:
            yield value
        finally:
            self.leave(key, user)

    def _make_room(self) -> None:
        if len(self.kept) < self._most:
            return
        idle = next((key for key, kept in self.kept.items() if not kept.users), None)
        if idle is None:
            raise Overloaded(self._full)
        self._close(self.kept.pop(idle).value)
