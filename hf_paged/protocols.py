"""Who acts on the data of `types`: the protocols between the engine and its model, its backend and its plugins.

An object fits a protocol when it has its attributes and methods; it need not derive from it. What the engine calls, it
calls from the thread that steps it, and at one of these paces:

- when the KV pool is made, and when it grows: `AttentionBackend.kv_layout`
- when a caller comes with requests: `PagedModel.fingerprint`
- once a step: `AttentionBackend.plan`, `PagedModel.forward`, `LogitsProcessor`, `TokenSampler`, `StepObserver`
- once for each new token of a request that has one: `Constraint`
- once a layer: `LayerPlan.run`
- once for each block freed: `CachePolicy`

None of the others is called once a token. Data is in `types`, which imports nothing of this.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

from hf_paged.types import Batch, CacheSpec, Request, Sampled, StepStats

if TYPE_CHECKING:
    import torch


class PagedModel(Protocol):
    """A model as the engine sees it: it maps the tokens of a batch to logits, and asks the plan for attention.

    Attributes:
        spec: what its attention layers keep.
        vocab_size: token ids that it reads lie below it.
        num_logits: token ids that it writes lie below it.
        max_positions: tokens that its positions reach, or None.
    """

    spec: CacheSpec
    vocab_size: int
    num_logits: int
    max_positions: int | None

    def forward(self, batch: Batch, plan: LayerPlan) -> torch.Tensor:
        """Logits [S, vocabulary] of the tokens `batch.logits_indices`."""
        ...

    def fingerprint(self) -> Hashable:
        """A value that changes when the weights, or what else decides the keys and values, may have changed."""
        ...


class KVCache(Protocol):
    """The KV tensors as a backend sees them: it writes into them, and leaves the cache's attributes alone."""

    @property
    def spec(self) -> CacheSpec:
        """The model's layers."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        ...

    @property
    def keys(self) -> Sequence[torch.Tensor]:
        """For each layer its key pool, in the backend's layout. Lives for a step: a pool that grows gets another."""
        ...

    @property
    def values(self) -> Sequence[torch.Tensor]:
        """For each layer its value pool, likewise."""
        ...


class AttentionBackend(Protocol):
    """Attention over paged keys and values. Built once an engine; `plan` is called once a step.

    Attributes:
        prefer_runs: whether a request's blocks should lie in a row where they can.
    """

    prefer_runs: bool

    def kv_layout(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], int]:
        """The shape of one layer's key (or value) pool, and the dimension in it that counts blocks."""
        ...

    def plan(self, batch: Batch, cache: KVCache) -> LayerPlan:
        """Prepare a step; `cache` holds the layers' tensors."""
        ...


class LayerPlan(Protocol):
    """One step's work, prepared: `run` is called once a layer."""

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values to the cache, and attend.

        Args:
            layer: index into `CacheSpec.layers`.
            query: [T, num_heads, head_dim], RoPE applied.
            key, value: [T, num_kv_heads, head_dim], [T, num_kv_heads, value_head_dim].
            scale: multiplies the scores.
            softcap: scores become softcap · tanh(score / softcap).
            sinks: [num_heads], a logit that joins each head's softmax and has no value.

        Returns:
            [T, num_heads, value_head_dim] in the query's dtype.
        """
        ...


class CachePolicy(Protocol):
    """In which order blocks that no request holds are given up."""

    def keep(self, cached: bool) -> bool:
        """Whether a block just freed goes to the end of the eviction order, or else to its front.

        Args:
            cached: whether the prefix cache can find it.
        """
        ...


class TokenSampler(Protocol):
    """Turns logits into tokens for the requests that carry it. Called once a step with all of its rows."""

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        """Choose for each request from its row of `logits`, [rows, vocabulary] as the model gave them."""
        ...


class LogitsProcessor(Protocol):
    """Changes the logits of a batch before the engine's own sampler draws. Batched, on the device, without a sync.

    It may also have `concerns(request) -> bool`: whether it would change that request's logits at all. It is left out
    of a batch none of whose requests concerns it, and one without the method concerns every request. With
    `needs_tokens = True` it looks at the tokens of the requests that concern it, so all of them have to be known.

    Attributes:
        graph_safe: whether it may be captured in a CUDA graph: fixed shapes, no host value read.
    """

    graph_safe: bool

    def process(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        """New logits [rows, vocabulary], float32; may change them in place."""
        ...


class Constraint(Protocol):
    """What one request's output has to be like, kept in step with its tokens; see the hook `constrain_request`."""

    def advance(self, request: Request) -> bool:
        """Take in the request's new tokens; called after each, and harmless when called again.

        Returns:
            Whether the output is complete: nothing can follow, and the request ends.

        Raises:
            whatever is to end this request alone.
        """
        ...


class StepObserver(Protocol):
    """Sees each step of the engine, on the host, after its forward was launched."""

    def __call__(self, stats: StepStats) -> None:
        """Take note of a step that is done."""
        ...
