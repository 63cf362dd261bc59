"""The ledger of patches: every change to something that isn't ours is written down, and undone in reverse."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

_MISSING = object()
_GONE = object()  # a value that was collected; an entry may be None


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
            self._set_own(target, name, value, what)

    def _set_own(self, target: Any, name: str, value: Any, what: str) -> None:
        """Set an entry of an object's `__dict__`. Neither object nor value is kept alive for the sake of undoing it."""
        before = target.__dict__.get(name, _MISSING)
        target.__dict__[name] = value
        place, mine = _weakly(target), _weakly(value)

        def undo() -> None:
            found = place()
            if found is not _GONE:
                _put_back(found.__dict__, name, mine(), before)

        self.record(what, undo)

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any, *, what: str | None = None) -> None:
        """Set an entry of a mapping; `what` describes the change in `entries`."""
        before = mapping.get(key, _MISSING)
        mapping[key] = value

        self.record(what or f"{type(mapping).__name__}[{key!r}]", lambda: _put_back(mapping, key, value, before))

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


def _put_back(mapping: MutableMapping[Any, Any], key: Any, mine: Any, before: Any) -> None:
    """Restore the previous entry, unless something else has replaced ours."""
    if mapping.get(key, _MISSING) is not mine:
        return
    if before is _MISSING:
        mapping.pop(key, None)
    else:
        mapping[key] = before


def _weakly(value: Any) -> Callable[[], Any]:
    """A weak reference to the value; a strong one where it can't be weakly referenced. Called, it gives it or _GONE."""
    try:
        reference = weakref.ref(value)
    except TypeError:
        return lambda: value

    def get() -> Any:
        found = reference()
        return _GONE if found is None else found

    return get


def _is_computed(target: Any, name: str) -> bool:
    """Whether setting the attribute calls something, such as a property's setter: `__dict__` would go past it."""
    return hasattr(inspect.getattr_static(type(target), name, None), "__set__")


def _describe(target: Any) -> str:
    return target.__name__ if isinstance(target, type) else type(target).__name__
