"""The protocols between the engine and its model, its backend and its plugins.

An object fits a protocol when it has its attributes and methods; it need not derive from it. What the engine calls, it
calls from the thread that steps it, and at one of these paces:

- when the KV pool is made, and when it grows: `AttentionBackend.kv_layout`
- when a caller comes with requests: `PagedModel.fingerprint`, `PagedModel.graph_key`
- once a step: `AttentionBackend.plan`, `PagedModel.forward`, `LogitsProcessor`, `TokenSampler`, `StepObserver`
- once for each new token of a request that has one: `Constraint`
- once a step, when tokens are chosen on the device: `SamplingKernels`
- once a layer: `LayerPlan.run`, `RotaryPlan.run_rotary`, `Kernels`
- once for each block freed: `CachePolicy`

None of the others is called once a token. The data that they act on is in `request`, `batch` and
`stats`, which import nothing of this; what a request carries, `TokenSampler` and `Constraint`, is in `request`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

from hf_paged.batch import Batch, CacheSpec
from hf_paged.request import Constraint as Constraint
from hf_paged.request import Request
from hf_paged.request import TokenSampler as TokenSampler
from hf_paged.stats import StepStats

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

    def graph_key(self) -> Hashable:
        """A value that changes when the forward launches something else, or on other tensors: graphs are void then."""
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

    Four more attributes are optional; a backend without one is taken to have the value in brackets:
        kernels (None): `Kernels` for the parts around attention; None: the model's own modules compute them.
        sampling (None): `SamplingKernels`; None: torch chooses tokens.
        deterministic (False): whether a token's results, those of `kernels` too, have the same bits whatever else is
            in the batch, and however its row is cut in steps.
        captures (False): whether a plan's launches may be captured in a CUDA graph and serve any batch of its layout:
            they read lengths, tables and slots from the batch's tensors alone.
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


class RotaryPlan(LayerPlan, Protocol):
    """A plan that rotates queries and keys on the way to the cache; those of a backend with `kernels` do."""

    def run_rotary(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`LayerPlan.run`, before which the first elements of each query and key head are rotated, in place.

        Args:
            query, key, value: as for `run`, RoPE not applied yet; any strides between tokens and heads.
            cos, sin: [T, half of the rotated elements].
            interleaved: whether element 2i turns with 2i + 1, or else i with i + half.

        Raises:
            TypeError, ValueError: these arguments are not served; nothing was launched.
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


class SamplingKernels(Protocol):
    """Choosing tokens on the device."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The largest logit of each row: int64 [rows] from [rows, vocabulary]."""
        ...

    def sample(
        self,
        logits: torch.Tensor,
        *,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
        min_p: torch.Tensor | None,
    ) -> torch.Tensor:
        """One token a row, int64 [rows], each by its own parameters ([rows] each); a temperature of 0 is argmax."""
        ...


class Kernels(Protocol):
    """What stands around attention in a decoder layer. Weights are [out, in], as `torch.nn.Linear` has them.

    A norm is (weight [n], eps, whether the weight counts as 1 + weight).
    """

    def compiles(self, tokens: int, weight: torch.Tensor) -> bool:
        """Whether a product of `tokens` rows with that weight takes a kernel that is compiled at its first use."""
        ...

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """RMSNorm over the last dimension of [rows, n], or of [rows, heads, n] with any row stride."""
        ...

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: Norm | None = None
    ) -> torch.Tensor:
        """X [rows, in], normed first if asked for, times the weight: [rows, out]."""
        ...

    def gated(self, x: torch.Tensor, weight: torch.Tensor, kind: str, norm: Norm | None = None) -> torch.Tensor:
        """act(gate) · up of x [rows, in], normed first if asked for; the weight's first half makes the gate."""
        ...

    def add_linear(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """Total [rows, out] += x [rows, in] times the weight, in place."""
        ...


Norm = tuple["torch.Tensor", float, bool]


class LogitsProcessor(Protocol):
    """Changes the logits of a batch before the engine's own sampler draws. Batched, on the device, without a sync.

    It may also have `concerns(request) -> bool`: whether it would change that request's logits at all. It is left out
    of a batch none of whose requests concerns it, and one without the method concerns every request.

    Attributes:
        needs_tokens: whether it reads the tokens of the requests that concern it: their steps wait then until the last
            one is known. Taken for True where a processor doesn't say.
    """

    def process(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        """New logits [rows, vocabulary], float32; may change them in place."""
        ...


class StepObserver(Protocol):
    """Sees each step of the engine, on the host, when its tokens are known; not one whose requests all ended before."""

    def __call__(self, stats: StepStats) -> None:
        """Take note of a step that is done."""
        ...
