"""What a module's attributes are while the engine computes a step, and at no other time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_paged.forks import after_fork, renewed_after_fork

_MISSING = object()


@dataclasses.dataclass
class _Active:
    """An attribute that is swapped at the moment.

    Attributes:
        before: what the module's owner gave it, or `_MISSING`.
        holders: the swaps with a step under way.
    """

    module: nn.Module
    name: str
    value: Any
    before: Any
    holders: set[object] = dataclasses.field(default_factory=set)

    def take_off(self) -> None:
        own = vars(self.module)
        if own.get(self.name, _MISSING) is not self.value:
            return  # somebody replaced it meanwhile
        if self.before is _MISSING:
            del own[self.name]
        else:
            own[self.name] = self.before


_lock = renewed_after_fork(threading.RLock())  # a collection that begins under it may take swaps off
_active: dict[tuple[int, str], _Active] = {}


class Swaps:
    """Attributes that are put on modules when a step begins, and taken off when the last one under way has ended.

    Between steps a model is what its owner made it: compilers, tracers, profilers and copies find nothing of ours. A
    forward of another thread may meet an attribute during a step, so a swapped `forward` has to serve that as well.
    Engines of one model may share attributes, with the same values.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[nn.Module, str, Any]] = []
        self._steps: set[object] = set()

    def add(self, module: nn.Module, name: str, value: Any) -> None:
        """Have `module.name` be `value` during steps. Not while one is under way."""
        self._entries.append((module, name, value))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Have the attributes on inside."""
        step = object()
        try:
            if self._entries:
                self._begin(step)
            yield
        finally:
            try:
                self._end(step)
            except BaseException:  # an interrupt must not leave them on
                self._end(step)
                raise

    def clear(self) -> None:
        """Take the attributes off, and forget them."""
        with _lock:
            self._steps.clear()
            self._let_go()
            self._entries.clear()

    def _begin(self, step: object) -> None:
        with _lock:
            first = not self._steps
            self._steps.add(step)
            for module, name, value in self._entries if first else ():
                key = id(module), name
                if key not in _active:
                    _active[key] = _Active(module, name, value, vars(module).get(name, _MISSING))
                    vars(module)[name] = value
                _active[key].holders.add(self)

    def _end(self, step: object) -> None:
        with _lock:
            self._steps.discard(step)
            if not self._steps:
                self._let_go()

    def _let_go(self) -> None:
        for module, name, _ in self._entries:
            active = _active.get((id(module), name))
            if active is not None:
                active.holders.discard(self)
                if not active.holders:
                    active.take_off()
                    del _active[id(module), name]


def at_rest(module: nn.Module, name: str) -> Any:
    """An attribute in the module's own `__dict__` as it is between steps, or None."""
    own = vars(module)
    if name not in own:
        return None
    with _lock:
        active = _active.get((id(module), name))
        found = own.get(name) if active is None else active.before
    return None if found is _MISSING else found


@after_fork
def _take_all_off() -> None:
    """The steps under way in other threads are not in a forked child."""
    for active in _active.values():
        active.take_off()
    _active.clear()
