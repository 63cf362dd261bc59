"""What a model keeps for each token, the steps that compute requests, and the tensors of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_paged.request import Request

if TYPE_CHECKING:
    import torch

NULL_BLOCK = 0  # never handed out: tables point at it where nothing is kept


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one attention layer keeps for each token.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of a query and key head.
        value_head_dim: size of a value head; differs from `head_dim` under latent attention.
        window: tokens that a query sees, itself included, or None for all of them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a model keeps for each token: one entry for each attention layer, in the order of their layer index.

    Layers with the same window are one group and share a block table.
    """

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group: full attention first, then windows from the largest down."""
        found = {layer.window for layer in self.layers}
        return tuple(sorted(found, key=lambda window: (window is not None, -(window or 0))))

    def group_of(self, layer: int) -> int:
        """The group that a layer is in."""
        return self.windows.index(self.layers[layer].window)

    def token_bytes(self, group: int | None = None) -> int:
        """Bytes of one token's keys and values, over the layers of one group or of all."""
        window = None if group is None else self.windows[group]
        layers = [layer for layer in self.layers if group is None or layer.window == window]
        return self.dtype.itemsize * sum(x.num_kv_heads * (x.head_dim + x.value_head_dim) for x in layers)


@dataclasses.dataclass(eq=False, slots=True)
class Scheduled:
    """A request's share of a step: its tokens `start` to `start + count`, counted from the start of its prompt.

    Attributes:
        end: one past the last token of the share.
        samples: whether the step brings the request up to date, so that its last logits choose a token.
        known: whether the host knows all of the tokens; else the last one is on the device alone.
    """

    request: Request
    start: int
    count: int
    end: int = dataclasses.field(init=False)
    samples: bool = dataclasses.field(init=False)
    known: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.end = self.start + self.count
        self.samples = self.end == self.request.num_tokens
        self.known = self.end <= len(self.request.token_ids)


@dataclasses.dataclass
class Step:
    """What one forward computes.

    Attributes:
        rows: the shares, in batch order.
        copies: for each cache group, the blocks to copy before the forward: (from, to).
        preempted: requests that lost their blocks to this step.
    """

    rows: list[Scheduled]
    copies: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)
    preempted: list[Request] = dataclasses.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return sum(row.count for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The size of a batch that a CUDA graph serves: `decode` rows of one token, then `prompts` rows of any number.

    A batch that has fewer is padded: with decode rows of length 0, rows without tokens, and tokens behind the last row,
    none of which has a slot. The logits are those of each row's last token.

    Attributes:
        decode, prompts: rows.
        tokens: all of them, those of the decode rows counted.
    """

    decode: int
    tokens: int
    prompts: int

    @property
    def rows(self) -> int:
        """Rows of both kinds."""
        return self.decode + self.prompts


@dataclasses.dataclass
class Batch:
    """The tensors of one forward: T tokens of R rows, end to end, prefill and decode mixed.

    Attributes:
        rows: the shares it was built from; the length is R.
        input_ids: int64 [T].
        positions: int64 [T], the position of each token in its own sequence.
        query_start_loc: int32 [R + 1], where each row's tokens begin.
        seq_lens: int32 [R], tokens of each row that have keys after this step.
        slot_mapping: for each cache group int64 [T]: block id × block size + offset, where a token's keys are written.
        block_tables: for each cache group int32 [R, most blocks], padded with the null block.
        logits_indices: int64 [S], the flat tokens whose logits are wanted, each once; with a layout padded to
            `layout.rows`, where logits of the extra entries are ignored.
        row_starts: `query_start_loc` on the host.
        num_decode: leading rows of one token.
        fresh_from: the first of the last rows, those that read no key of an earlier step.
        sampling: the rows of `rows` that sample, each with its row of the logits.
        layout: the size that it was padded to, for a graph; None: it has the step's own.
    """

    rows: Sequence[Scheduled]
    input_ids: torch.Tensor
    positions: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: list[torch.Tensor]
    block_tables: list[torch.Tensor]
    logits_indices: torch.Tensor
    row_starts: Sequence[int]
    num_decode: int
    fresh_from: int
    sampling: Sequence[tuple[Scheduled, int]] = ()
    layout: Layout | None = None
