"""Which replica a sequence goes to: where the least is left to compute, what is cached there counted as done."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import OrderedDict, abc

from hf_paged.server.front.replica import Replica
from hf_paged.server.front.sequence import Sequence

GRAIN = 64  # tokens of a prefix that are remembered as one
REMEMBERED = 20_000  # prefixes for each replica


class Router:
    """Chooses by outstanding tokens and prefix affinity.

    A replica's cost for a sequence is the tokens that it has yet to compute, and those of the prompt that it has not
    computed before. So a common prefix draws its requests to one replica, until that one is as much behind as the
    prefix is long.
    """

    def __init__(self) -> None:
        self._seen: dict[int, OrderedDict[bytes, None]] = {}
        self._turns: dict[int, int] = {}  # number of each replica's last choice: of equals the oldest is taken
        self._turn = itertools.count(1)

    def choose(self, sequence: Sequence, replicas: abc.Sequence[Replica]) -> Replica:
        """The replica of these that the sequence goes to; remembers that it did."""
        if len(replicas) == 1:
            return replicas[0]
        keys = _keys(sequence.prompt, sequence.cache_key)

        def cost(replica: Replica) -> tuple[int, int]:
            known = GRAIN * self._known(replica.index, keys)
            return replica.load + sequence.size - known, self._turns.get(replica.index, 0)

        best = min(replicas, key=cost)
        self._turns[best.index] = next(self._turn)
        self._remember(best.index, keys)
        return best

    def forget(self, replica: Replica) -> None:
        """Its process died, and its cache with it."""
        self._seen.pop(replica.index, None)

    def _known(self, index: int, keys: abc.Sequence[bytes]) -> int:
        seen: OrderedDict[bytes, None] = self._seen.get(index, OrderedDict())
        count = 0
        for key in keys:
            if key not in seen:
                break
            count += 1
        return count

    def _remember(self, index: int, keys: abc.Sequence[bytes]) -> None:
        seen = self._seen.setdefault(index, OrderedDict())
        for key in keys:
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > REMEMBERED:
            seen.popitem(last=False)


def _keys(prompt: abc.Sequence[int], cache_key: str | None) -> list[bytes]:
    """A key for each whole grain of the prompt, which stands for everything up to its end."""
    keys, key = [], (cache_key or "").encode()
    for start in range(0, len(prompt) - GRAIN + 1, GRAIN):
        grain = array("q", prompt[start : start + GRAIN]).tobytes()
        key = hashlib.blake2b(key + grain, digest_size=16).digest()
        keys.append(key)
    return keys
