"""The ledger of patches: every change to something that isn't ours is written down, and undone in reverse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

_MISSING = object()


class Ledger:
    """Records changes and takes them back.

    An attribute is set in, and taken from, the object's own `__dict__` where it lives there, so that undoing a change
    leaves no trace: `vars(object)` is what it was.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[str, Callable[[], None]]] = []

    @property
    def entries(self) -> tuple[str, ...]:
        """What was changed, in order."""
        return tuple(what for what, _ in self._undo)

    def set_attribute(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of an object, a module or a class.

        A parameter, buffer or submodule of a `torch.nn.Module` is replaced where the module keeps it.
        """
        what = f"{_describe(target)}.{name}"
        own = getattr(target, "__dict__", {})
        stores = [own[store] for store in ("_parameters", "_buffers", "_modules") if name in own.get(store, ())]
        if stores:
            self.set_item(stores[0], name, value, what=what)
        elif isinstance(target, type) or not hasattr(target, "__dict__") or _is_computed(target, name):
            before = own.get(name, _MISSING) if isinstance(target, type) else getattr(target, name, _MISSING)
            setattr(target, name, value)
            self.record(what, lambda: delattr(target, name) if before is _MISSING else setattr(target, name, before))
        else:
            self.set_item(own, name, value, what=what)

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any, *, what: str | None = None) -> None:
        """Set an entry of a mapping; `what` describes the change in `entries`."""
        before = mapping.get(key, _MISSING)
        mapping[key] = value

        def undo() -> None:
            if mapping.get(key, _MISSING) is not value:
                return  # somebody else's by now, who may hold ours inside
            if before is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = before

        self.record(what or f"{type(mapping).__name__}[{key!r}]", undo)

    def record(self, what: str, undo: Callable[[], None]) -> None:
        """Write down a change that was just made otherwise, and how to take it back."""
        self._undo.append((what, undo))

    def undo(self) -> None:
        """Take all changes back, the last one first. Doing it twice does nothing more.

        Raises:
            whatever the first step that failed raised, after all the others were taken back.
        """
        failed: Exception | None = None
        while self._undo:
            _, undo = self._undo[-1]
            try:
                undo()
            except Exception as error:
                failed = failed or error
            self._undo.pop()  # afterwards: what an interrupt broke off is done by the next call
        if failed is not None:
            raise failed


def _is_computed(target: Any, name: str) -> bool:
    """Whether setting the attribute calls something, such as a property's setter: `__dict__` would go past it."""
    return hasattr(inspect.getattr_static(type(target), name, None), "__set__")


def _describe(target: Any) -> str:
    return target.__name__ if isinstance(target, type) else type(target).__name__
