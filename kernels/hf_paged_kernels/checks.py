"""Argument checks. Each raises TypeError or ValueError with the argument's name, its value, and what is allowed."""

import os
from itertools import pairwise

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
PAGES = (16, 32, 64)
IMPLS = ("triton", "torch")


def one_of(name: str, value: object, allowed: tuple) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def tensor(name: str, x: torch.Tensor, dims: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """A tensor with `dims` dimensions, one of `dtypes`, on `device`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {dims} dimensions")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are {', '.join(map(str, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as the other tensors are")


def shape(name: str, x: torch.Tensor, *expected: int | None) -> None:
    """`expected` sizes; None allows any."""
    if any(want is not None and have != want for have, want in zip(x.shape, expected, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{wanted}]")


def dense_last(name: str, x: torch.Tensor) -> None:
    """The last dimension is contiguous."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {x.stride()}; its last dimension must be contiguous (stride 1)")


def vector(name: str, x: torch.Tensor, length: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """A contiguous 1-D tensor of `length` elements."""
    tensor(name, x, 1, dtypes, device)
    shape(name, x, length)
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}; it must be contiguous")


def implementation(impl: str, device: torch.device) -> None:
    """`impl` is known, and can run where the tensors are."""
    one_of("impl", impl, IMPLS)
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"impl is 'triton' and the tensors are on {device}; allowed are CUDA tensors, or impl='torch'")


def caches(k_cache: torch.Tensor, v_cache: torch.Tensor, device: torch.device) -> None:
    """Two paged caches [blocks, page, kv heads, dim] of one dtype."""
    tensor("k_cache", k_cache, 4, (*FLOATS, FP8), device)
    tensor("v_cache", v_cache, 4, (k_cache.dtype,), device)
    shape("v_cache", v_cache, *k_cache.shape[:3], None)
    one_of("block size (k_cache.shape[1])", k_cache.shape[1], PAGES)
    dense_last("k_cache", k_cache)
    dense_last("v_cache", v_cache)


def scales(k_scale, v_scale, fp8: bool, kv_heads: int, device: torch.device) -> None:
    """float32 scales of one element or one per KV head: both for an fp8 cache, none for others."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != fp8:
            need = "given with a float8_e4m3fn cache" if fp8 else "None unless the cache is float8_e4m3fn"
            raise ValueError(f"{name} is {'None' if scale is None else 'given'}; it must be {need}")
        if fp8:
            vector(name, scale, scale.numel() if isinstance(scale, torch.Tensor) else 0, (torch.float32,), device)
            one_of(f"{name}.numel()", scale.numel(), (1, kv_heads))


def heads(
    query: torch.Tensor, kv_heads: int, dim: int, v_dim: int, out: torch.Tensor, cache_dtype: torch.dtype
) -> None:
    """Query [tokens, heads, dim] and out [tokens, heads, v_dim] against `kv_heads` cached heads."""
    tensor("query", query, 3, FLOATS, query.device)
    shape("query", query, None, None, dim)
    dense_last("query", query)
    if kv_heads < 1 or query.shape[1] % kv_heads:
        raise ValueError(f"query has {query.shape[1]} heads; it must be a multiple of the {kv_heads} KV heads")
    if cache_dtype not in (query.dtype, FP8):
        raise TypeError(
            f"query has dtype {query.dtype}; it must be that of the keys, {cache_dtype}, or they float8_e4m3fn"
        )
    for name, size in (("head dim", dim), ("value head dim", v_dim)):
        if not 1 <= size <= 256:
            raise ValueError(f"{name} is {size}; allowed are 1 to 256")
    tensor("out", out, 3, FLOATS, query.device)
    shape("out", out, *query.shape[:2], v_dim)
    dense_last("out", out)


def scores(
    scale: float, window: int, softcap: float, sinks, alibi_slopes, num_heads: int, device: torch.device
) -> None:
    """Scale > 0, window >= 0 (0: none), softcap >= 0 (0: none), sinks and slopes one a query head."""
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if window < 0:
        raise ValueError(f"window is {window}; it must be positive, or 0 for none")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0 for none")
    for name, x in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if x is not None:
            vector(name, x, num_heads, FLOATS, device)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias, norm_weight, eps: float, residual, gate: str | None, kinds: tuple
) -> int:
    """Operands of a linear layer over x [tokens, k]; returns how many outputs a token has."""
    dense_last("x", x)
    tensor("weight", weight, 2, (x.dtype,), x.device)
    shape("weight", weight, None, x.shape[1])
    dense_last("weight", weight)
    rows, k = weight.shape
    if not rows or not k:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must not be empty")
    if gate is not None:
        one_of("gate", gate, kinds)
        if rows % 2:
            raise ValueError(f"weight has {rows} rows; with a gate, gate and up projection must be half of them each")
    if bias is not None:
        vector("bias", bias, rows, FLOATS, x.device)
    if norm_weight is not None:
        vector("norm_weight", norm_weight, k, FLOATS, x.device)
        if k > 32768:
            raise ValueError(f"x has rows of {k} elements; with a norm, allowed are 1 to 32768")
    if eps < 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    n = rows if gate is None else rows // 2
    if residual is not None:
        tensor("residual", residual, 2, (x.dtype,), x.device)
        shape("residual", residual, x.shape[0], n)
        dense_last("residual", residual)
    return n


def tables(block_tables: torch.Tensor, seq_lens: torch.Tensor, rows: int, device: torch.device) -> None:
    """Block tables [rows, max blocks] and lengths [rows], both int32."""
    tensor("block_tables", block_tables, 2, (torch.int32,), device)
    shape("block_tables", block_tables, rows, None)
    dense_last("block_tables", block_tables)
    vector("seq_lens", seq_lens, rows, (torch.int32,), device)


def table_values(block_tables: torch.Tensor, seq_lens: torch.Tensor, k_cache: torch.Tensor) -> None:
    """Debug only, for it waits for the device: every block that a length reaches exists."""
    blocks, page = k_cache.shape[:2]
    longest = block_tables.shape[1] * page
    for row, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= longest:
            raise ValueError(f"seq_lens[{row}] is {length}; allowed are 0 to {longest}, what block_tables hold")
        for column, block in enumerate(block_tables[row, : -(-length // page)].tolist()):
            if not 0 <= block < blocks:
                raise ValueError(f"block_tables[{row}, {column}] is {block}; allowed are 0 to {blocks - 1}")


def start_values(query_start_loc: torch.Tensor, seq_lens: torch.Tensor | None, tokens: int) -> None:
    """Debug only: rows follow each other from 0, end within the tokens, and are no longer than their sequences."""
    starts = query_start_loc.tolist()
    if starts[0] != 0 or starts != sorted(starts) or starts[-1] > tokens:
        raise ValueError(f"query_start_loc is {starts}; it must rise from 0 to at most the {tokens} tokens")
    lens = [b - a for a, b in pairwise(starts)]
    for row, (query, length) in enumerate(zip(lens, lens if seq_lens is None else seq_lens.tolist(), strict=True)):
        if query > length > 0:
            raise ValueError(f"seq_lens[{row}] is {length}; it must be at least the row's {query} query tokens, or 0")


def slot_values(slot_mapping: torch.Tensor, k_cache: torch.Tensor) -> None:
    """Debug only: every slot exists or is negative, and no two tokens share one."""
    slots = slot_mapping[slot_mapping >= 0]
    limit = k_cache.shape[0] * k_cache.shape[1]
    if slots.numel() and int(slots.max()) >= limit:
        raise ValueError(f"slot_mapping holds {int(slots.max())}; allowed are negative numbers and 0 to {limit - 1}")
    if slots.unique().numel() != slots.numel():
        raise ValueError("slot_mapping holds a slot twice; each token needs its own")
