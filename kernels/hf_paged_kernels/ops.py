"""The kernels as torch custom ops with fake implementations, so that `torch.compile` and tracing pass through.

All of them write into tensors that they are given and return nothing, so that one empty fake serves each. Arguments are
expected to be checked: call them through `api`.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import activation, cache, decode, norm, prefill, sampling
from .heuristics import decode_config, decode_plan_shape, invariant_prefill_config, prefill_config
from .linear import linear as run_linear

try:
    from . import hopper
except ImportError:  # a Triton without Gluon, or with another one: the portable kernel serves all calls
    hopper = None

LIBRARY = "hf_paged_kernels"


class _Op:
    """A kernel as a custom op, called as such where something looks on: a compiler, a dispatch mode, autograd.

    Elsewhere the function is called that the op would run, for torch's dispatch of an op written in Python takes the
    host longer than the launch.
    """

    def __init__(self, name: str, function, mutates: tuple[str, ...]) -> None:
        self.op = torch.library.custom_op(f"{LIBRARY}::{name}", function, mutates_args=mutates)
        self.op.register_fake(lambda *args, **kwargs: None)
        self._function = function

    def __call__(self, *args) -> None:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
            self.op(*args)
        else:
            self._function(*args)


def _op(name: str, *mutates: str):
    """Registers a function under `name`; `mutates` are the arguments it writes."""
    return lambda function: _Op(name, function, mutates)


def _shape(kv_heads: int, head_dim: int, v_dim: int, itemsize: int, rows: int, device: torch.device):
    return decode_plan_shape(rows, kv_heads, head_dim, v_dim, itemsize, device)


@_op("plan_decode", "workspace")
def plan_decode(
    seq_lens: Tensor, workspace: Tensor, window: int, kv_heads: int, head_dim: int, v_dim: int, itemsize: int
) -> None:
    """See `decode.plan`."""
    shape = _shape(kv_heads, head_dim, v_dim, itemsize, seq_lens.shape[0], seq_lens.device)
    decode.plan(seq_lens, workspace, window, shape)


@_op("decode_attention", "out", "workspace")
def decode_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, out: Tensor, workspace: Tensor, scale: float,
    softcap: float, sinks: Tensor | None, alibi_slopes: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """See `decode.decode`."""
    rows, dim, v_dim = query.shape[0], query.shape[2], v_cache.shape[3]
    shape = _shape(k_cache.shape[2], dim, v_dim, k_cache.element_size(), rows, query.device)
    config = decode_config(rows, k_cache.shape[2], dim, v_dim, query.element_size(), query.device)
    decode.decode(
        query, k_cache, v_cache, block_tables, out, workspace, scale, softcap, sinks, alibi_slopes, k_scale, v_scale,
        shape, config,
    )  # fmt: skip


@_op("prefill_attention", "out")
def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, query_start_loc: Tensor, seq_lens: Tensor | None,
    block_tables: Tensor | None, scale: float, window: int, softcap: float, sinks: Tensor | None,
    alibi_slopes: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, invariant: bool,
) -> None:  # fmt: skip
    """See `prefill.prefill`; on Hopper `hopper.prefill` where it serves the call."""
    plain = not window and not softcap and all(x is None for x in (sinks, alibi_slopes, k_scale, v_scale))
    rows = query_start_loc.shape[0] - 1
    if hopper is not None and not invariant and hopper.supports(query, key, value, rows, plain):
        hopper.prefill(query, key, value, out, query_start_loc, seq_lens, block_tables, scale)
        return
    source = prefill.PAGED
    if block_tables is None:
        source = prefill.DESCRIPTOR if prefill.descriptor_ready(key, value) else prefill.CONTIGUOUS
    sizes = query.shape[2], value.shape[-1], query.element_size()
    config = (
        invariant_prefill_config(*sizes, query.device) if invariant else prefill_config(*sizes, source, query.device)
    )
    prefill.prefill(
        query, key, value, out, query_start_loc, seq_lens, block_tables, scale, window, softcap, sinks, alibi_slopes,
        k_scale, v_scale, config, source, invariant,
    )  # fmt: skip


@_op("write_cache", "k_cache", "v_cache", "query_out", "key_out")
def write_cache(
    query: Tensor | None, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    cos: Tensor | None, sin: Tensor | None, query_out: Tensor | None, key_out: Tensor | None, interleaved: bool,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """See `cache.write`."""
    cache.write(
        query, key, value, k_cache, v_cache, slot_mapping, cos, sin, query_out, key_out, interleaved, k_scale, v_scale
    )


@_op("copy_blocks", "caches")
def copy_blocks(caches: list[Tensor], bases: Tensor, pairs: Tensor) -> None:
    """See `cache.copy_blocks`."""
    first = caches[0]
    size = first.element_size()
    cache.copy_blocks(bases, pairs, first[0].numel() * size, first.stride(0) * size)


@_op("rms_norm", "out", "residual")
def rms_norm(
    x: Tensor, weight: Tensor | None, out: Tensor, residual: Tensor | None, eps: float, gemma: bool, invariant: bool
) -> None:  # fmt: skip
    """See `norm.rms_norm`."""
    norm.rms_norm(x, weight, out, residual, eps, gemma, invariant)


@_op("gated_activation", "out")
def gated_activation(gate: Tensor, up: Tensor, out: Tensor, kind: str) -> None:
    """See `activation.gated_activation`."""
    activation.gated_activation(gate, up, out, kind)


@_op("linear", "out")
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float, gemma: bool,
    residual: Tensor | None, gate: str | None, invariant: bool, out: Tensor,
) -> None:  # fmt: skip
    """See `linear.linear`."""
    run_linear(x, weight, bias, norm_weight, eps, gemma, residual, gate, invariant, out)


@_op("argmax", "out")
def argmax(logits: Tensor, out: Tensor) -> None:
    """See `sampling.argmax`."""
    sampling.argmax(logits, out)


@_op("sample", "out")
def sample(
    logits: Tensor, out: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, top_k: Tensor | None,
    top_p: Tensor | None, min_p: Tensor | None,
) -> None:  # fmt: skip
    """See `sampling.sample`."""
    sampling.sample(logits, out, temperature, seeds, positions, top_k, top_p, min_p)
