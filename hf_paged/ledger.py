"""The ledger of patches: every change to something that isn't ours is written down, and undone in reverse."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

_MISSING = object()


class Ledger:
    """Records changes and takes them back.

    An attribute is set in, and taken from, the object's own `__dict__` where it has one, so that undoing a change
    leaves no trace: `vars(object)` is what it was.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[str, Callable[[], None]]] = []

    @property
    def entries(self) -> tuple[str, ...]:
        """What was changed, in order."""
        return tuple(what for what, _ in self._undo)

    def set_attribute(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of an object or a class."""
        own = vars(target).get(name, _MISSING)
        if isinstance(target, type):
            setattr(target, name, value)
        else:
            vars(target)[name] = value

        def undo() -> None:
            if isinstance(target, type):
                delattr(target, name) if own is _MISSING else setattr(target, name, own)
            elif own is _MISSING:
                vars(target).pop(name, None)
            else:
                vars(target)[name] = own

        self.record(f"{_describe(target)}.{name}", undo)

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a mapping."""
        before = mapping.get(key, _MISSING)
        mapping[key] = value

        def undo() -> None:
            if before is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = before

        self.record(f"{type(mapping).__name__}[{key!r}]", undo)

    def record(self, what: str, undo: Callable[[], None]) -> None:
        """Write down a change that was just made otherwise, and how to take it back."""
        self._undo.append((what, undo))

    def undo(self) -> None:
        """Take all changes back, the last one first. Doing it twice does nothing more."""
        while self._undo:
            _, undo = self._undo.pop()
            undo()


def _describe(target: Any) -> str:
    return target.__name__ if isinstance(target, type) else type(target).__name__
