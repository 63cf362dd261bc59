"""Block tables: which blocks hold a request's tokens. Prefix hash chain, copy-on-write fork, windows. No torch."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence

from hf_paged.batch import NULL_BLOCK
from hf_paged.engine.blocks import BlockPool
from hf_paged.protocols import CachePolicy
from hf_paged.request import Request


class BlockTables:
    """The block tables of all requests, one pool for each cache group.

    Args:
        windows: for each cache group its window in tokens, or None.
        num_blocks: for each group, the blocks of its pool.
        block_size: tokens of a block.
        prefix_caching: whether full blocks are found again by their tokens.
        prefer_runs: whether a request's blocks should lie in a row.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        num_blocks: Sequence[int],
        block_size: int,
        *,
        prefix_caching: bool = True,
        prefer_runs: bool = False,
        policy: CachePolicy | None = None,
    ) -> None:
        self.windows = tuple(windows)
        self.block_size = block_size
        self.prefix_queries = self.prefix_hits = 0
        self.reserved_tokens = self.used_tokens = 0
        self._prefix_caching = prefix_caching
        self._prefer_runs = prefer_runs
        self._policy = policy
        self._epoch = 0
        self.reset(num_blocks)

    def reset(self, num_blocks: Sequence[int]) -> None:
        """Begin anew with empty pools. Tables that requests still hold are void."""
        self.pools = [BlockPool(count, self._policy) for count in num_blocks]
        self._claims: dict[Request, list[range]] = {}
        self._epochs: dict[Request, int] = {}
        self._copies: list[list[tuple[int, int]]] = [[] for _ in self.pools]

    # -------------------------------------------------------------------------------------------------------- questions

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take in a group without a window."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, group: int, num_tokens: int, chunk: int) -> int:
        """Most blocks of a group that a request of `num_tokens` tokens holds at once, if a step computes `chunk`."""
        window = self.windows[group]
        if window is not None:
            num_tokens = min(num_tokens, window + chunk + self.block_size)
        return self.blocks_for(num_tokens)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests hold, of the fullest group."""
        return max(1.0 - pool.num_free / (pool.num_blocks - 1) for pool in self.pools)

    # ----------------------------------------------------------------------------------------------- a request's tables

    def admit(self, request: Request, count: int, expected: int) -> int | None:
        """Give a request its first blocks: cached ones that its tokens begin with, and blocks for `count` more at most.

        Args:
            count: tokens that the step may compute for it.
            expected: tokens that it may ever have; steers where its blocks lie.

        Returns:
            How many tokens the step computes for it, or None where the blocks don't suffice; nothing is held then.
        """
        cached = self._cached_prefix(request) if self._prefix_caching and self._shares(request) else 0
        self._epochs[request] = self._epoch
        parent = request.parent
        forks = parent is not None and self._shares(request) and len(request.prompt_token_ids) > cached
        if parent is not None and forks and self._can_fork(parent, request):
            cached = self._fork(parent, request)
        else:
            self._take_cached(request, cached)
        self._claim(request, expected)
        request.num_computed = cached
        count = min(count, len(request.token_ids) - cached)
        if not self.extend(request, cached + count):
            self._let_go(request)
            request.num_computed = 0
            return None
        if request.num_cached is None:
            request.num_cached = cached
            self.prefix_queries += len(request.prompt_token_ids)
            self.prefix_hits += cached
        return count

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Have blocks for the request's first `num_tokens` tokens, none shared where it writes. All or nothing."""
        self._slide(request)
        needed, written = self.blocks_for(num_tokens), request.num_computed // self.block_size
        shared, enough = [], True
        for table, pool in zip(request.tables, self.pools, strict=True):
            shared.append(written < len(table) and pool.refs[table[written]] > 1)
            enough = enough and needed <= len(table) and not shared[-1]
            if max(0, needed - len(table)) + shared[-1] > pool.num_free:
                return False
        if enough:  # most decode steps stay within their block
            return True
        for group, (table, pool) in enumerate(zip(request.tables, self.pools, strict=True)):
            if shared[group]:
                self._copy_on_write(request, group)
            for index in range(len(table), needed):
                table.append(pool.take(after=self._preferred(request, group, index)))
        return True

    def computed(self, request: Request, start: int, end: int) -> None:
        """The request's tokens `start` to `end` are in the cache now: let the blocks they filled be found."""
        first, full = start // self.block_size, end // self.block_size
        if first == full or not self._prefix_caching or not self._shares(request):
            return
        if self._epochs[request] != self._epoch:
            return  # it began before the cache was voided: its new keys and values rest on old ones
        keys = self._chain(request, full)
        for index in range(first, full):
            for table, pool in zip(request.tables, self.pools, strict=True):
                if table[index] != NULL_BLOCK:
                    pool.set_key(table[index], keys[index])

    def release(self, request: Request) -> None:
        """Take all blocks from a request."""
        held = [sum(block != NULL_BLOCK for block in table) for table in request.tables]
        if held:
            self.reserved_tokens += max(held) * self.block_size
            self.used_tokens += min(request.num_computed, max(held) * self.block_size)
        self._let_go(request)
        request.num_computed = 0

    def take_copies(self) -> list[list[tuple[int, int]]]:
        """The block copies that the next forward needs first, for each group; asked once a step."""
        copies, self._copies = self._copies, [[] for _ in self.pools]
        return copies

    def forget(self) -> None:
        """Void the prefix cache. Nothing that running requests compute from what they hold gets into it again."""
        self._epoch += 1
        for pool in self.pools:
            pool.forget()

    # --------------------------------------------------------------------------------------------------- prefix caching

    def _shares(self, request: Request) -> bool:
        # The logits of every prompt token are wanted, so every one has to be computed.
        return request.params.prompt_logprobs is None

    def _cached_prefix(self, request: Request) -> int:
        """Tokens, in whole blocks, that every group has; one token at least is left, for its logits."""
        blocks = (len(request.token_ids) - 1) // self.block_size
        keys = self._chain(request, blocks)
        for pool, window in zip(self.pools, self.windows, strict=True):
            if window is None:
                blocks = next((i for i in range(blocks) if pool.find(keys[i]) is None), blocks)
        while blocks:
            missing = [self._last_missing(group, keys, blocks) for group in range(len(self.pools))]
            if all(index is None for index in missing):
                break
            blocks = min(index for index in missing if index is not None)
        return blocks * self.block_size

    def _last_missing(self, group: int, keys: Sequence[bytes], blocks: int) -> int | None:
        """The last block below `blocks` that the group's window needs and lacks."""
        first = self._first_visible(group, blocks * self.block_size)
        pool = self.pools[group]
        return next((i for i in range(blocks - 1, first - 1, -1) if pool.find(keys[i]) is None), None)

    def _take_cached(self, request: Request, cached: int) -> None:
        blocks = cached // self.block_size
        keys = request.block_keys
        request.tables = []
        for group, pool in enumerate(self.pools):
            first = self._first_visible(group, cached)
            found = [pool.find(key) for key in keys[first:blocks]]
            table = [NULL_BLOCK] * first + [block for block in found if block is not None]
            for block in table[first:]:
                pool.share(block)
            request.tables.append(table)

    def _chain(self, request: Request, blocks: int) -> list[bytes]:
        """The keys of the request's first blocks: each is the hash of the one before and of the block's tokens.

        They depend on the tokens alone, so the request keeps them while it waits and when it loses its blocks.
        """
        keys, size = request.block_keys, self.block_size
        for index in range(len(keys), blocks):
            before = keys[-1] if keys else repr(request.cache_key).encode()
            tokens = array("q", request.token_ids[index * size : (index + 1) * size]).tobytes()
            keys.append(hashlib.blake2b(before + tokens, digest_size=16).digest())
        return keys

    # ---------------------------------------------------------------------------------------------- fork, copy on write

    def _can_fork(self, parent: Request, child: Request) -> bool:
        """Whether the parent still holds all that the last token of the prompt sees: its windows may have moved on."""
        last = len(child.prompt_token_ids) - 1
        if parent.num_computed <= last:
            return False
        return all(table[self._first_visible(group, last)] != NULL_BLOCK for group, table in enumerate(parent.tables))

    def _fork(self, parent: Request, child: Request) -> int:
        """Share the parent's prompt blocks, a partly filled one too; the last token is computed anew for its logits."""
        blocks = self.blocks_for(len(child.prompt_token_ids))
        child.tables = [table[:blocks] for table in parent.tables]
        for table, pool in zip(child.tables, self.pools, strict=True):
            for block in table:
                if block != NULL_BLOCK:
                    pool.share(block)
        self._epochs[child] = self._epochs[parent]
        return len(child.prompt_token_ids) - 1

    def _copy_on_write(self, request: Request, group: int) -> None:
        """Have the block that the next token is written to alone."""
        table, pool = request.tables[group], self.pools[group]
        index = request.num_computed // self.block_size
        old, new = table[index], pool.take(after=self._preferred(request, group, index))
        self._copies[group].append((old, new))
        table[index] = new
        pool.give([old])

    # --------------------------------------------------------------------------------------------------- where and when

    def _claim(self, request: Request, expected: int) -> None:
        if not self._prefer_runs:
            return
        claims = []
        for table, pool in zip(request.tables, self.pools, strict=True):
            rest = self.blocks_for(expected) - len(table)
            follow = pool.claim(rest, table[-1] + 1) if table and table[-1] != NULL_BLOCK else range(0)
            claims.append(follow if len(follow) == rest else self._claim_anew(pool, rest, follow))
        self._claims[request] = claims

    def _claim_anew(self, pool: BlockPool, length: int, partial: range) -> range:
        pool.unclaim(partial)
        return pool.claim(length)

    def _preferred(self, request: Request, group: int, index: int) -> int | None:
        """The block that the next one should follow: the one before it, or the start of the claim."""
        if not self._prefer_runs:
            return None
        table = request.tables[group]
        before = table[index - 1] if index else NULL_BLOCK
        claim = self._claims[request][group]
        if claim and before not in claim and self.pools[group].refs[claim.start] == 0:
            return claim.start - 1
        follows = before != NULL_BLOCK and (before + 1 in claim or not self.pools[group].is_claimed(before + 1))
        return before if follows else None

    def _first_visible(self, group: int, num_computed: int) -> int:
        """The first block that a query at position `num_computed` sees."""
        window = self.windows[group]
        return 0 if window is None else max(0, num_computed - window + 1) // self.block_size

    def _slide(self, request: Request) -> None:
        """Give up the blocks that fell out of a window.

        One token late: the last token of a prompt is computed anew by those forked from it in this very step.
        """
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            table = request.tables[group]
            index = min(self._first_visible(group, request.num_computed - 1), len(table)) - 1
            while index >= 0 and table[index] != NULL_BLOCK:
                self.pools[group].give([table[index]])
                table[index] = NULL_BLOCK
                index -= 1

    def _let_go(self, request: Request) -> None:
        for table, pool in zip(request.tables, self.pools, strict=False):  # no tables at all while it waits
            pool.give(reversed(table))  # the end of a prompt is given up before its beginning
        if any(self._copies):  # a copy that nobody waits for would spoil the block for its next holder
            self._copies = [
                [(old, new) for old, new in pairs if pool.refs[new]]
                for pairs, pool in zip(self._copies, self.pools, strict=True)
            ]
        self._epochs.pop(request, None)
        for claim, pool in zip(self._claims.pop(request, ()), self.pools, strict=False):
            pool.unclaim(claim)
        request.tables = []

    def check(self, live: Sequence[Request]) -> None:
        """Verify the books against the requests that hold tables.

        Raises:
            AssertionError: they don't match; a bug in hf_paged.
        """
        for group, pool in enumerate(self.pools):
            pool.check()
            held = [0] * pool.num_blocks
            for block in itertools.chain.from_iterable(r.tables[group] for r in live if r.tables):
                held[block] += block != NULL_BLOCK
            assert held == pool.refs, f"group {group}: tables and reference counts differ"
