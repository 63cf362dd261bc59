"""The pool: block tables and KV tensors of one size, as large as the requests at hand need."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import psutil
import torch

from hf_paged.batch import CacheSpec
from hf_paged.config import PagedConfig
from hf_paged.engine.cache import PagedKVCache
from hf_paged.engine.tables import BlockTables
from hf_paged.errors import ConfigError, InvalidRequestError
from hf_paged.protocols import AttentionBackend, CachePolicy
from hf_paged.request import Request
from hf_paged.stats import CacheStats

logger = logging.getLogger(__name__)

# Share of the free memory that a pool without a given size grows to at most. On a CPU the rest of the program, and of
# the machine, lives in the same memory.
GROWTH_LIMIT = {"cpu": 0.5, "cuda": 0.9}
# Tokens of a step: enough to fill the device, few enough that a prompt doesn't hold up the answers that have begun.
CHUNK = {"cpu": 512, "cuda": 8192}
UNBOUNDED_OUTPUT = 1024  # what a request without max_tokens is expected to need at first


class Pool:
    """Owns the KV memory of an engine: made when the first request comes, grown with need, given back on request.

    Args:
        spec: the model's layers.
        backend: decides the tensors' layout.
        config: `num_blocks` or `kv_memory` fix the size; else it grows up to a share of the free memory.
        max_model_len: most tokens of a request, or None.
        policy: in which order cached blocks are given up.

    Raises:
        ConfigError: the size asked for is larger than the memory.

    Attributes:
        tables: the block tables; the same object for the pool's life.
        chunk: most tokens of a step.
    """

    def __init__(
        self,
        spec: CacheSpec,
        backend: AttentionBackend,
        config: PagedConfig,
        max_model_len: int | None,
        policy: CachePolicy | None = None,
    ) -> None:
        self.spec = spec
        self.chunk = config.max_num_batched_tokens or CHUNK.get(spec.device.type, CHUNK["cuda"])
        self._backend = backend
        self._config = config
        self._max_model_len = max_model_len
        self._block_size = config.block_size
        self._cache: PagedKVCache | None = None
        self._limit = self._fixed_size() or self._growth_limit()
        self.tables = BlockTables(
            spec.windows,
            [2] * len(spec.windows),
            config.block_size,
            prefix_caching=config.enable_prefix_caching,
            prefer_runs=backend.prefer_runs,
            policy=policy,
        )

    @property
    def cache(self) -> PagedKVCache:
        """The KV tensors; they exist once `provide` was called."""
        assert self._cache is not None
        return self._cache

    @property
    def exists(self) -> bool:
        """Whether there are KV tensors at the moment."""
        return self._cache is not None

    def provide(self, requests: Sequence[Request]) -> None:
        """Have memory for these requests, as far as the limit goes; less makes some of them wait."""
        sizes = [pool.num_blocks for pool in self.tables.pools]
        needed = self._limit if self._fixed else self._needed(requests)
        if self._cache is not None and all(n <= size for n, size in zip(needed, sizes, strict=True)):
            return
        if self._cache is not None:  # growing copies: grow by half at least
            needed = [max(n, size + size // 2) for n, size in zip(needed, sizes, strict=True)]
        wanted = [max(size, min(n, most)) for n, size, most in zip(needed, sizes, self._limit, strict=True)]
        if self._cache is None:
            self._cache = PagedKVCache(self.spec, self._backend, wanted, self._block_size)
        elif wanted != sizes:
            try:
                self._cache.grow(wanted)
            except (MemoryError, RuntimeError) as error:  # torch's allocators raise either
                logger.warning("the KV pool stays at %s blocks, for growing it failed: %s", sizes, error)
                self._limit = wanted = sizes
        for pool, size in zip(self.tables.pools, wanted, strict=True):
            pool.grow(size)  # last: a block must never be handed out that has no memory

    def release(self) -> None:
        """Give the memory back, and with it the prefix cache."""
        self.tables.reset([2] * len(self.tables.pools))
        self._cache = None

    @property
    def longest(self) -> int:
        """Tokens of the longest request that fits when it is alone."""
        fits = [(most - 1) * self._block_size for most in self._limit]
        windowed = [self.tables.most_blocks(group, sys.maxsize, self.chunk) for group in range(len(self._limit))]
        bounds = [fit for fit, most, blocks in zip(fits, self._limit, windowed, strict=True) if blocks >= most]
        return min(bounds, default=sys.maxsize)

    def check_fits(self, num_prompt: int, max_tokens: int | None) -> None:
        """Refuse a request that doesn't fit even when it is alone.

        Raises:
            InvalidRequestError: with what it needs and what there is.
        """
        total = num_prompt + (max_tokens or 1)
        for group, most in enumerate(self._limit):
            needed = self.tables.most_blocks(group, total, self.chunk)
            if needed >= most:
                raise InvalidRequestError(
                    f"{num_prompt} prompt tokens and max_tokens={max_tokens} need {needed} KV blocks of "
                    f"{self._block_size} tokens; the pool has {most - 1} at most; shorten the request, or raise "
                    "num_blocks or kv_memory"
                )

    def stats(self, num_preemptions: int) -> CacheStats:
        """How the pool is and was used."""
        tables = self.tables
        made = self._cache is not None
        return CacheStats(
            num_blocks=sum(pool.num_blocks - 1 for pool in tables.pools) if made else 0,
            num_free=sum(pool.num_free for pool in tables.pools) if made else 0,
            pool_bytes=self._cache.nbytes if self._cache is not None else 0,
            reserved_tokens=tables.reserved_tokens,
            used_tokens=tables.used_tokens,
            prefix_queries=tables.prefix_queries,
            prefix_hits=tables.prefix_hits,
            num_preemptions=num_preemptions,
        )

    # ------------------------------------------------------------------------------------------------------------ sizes

    @property
    def _fixed(self) -> bool:
        return self._config.num_blocks is not None or self._config.kv_memory is not None

    def _needed(self, requests: Sequence[Request]) -> list[int]:
        """For each group, the blocks that the requests may hold at once, the null block, and one to copy on write."""
        needed = []
        for group in range(len(self.spec.windows)):
            lengths = [self._expected(request) for request in requests]
            needed.append(2 + sum(self.tables.most_blocks(group, length, self.chunk) for length in lengths))
        return needed

    def _expected(self, request: Request) -> int:
        most = request.params.max_tokens
        length = len(request.prompt_token_ids) + most if most else len(request.token_ids) + UNBOUNDED_OUTPUT
        return min(length, self._max_model_len) if self._max_model_len else length

    def _fixed_size(self) -> list[int] | None:
        """The blocks of each group under `num_blocks` or `kv_memory`, or None."""
        config, windows = self._config, self.spec.windows
        if config.num_blocks is not None:
            size = [config.num_blocks + 1] * len(windows)
            self._check_memory(size, f"num_blocks={config.num_blocks}")
            return size
        if config.kv_memory is None:
            return None
        share = isinstance(config.kv_memory, float)
        budget = int(config.kv_memory * free_memory(self.spec.device)) if share else int(config.kv_memory)
        size = self._split(budget)
        if min(size) < 2:
            least = sum(2 * self._block_size * self.spec.token_bytes(group) for group in range(len(windows)))
            raise ConfigError(f"kv_memory={config.kv_memory!r} is {budget} bytes; two blocks take {least}; raise it")
        self._check_memory(size, f"kv_memory={config.kv_memory!r}")
        return size

    def _growth_limit(self) -> list[int]:
        device = self.spec.device
        share = GROWTH_LIMIT.get(device.type, GROWTH_LIMIT["cuda"])
        return [max(size, 2) for size in self._split(int(share * free_memory(device)))]

    def _split(self, budget: int) -> list[int]:
        """Blocks for each group from bytes for all, so that a long request fills no group much before another."""
        length = self._max_model_len or 8192
        weights = [self._blocks_under(window, length) for window in self.spec.windows]
        row = sum(w * self._block_size * self.spec.token_bytes(group) for group, w in enumerate(weights))
        return [budget * weight // row for weight in weights]

    def _blocks_under(self, window: int | None, length: int) -> int:
        """Blocks that a request of `length` tokens holds in a group with that window."""
        visible = length if window is None else min(length, window + self.chunk)
        return -(-visible // self._block_size) + 1

    def _check_memory(self, size: Sequence[int], option: str) -> None:
        asked = sum(n * self._block_size * self.spec.token_bytes(group) for group, n in enumerate(size))
        free = free_memory(self.spec.device)
        if asked > free:
            raise ConfigError(
                f"{option} asks for a KV pool of {asked / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free on "
                f"{self.spec.device}; lower it, or leave it out and the pool grows with need"
            )


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        # What torch holds without using it can be had as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
