"""The block pool: who holds which block, which blocks are cached, and which one is given next. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from hf_paged.batch import NULL_BLOCK
from hf_paged.protocols import CachePolicy


class LRUPolicy:
    """Cached blocks are given up last and in the order they were freed; blocks without a hash first."""

    def keep(self, cached: bool) -> bool:
        return cached


class BlockPool:
    """`num_blocks` blocks with reference counts, of which block 0 is kept as the null block.

    A block is *used* (held by `refs[block]` tables), or *free*. Free blocks are kept in the order in which they are
    given up. A full block may have a *key*, the hash of its tokens and all before them: it can be found by it, also
    while it is free, until it is handed out anew.

    With `prefer_runs`, a request *claims* a stretch of blocks as long as it may ever get, so that its blocks lie in a
    row and attention can read them as one view. A claim only steers the choice: blocks in it are handed to others
    when there are no more.
    """

    def __init__(self, num_blocks: int, policy: CachePolicy | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and one more, got num_blocks={num_blocks}")
        self.refs = [0] * num_blocks
        self._policy = policy or LRUPolicy()
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        self._claimed = [False] * num_blocks
        self._cursor = 1

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, the null block counted."""
        return len(self.refs)

    @property
    def num_free(self) -> int:
        """Blocks that no table holds, cached ones counted."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their key, used or free."""
        return len(self._keys)

    def grow(self, num_blocks: int) -> None:
        """Have `num_blocks` blocks from now on; the new ones are free."""
        old = self.num_blocks
        self.refs += [0] * (num_blocks - old)
        self._claimed += [False] * (num_blocks - old)
        fresh = OrderedDict.fromkeys(range(old, num_blocks))
        fresh.update(self._free)  # handed out before the blocks that the prefix cache keeps
        self._free = fresh

    # ---------------------------------------------------------------------------------------------------- take and give

    def take(self, after: int | None = None) -> int:
        """Take a free block: the one after `after` if it is free, else the first in the eviction order.

        Raises:
            IndexError: no block is free.
        """
        block = (after or 0) + 1
        if after is None or block >= self.num_blocks or self.refs[block]:
            block = self._first_unclaimed()
        del self._free[block]
        self._drop_key(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """Hold a block once more; a free one, found by its key, is used again."""
        if self.refs[block] == 0:
            del self._free[block]
        self.refs[block] += 1

    def give(self, blocks: Iterable[int]) -> None:
        """Let go of blocks, each once. Those that nobody holds any more are free."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self.refs[block] <= 0:
                raise ValueError(f"block {block} is free already")
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self._free[block] = None
                if not self._policy.keep(block in self._keys):
                    self._free.move_to_end(block, last=False)

    def _first_unclaimed(self) -> int:
        # Claims are few and lie behind what was used; looking past a handful keeps this cheap when they don't.
        first = next(iter(self._free), None)
        if first is None:
            raise IndexError("no free block")
        for block, _ in zip(self._free, range(64), strict=False):
            if not self._claimed[block]:
                return block
        return first

    # ----------------------------------------------------------------------------------------------------------- claims

    def claim(self, length: int, start: int | None = None) -> range:
        """Claim `length` free blocks in a row: from `start`, or the next stretch that is free. May come out empty."""
        if length <= 0:
            return range(0)
        if start is not None:
            end = min(start + length, self.num_blocks)
            stop = next((b for b in range(start, end) if self.refs[b] or self._claimed[b]), end)
            found = range(start, stop)
        else:
            found = self._find_run(length)
        for block in found:
            self._claimed[block] = True
        self._cursor = found.stop if found else self._cursor
        return found

    def is_claimed(self, block: int) -> bool:
        """Whether a block is in somebody's claim."""
        return block < self.num_blocks and self._claimed[block]

    def unclaim(self, claim: range) -> None:
        """Give a claim up."""
        for block in claim:
            self._claimed[block] = False

    def _find_run(self, length: int) -> range:
        """Next fit: the search goes on where the last one ended, so that what was freed longest ago is met first."""
        size = self.num_blocks
        if length >= size:
            return range(0)
        block, run = self._cursor if self._cursor < size else 1, 0
        for _ in range(size + length):
            run = 0 if self.refs[block] or self._claimed[block] else run + 1
            if run == length:
                return range(block - length + 1, block + 1)
            block += 1
            if block == size:
                block, run = 1, 0
        return range(0)

    # --------------------------------------------------------------------------------------------------- prefix caching

    def find(self, key: bytes) -> int | None:
        """The block that has a key, used or free."""
        return self._by_key.get(key)

    def set_key(self, block: int, key: bytes) -> None:
        """Let a full block be found by its key, unless another block with the same content is."""
        if key not in self._by_key and block not in self._keys:
            self._keys[block] = key
            self._by_key[key] = block

    def forget(self) -> None:
        """Void every key: what the blocks hold is no longer what the model would compute."""
        self._keys.clear()
        self._by_key.clear()

    def _drop_key(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]

    def check(self) -> None:
        """Verify the books: each block but the null block is used or free, and keys and blocks match.

        Raises:
            AssertionError: they don't; a bug in hf_paged.
        """
        assert self.refs[NULL_BLOCK] == 0
        assert NULL_BLOCK not in self._free
        for block in range(1, self.num_blocks):
            assert (self.refs[block] == 0) == (block in self._free), f"block {block}: {self.refs[block]} holders"
        assert {key: block for block, key in self._keys.items()} == self._by_key
