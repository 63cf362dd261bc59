"""The public functions: checked arguments, then the Triton kernel or its torch reference, as `impl` says.

`impl="triton"` needs CUDA tensors (or Triton's interpreter); `impl="torch"` runs anywhere and waits for the device
where it must. Nothing falls back from one to the other. With `debug=True` the values of device metadata are checked
too, which waits for the device. Shapes: `tokens` flat query tokens, `rows` sequences, `blocks` of `page` tokens in the
pool.
"""

import torch
from torch import Tensor

from . import checks, ops, reference
from .activation import KINDS
from .decode import workspace_bytes
from .heuristics import decode_plan_shape
from .linear import serves


def decode_workspace_bytes(rows: int, num_heads: int, k_cache: Tensor, v_cache: Tensor) -> int:
    """Bytes of the uint8 workspace that a decode step of `rows` rows needs.

    Allocate it with `torch.zeros`, once, for each shape of step and each window that is in use at a time; kernels leave
    it as they need to find it. It must not serve two streams at once.
    """
    _, _, kv_heads, dim = k_cache.shape
    shape = decode_plan_shape(rows, kv_heads, dim, v_cache.shape[3], k_cache.element_size(), k_cache.device)
    return workspace_bytes(rows, num_heads, v_cache.shape[3], shape)


def _workspace(workspace: Tensor, rows: int, num_heads: int, k_cache: Tensor, v_cache: Tensor) -> None:
    checks.tensor("workspace", workspace, 1, (torch.uint8,), k_cache.device)
    need = decode_workspace_bytes(rows, num_heads, k_cache, v_cache)
    if workspace.numel() < need or not workspace.is_contiguous() or workspace.data_ptr() % 16:
        raise ValueError(
            f"workspace has {workspace.numel()} bytes; it must have {need}, contiguous and 16-byte aligned"
        )


def plan_decode(seq_lens: Tensor, workspace: Tensor, k_cache: Tensor, v_cache: Tensor, *, window: int = 0) -> None:
    """Cuts one decode step into work items, into `workspace`; runs on the device, once a step and window.

    seq_lens int32 [rows]: KV length of each row, this step's token included; 0 marks a padded row. `window` is that of
    the layers that will run with this plan: 0 for none. The step's layers then pass `planned=True`.
    """
    checks.caches(k_cache, v_cache, k_cache.device)
    checks.vector("seq_lens", seq_lens, seq_lens.shape[0], (torch.int32,), k_cache.device)
    _workspace(workspace, seq_lens.shape[0], k_cache.shape[2], k_cache, v_cache)
    checks.implementation("triton", k_cache.device)
    ops.plan_decode(
        seq_lens, workspace, window, k_cache.shape[2], k_cache.shape[3], v_cache.shape[3], k_cache.element_size()
    )


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    workspace: Tensor | None = None,
    *,
    scale: float,
    out: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    planned: bool = False,
    impl: str = "triton",
    debug: bool = False,
) -> Tensor:
    """Attention of one query token a row over its paged keys; returns `out` [rows, heads, value dim].

    query [rows, heads, dim]; k_cache [blocks, page, kv heads, dim] and v_cache [blocks, page, kv heads, value dim], of
    the query's dtype or float8_e4m3fn with `k_scale` and `v_scale` (float32, one or one a KV head: cached * scale is
    the true value); block_tables int32 [rows, max blocks]; seq_lens int32 [rows]. Row r's query sits at position
    seq_lens[r] - 1 and sees the last `window` keys (0: all). `sinks` and `alibi_slopes` are per query head; see
    `reference.attend` for the formula. Rows of length 0 give zeros. `workspace` as `decode_workspace_bytes` says;
    `planned`: `plan_decode` has run for these lengths and this window.
    """
    device = query.device
    checks.implementation(impl, device)
    checks.caches(k_cache, v_cache, device)
    if out is None:
        out = query.new_empty(*query.shape[:2], v_cache.shape[3])
    checks.heads(query, k_cache.shape[2], k_cache.shape[3], v_cache.shape[3], out, k_cache.dtype)
    checks.tables(block_tables, seq_lens, query.shape[0], device)
    checks.scores(scale, window, softcap, sinks, alibi_slopes, query.shape[1], device)
    checks.scales(k_scale, v_scale, k_cache.dtype == checks.FP8, k_cache.shape[2], device)
    if debug:
        checks.table_values(block_tables, seq_lens, k_cache)
    if impl == "torch":
        reference.decode_attention(
            query, k_cache, v_cache, block_tables, seq_lens, out, scale=scale, window=window, softcap=softcap,
            sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        return out
    if not query.shape[0]:
        return out
    _workspace(workspace, query.shape[0], query.shape[1], k_cache, v_cache)
    if not planned:
        plan_decode(seq_lens, workspace, k_cache, v_cache, window=window)
    ops.decode_attention(
        query, k_cache, v_cache, block_tables, out, workspace, scale, softcap, sinks, alibi_slopes, k_scale, v_scale
    )
    return out


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    seq_lens: Tensor | None = None,
    block_tables: Tensor | None = None,
    out: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    invariant: bool = False,
    impl: str = "triton",
    debug: bool = False,
) -> Tensor:
    """Causal attention of rows of any number of query tokens; returns `out` [tokens, heads, value dim].

    query [tokens, heads, dim]; row r has tokens query_start_loc[r] to query_start_loc[r + 1] (int32 [rows + 1]). With
    block_tables int32 [rows, max blocks] and seq_lens int32 [rows], key and value are paged caches as in
    `decode_attention`, and query i of q sits at position seq_lens[r] - q + i: a prefill, a chunk over a prefix, or a
    decode row. Without, key and value are [tokens, kv heads, dim] beside the query, and rows have no prefix. The grid
    depends on shapes alone, so that a captured graph serves any batch of its size. Tokens behind the last row, and rows
    of length 0, give zeros. `invariant`, of paged calls: a token's result has the same bits whatever is beside it, and
    whether its row has more queries or one.
    """
    device = query.device
    checks.implementation(impl, device)
    paged = block_tables is not None
    if paged != (seq_lens is not None):
        raise ValueError("seq_lens and block_tables belong together: give both (paged) or neither (contiguous)")
    checks.tensor("query_start_loc", query_start_loc, 1, (torch.int32,), device)
    checks.vector("query_start_loc", query_start_loc, query_start_loc.shape[0], (torch.int32,), device)
    if invariant and not paged:
        raise ValueError("invariant=True needs block_tables: keys that come otherwise are added up in another order")
    if query_start_loc.shape[0] < 1:
        raise ValueError("query_start_loc is empty; it must hold rows + 1 numbers")
    if paged:
        checks.caches(key, value, device)
        checks.tables(block_tables, seq_lens, query_start_loc.shape[0] - 1, device)
    else:
        checks.tensor("key", key, 3, checks.FLOATS, device)
        checks.tensor("value", value, 3, (key.dtype,), device)
        checks.shape("key", key, query.shape[0], None, None)
        checks.shape("value", value, *key.shape[:2], None)
        checks.dense_last("key", key)
        checks.dense_last("value", value)
    if out is None:
        out = query.new_empty(*query.shape[:2], value.shape[-1])
    checks.heads(query, key.shape[-2], key.shape[-1], value.shape[-1], out, key.dtype)
    checks.scores(scale, window, softcap, sinks, alibi_slopes, query.shape[1], device)
    checks.scales(k_scale, v_scale, key.dtype == checks.FP8, key.shape[-2], device)
    if debug:
        checks.start_values(query_start_loc, seq_lens, query.shape[0])
        if paged:
            checks.table_values(block_tables, seq_lens, key)
    if impl == "torch":
        reference.prefill_attention(
            query, key, value, out, query_start_loc, seq_lens=seq_lens, block_tables=block_tables, scale=scale,
            window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    else:
        ops.prefill_attention(
            query, key, value, out, query_start_loc, seq_lens, block_tables, scale, window, softcap, sinks,
            alibi_slopes, k_scale, v_scale, invariant,
        )  # fmt: skip
    return out


def write_cache(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    query: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_out: Tensor | None = None,
    key_out: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    impl: str = "triton",
    debug: bool = False,
) -> None:
    """Stores key [tokens, kv heads, dim] and value at slot_mapping int64 [tokens], block * page + offset.

    A negative slot stores nothing. With cos and sin [tokens, rotary / 2] (any float dtype, any strides), the first
    `rotary` elements of each head of query and key are rotated on the way, in the half layout or the `interleaved` one;
    the query into `query_out` (default: in place), the key also into `key_out` where given (it may be `key`). Elements
    past `rotary` are copied. fp8 caches take key / k_scale, clamped to e4m3's range. `value` and the caches must not
    overlap.
    """
    device = key.device if isinstance(key, Tensor) else torch.device("cpu")
    checks.implementation(impl, device)
    checks.tensor("key", key, 3, checks.FLOATS, device)
    checks.tensor("value", value, 3, (key.dtype,), device)
    checks.caches(k_cache, v_cache, device)
    checks.shape("key", key, None, *k_cache.shape[2:])
    checks.shape("value", value, key.shape[0], *v_cache.shape[2:])
    checks.dense_last("key", key)
    checks.dense_last("value", value)
    checks.vector("slot_mapping", slot_mapping, key.shape[0], (torch.int64,), device)
    checks.scales(k_scale, v_scale, k_cache.dtype == checks.FP8, key.shape[1], device)
    if k_cache.dtype not in (key.dtype, checks.FP8):
        raise TypeError(f"key has dtype {key.dtype}; it must be the cache's, {k_cache.dtype}, or that float8_e4m3fn")
    if query is not None and query_out is None:
        query_out = query
    _check_rotary(key, query, cos, sin, query_out, key_out, interleaved)
    if debug:
        checks.slot_values(slot_mapping, k_cache)
    if impl == "torch":
        reference.write_cache(
            key, value, k_cache, v_cache, slot_mapping, query=query, cos=cos, sin=sin, query_out=query_out,
            key_out=key_out, interleaved=interleaved, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    else:
        ops.write_cache(
            query,
            key,
            value,
            k_cache,
            v_cache,
            slot_mapping,
            cos,
            sin,
            query_out,
            key_out,
            interleaved,
            k_scale,
            v_scale,
        )


def _check_rotary(key, query, cos, sin, query_out, key_out, interleaved) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together: give both or neither")
    if cos is None:
        if query is not None or key_out is not None:
            raise ValueError("query and key_out are for rotary embedding; without cos and sin they must be None")
        return
    tokens, _, dim = key.shape
    for name, x in (("cos", cos), ("sin", sin)):
        checks.tensor(name, x, 2, (*checks.FLOATS, torch.float64), key.device)
        checks.shape(name, x, tokens, None)
    if not 1 <= cos.shape[1] <= dim // 2 or sin.shape != cos.shape or sin.stride() != cos.stride():
        raise ValueError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; they must be alike (strides too), "
            f"[{tokens}, rotary / 2] with rotary / 2 at most {dim // 2}"
        )
    if query is not None:
        for name, x in (("query", query), ("query_out", query_out)):
            checks.tensor(name, x, 3, (key.dtype,), key.device)
            checks.shape(name, x, tokens, None if x is query else query.shape[1], dim)
            checks.dense_last(name, x)
    if key_out is not None:
        checks.tensor("key_out", key_out, 3, (key.dtype,), key.device)
        checks.shape("key_out", key_out, *key.shape)
        checks.dense_last("key_out", key_out)


def block_copy_bases(caches: list[Tensor]) -> Tensor:
    """Addresses of `caches` as an int64 device tensor, for `copy_blocks`: made once, when the caches are allocated."""
    return torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.int64, device=caches[0].device)


def copy_blocks(caches: list[Tensor], pairs: Tensor, *, bases: Tensor | None = None, impl: str = "triton") -> None:
    """Copies block `source` to block `target` in every cache, in one launch, for each row (source, target) of `pairs`.

    caches: all layers' key and value caches, alike in shape, strides and dtype, each block's memory dense; pairs int64
    [n, 2], rows with a negative number are skipped. No target may be a source or a target of another pair. `bases` from
    `block_copy_bases` spares a copy from the host (and is needed in graph capture).
    """
    if not caches:
        raise ValueError("caches is empty; it must hold at least one tensor")
    first = caches[0]
    checks.implementation(impl, first.device)
    for i, cache in enumerate(caches):
        checks.tensor(f"caches[{i}]", cache, first.dim(), (first.dtype,), first.device)
        if cache.shape != first.shape or cache.stride() != first.stride():
            raise ValueError(
                f"caches[{i}] has shape {tuple(cache.shape)}, strides {cache.stride()}; caches must be alike"
            )
    span = 1 + sum((n - 1) * s for n, s in zip(first.shape[1:], first.stride()[1:], strict=True))
    size = first.element_size()
    if span != first[0].numel() or span * size % 8 or first.stride(0) * size % 8:
        raise ValueError(f"caches have strides {first.stride()}; each block must be dense, of a multiple of 8 bytes")
    checks.tensor("pairs", pairs, 2, (torch.int64,), first.device)
    checks.shape("pairs", pairs, None, 2)
    if not pairs.is_contiguous():
        raise ValueError(f"pairs has strides {pairs.stride()}; it must be contiguous")
    if impl == "torch":
        reference.copy_blocks(caches, pairs)
        return
    if bases is None:
        bases = block_copy_bases(caches)
    checks.vector("bases", bases, len(caches), (torch.int64,), first.device)
    ops.copy_blocks(caches, bases, pairs)


def _three(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.view(-1, 1, x.shape[-1])


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    gemma: bool = False,
    invariant: bool = False,
    impl: str = "triton",
) -> Tensor:
    """RMSNorm over the last dimension; returns `out`, of x's shape and dtype (default: new; it may be `x`).

    With `residual`, first residual += x, in place, and the sum is normed. weight [n], or None. `gemma`: the weight
    counts as 1 + weight, and nothing is rounded before the product. 3-D x may have any outer strides (heads of a merged
    projection); other shapes must be contiguous. `invariant`: a row's result has the same bits however many rows there
    are.
    """
    checks.tensor("x", x, x.dim() if isinstance(x, Tensor) else 0, checks.FLOATS, getattr(x, "device", None))
    checks.implementation(impl, x.device)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for name, y in (("x", x), ("residual", residual), ("out", out)):
        if y is None:
            continue
        checks.tensor(name, y, x.dim(), (x.dtype,), x.device)
        checks.shape(name, y, *x.shape)
        checks.dense_last(name, y)
        if x.dim() != 3 and not y.is_contiguous():
            raise ValueError(f"{name} has strides {y.stride()}; it must be contiguous unless it has 3 dimensions")
    if not 1 <= x.shape[-1] <= 32768:
        raise ValueError(f"x has rows of {x.shape[-1]} elements; allowed are 1 to 32768")
    if weight is not None:
        checks.vector("weight", weight, x.shape[-1], checks.FLOATS, x.device)
    if impl == "torch":
        reference.rms_norm(x, weight, out, residual=residual, eps=eps, gemma=gemma)
    else:
        total = None if residual is None else _three(residual)
        ops.rms_norm(_three(x), weight, _three(out), total, eps, gemma, invariant)
    return out


def gated_activation(
    gate: Tensor, up: Tensor, *, kind: str = "silu", out: Tensor | None = None, impl: str = "triton"
) -> Tensor:
    """act(gate) * up for gate, up [rows, n] (row strides free: halves of a merged projection); returns `out` [rows, n].

    kind: "silu", "gelu" (erf) or "gelu_tanh". `out` may be `gate` or `up`.
    """
    checks.one_of("kind", kind, tuple(KINDS))
    checks.tensor("gate", gate, 2, checks.FLOATS, getattr(gate, "device", None))
    checks.implementation(impl, gate.device)
    if out is None:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for name, x in (("gate", gate), ("up", up), ("out", out)):
        checks.tensor(name, x, 2, (gate.dtype,), gate.device)
        checks.shape(name, x, *gate.shape)
        checks.dense_last(name, x)
    if impl == "torch":
        reference.gated_activation(gate, up, out, kind=kind)
    else:
        ops.gated_activation(gate, up, out, kind)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gemma: bool = False,
    residual: Tensor | None = None,
    gate: str | None = None,
    invariant: bool = False,
    out: Tensor | None = None,
    impl: str = "triton",
) -> Tensor:
    """A linear layer, with what stands beside it in a decoder layer; returns `out` [tokens, n].

    x [tokens, k], float16 or bfloat16, with any row stride; weight [n, k], as torch.nn.Linear holds it, with any row
    stride; bias [n]. In this order: with norm_weight [k], x is first normed, as by `rms_norm` with this `eps` and
    `gemma`; then out = x W^T + bias, in float32. With `gate` ("silu", "gelu" or "gelu_tanh"), weight is [2 n, k] and
    bias [2 n]: the first half of the rows the gate projection's, the second the up projection's, and out = act(gate) *
    up. Then `residual` [tokens, n] is added. All is rounded once, at the end. `out` may be `residual`, and must not
    overlap x. A new `out` is contiguous.

    Any number of tokens works; `linear_serves` tells where it is faster than cuBLAS. Rows of x, weight and, with more
    than 64 tokens, out that aren't 16 bytes aligned take a slower kernel. `invariant`: a token's result has
    the same bits however many tokens there are; x may be float32 then.

    On Hopper the weights are read before the kernel in front has ended, if that is one of this package: none of these
    may write weight or norm_weight right before.
    """
    checks.tensor("x", x, 2, checks.FLOATS if invariant else checks.HALVES, getattr(x, "device", None))
    checks.implementation(impl, x.device)
    n = checks.linear(x, weight, bias, norm_weight, eps, residual, gate, tuple(KINDS))
    if out is None:
        out = x.new_empty(x.shape[0], n)
    checks.tensor("out", out, 2, (x.dtype,), x.device)
    checks.shape("out", out, x.shape[0], n)
    checks.dense_last("out", out)
    if impl == "torch":
        reference.linear(
            x, weight, out, bias=bias, norm_weight=norm_weight, eps=eps, gemma=gemma, residual=residual, gate=gate
        )
    else:
        ops.linear(x, weight, bias, norm_weight, eps, gemma, residual, gate, invariant, out)
    return out


def linear_serves(
    tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    norm: bool = False,
    gate: bool = False,
) -> bool:
    """Whether `linear` of so many tokens with a weight [n, k] is measured to beat cuBLAS and the kernels beside it.

    `n` counts all rows of the weight, gate and up projection together; `norm` and `gate` say whether the call has them.
    So far the answer is the same with and without: layers were measured whole, for kernels of this package that follow
    each other overlap, and one from elsewhere between them costs more than it may win.
    """
    return serves(tokens, n, k, dtype, torch.device(device))


def _check_logits(logits: Tensor, out: Tensor | None) -> Tensor:
    checks.tensor("logits", logits, 2, checks.FLOATS, getattr(logits, "device", None))
    checks.dense_last("logits", logits)
    if not logits.shape[1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; the vocabulary must not be empty")
    if out is None:
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    checks.vector("out", out, logits.shape[0], (torch.int64,), logits.device)
    return out


def argmax(logits: Tensor, *, out: Tensor | None = None, impl: str = "triton") -> Tensor:
    """The first index of the largest logit of each row: int64 [rows] of logits [rows, vocab]."""
    out = _check_logits(logits, out)
    checks.implementation(impl, logits.device)
    (reference if impl == "torch" else ops).argmax(logits, out)
    return out


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "triton",
) -> Tensor:
    """One token a row, int64 [rows], drawn from logits [rows, vocab] with each row's own parameters; no host sync.

    temperature float32 [rows] (0: argmax); seeds, positions int64 [rows]: noise is a function of (seed, position,
    token) alone; top_k int32 [rows] (0: off), top_p float32 (1: off), min_p float32 (0: off), applied in this order,
    after the temperature, as Transformers does. Tokens that equal a threshold all stay. None turns a filter off for all
    rows.
    """
    out = _check_logits(logits, out)
    checks.implementation(impl, logits.device)
    rows, device = logits.shape[0], logits.device
    checks.vector("temperature", temperature, rows, (torch.float32,), device)
    checks.vector("seeds", seeds, rows, (torch.int64,), device)
    checks.vector("positions", positions, rows, (torch.int64,), device)
    for name, x, dtype in (
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        if x is not None:
            checks.vector(name, x, rows, (dtype,), device)
    if impl == "torch":
        reference.sample(
            logits,
            out,
            temperature=temperature,
            seeds=seeds,
            positions=positions,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
    else:
        ops.sample(logits, out, temperature, seeds, positions, top_k, top_p, min_p)
    return out
