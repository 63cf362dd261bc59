"""PagedConfig: the options of one engine, validated when built and never changed after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from hf_paged.errors import ConfigError

OnUnsupported = Literal["warn", "error", "silent"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedConfig:
    """Options of a paged engine.

    Attributes:
        block_size: tokens a KV block holds; a power of two.
        num_blocks: KV blocks of the pool; None: as many as the requests at hand need, growing with them.
        kv_memory: bytes that the KV pool may take (an int), or a share in (0, 1] of what is free when the pool is made.
        max_num_seqs: most requests in one step.
        max_num_batched_tokens: most tokens in one step, prompt chunks and decode rows together; None: by device.
        max_model_len: most tokens of one request, prompt and output; None: what the model's positions allow.
        enforce_eager: run every forward eagerly, without CUDA graphs.
        fusions: have fused forwards take the place of parts of a model's layers in the engine's steps, each verified
            first.
        deterministic: a request's results, greedy or with a seed, have the same bits whatever else is in its batch:
            proved when the engine is built, and slower. It needs a backend that offers it, and on a GPU `fusions`; not
            every family can.
        enable_prefix_caching: keep finished requests' blocks, and reuse those whose tokens a prompt begins with.
        attention_backend: a registered backend's name, or None: the plugins choose by model and device.
        scheduler: a registered scheduler's name.
        cache_policy: a registered cache policy's name.
        on_unsupported: what a call that the engine can't carry does: run stock `generate()` and warn once per
            reason ("warn"), do so silently ("silent"), or raise ("error").
        keep_pool: keep the KV pool, and with it the prefix cache, between calls. False gives the memory back when the
            last caller leaves. None: True inside `paged()` and for `LLM`, False for `patch()`.
        plugins: plugin objects for this engine alone, beside the bundled and the installed ones.
        disable_plugins: names of bundled or installed plugins to leave out.

    Raises:
        ConfigError: a value is out of range or contradicts another; the message names it and what is allowed.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_memory: int | float | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    enforce_eager: bool = False
    fusions: bool = True
    deterministic: bool = False
    enable_prefix_caching: bool = True
    attention_backend: str | None = None
    scheduler: str = "fcfs"
    cache_policy: str = "lru"
    on_unsupported: OnUnsupported = "warn"
    keep_pool: bool | None = None
    plugins: tuple[object, ...] = ()
    disable_plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        size = self.block_size
        if not _positive(size) or size & (size - 1):
            raise ConfigError(f"block_size must be a power of two, got {size!r}")
        for name in ("num_blocks", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise ConfigError(f"{name} must be an integer of at least 1, or None, got {value!r}")
        if not _positive(self.max_num_seqs):
            raise ConfigError(f"max_num_seqs must be an integer of at least 1, got {self.max_num_seqs!r}")
        for name in ("enforce_eager", "fusions", "deterministic", "enable_prefix_caching", "keep_pool"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "keep_pool" and value is None):
                raise ConfigError(f"{name} must be True or False, got {value!r}")
        for name in ("plugins", "disable_plugins"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a tuple, got {getattr(self, name)!r}")
        self._check_memory()
        if self.on_unsupported not in ("warn", "error", "silent"):
            raise ConfigError(f"on_unsupported must be 'warn', 'error' or 'silent', got {self.on_unsupported!r}")

    def _check_memory(self) -> None:
        memory = self.kv_memory
        if memory is None:
            return
        if self.num_blocks is not None:
            raise ConfigError(f"num_blocks={self.num_blocks} and kv_memory={memory!r} both size the pool; give one")
        share = isinstance(memory, float) and 0.0 < memory <= 1.0
        if not share and not _positive(memory):
            raise ConfigError(f"kv_memory must be bytes (an integer) or a share in (0, 1], got {memory!r}")

    @classmethod
    def of(cls, config: PagedConfig | None, options: Mapping[str, Any]) -> PagedConfig:
        """The options of a call that takes a config (None: the defaults) and single options over those of the config.

        Raises:
            ConfigError: `config` is no PagedConfig; an option is unknown, or its value is out of range.
        """
        if config is not None and not isinstance(config, cls):
            raise ConfigError(f"config must be a PagedConfig, got {config!r}; single options are keywords")
        return (config or cls()).replace(**options)

    def replace(self, **changes: Any) -> PagedConfig:
        """A copy with some options changed, validated anew.

        Raises:
            ConfigError: an option is unknown, or its value is out of range.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ConfigError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
