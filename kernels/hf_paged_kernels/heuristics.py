"""Launch parameters by shape and GPU: a small table of the fastest measured; nothing is tuned when a program runs.

Figures were taken on an H100 (see `hf_paged/bench/results/kernels-h100.json`); other GPUs get the same entries, reduced
to fit their shared memory. Change an entry only because of a measurement.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class DecodeConfig:
    """How one decode program runs; a merge loads `merge` partial results of 512 elements at once.

    `early`: it starts before the previous kernel has ended, and lets the next one start at once. Otherwise it starts
    after that end, and lets the next one start when it has read its keys.
    """

    num_warps: int
    num_stages: int
    merge: int = 16
    early: bool = True


@dataclass(frozen=True)
class DecodePlanShape:
    """How a step is cut: up to `target` work items besides one a row, of at least `min_chunk` keys, in whole tiles."""

    target: int
    min_chunk: int
    tile: int
    kv_heads: int


@dataclass(frozen=True)
class PrefillConfig:
    """Tile of a prefill program: `block_m` (token, head) rows against `block_n` keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearConfig:
    """How a Hopper linear layer streams its weights: tiles of `block_n` rows by `block_k`, for `block_t` tokens.

    `stages` tiles of weights and `x_stages` of tokens are in flight; `split` programs share a tile's K; `early`: the
    next kernel may start at once, not only when this one has requested its last weights.
    """

    block_t: int
    block_n: int
    block_k: int
    stages: int
    x_stages: int
    split: int
    programs: int
    early: bool


@cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 4 if it is no GPU (the interpreter), to keep grids small."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; a small GPU's if `device` is none (the interpreter)."""
    if device.type != "cuda":
        return 96 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the attribute
    return int(properties.shared_memory_per_block_optin)


def _decode_row(rows: int, kv_heads: int, device: torch.device) -> tuple[int, int, int, int, int]:
    """(tile, warps, stages, merge, programs to aim for) by how far one program a row and head fills the GPU.

    A tile's copies wait for its block ids: five stages keep two tiles in flight, three stages one. Fastest, measured
    with 2-byte elements and heads of 128: if rows suffice for two programs on each multiprocessor, small programs that
    share it; for about one, programs of eight warps; for long rows cut in pieces, many small programs. A large merge
    takes registers from all programs, so that fewer fit: only one or two long rows, in many pieces, need one.
    """
    sms = sm_count(device)
    if rows * kv_heads >= 2 * sms:
        return 64, 4, 3, 4, 2 * sms
    if rows * kv_heads >= 0.95 * sms:
        return 64, 8, 5, 8, sms
    merge = 32 if rows <= 2 else 8 if rows <= 4 else 2
    return 32, 4, 5, merge, 2 * sms


@cache
def decode_plan_shape(
    rows: int, kv_heads: int, head_dim: int, v_dim: int, itemsize: int, device: torch.device
) -> DecodePlanShape:
    """How decode attention is cut. `itemsize` is bytes per cached element."""
    tile, _, _, _, programs = _decode_row(rows, kv_heads, device)
    while tile > 16 and tile * (_padded(head_dim) + _padded(v_dim)) * itemsize > 32 * 1024:
        tile //= 2
    return DecodePlanShape(target=max(1, programs // kv_heads), min_chunk=64, tile=tile, kv_heads=kv_heads)


@cache
def decode_config(
    rows: int, kv_heads: int, head_dim: int, v_dim: int, q_itemsize: int, device: torch.device
) -> DecodeConfig:
    """Warps and pipeline depth of decode attention. `q_itemsize` is bytes per query element."""
    wide = max(_padded(head_dim), _padded(v_dim))
    if q_itemsize == 4:
        return DecodeConfig(num_warps=4, num_stages=1 if wide > 128 else 2)
    _, warps, stages, merge, _ = _decode_row(rows, kv_heads, device)
    # Programs of a few rows that start early would share multiprocessors with those of the previous kernel.
    early = rows <= 2 or rows * kv_heads >= 0.95 * sm_count(device)
    return DecodeConfig(warps, min(stages, 3) if wide > 128 else stages, merge, early)


@cache
def prefill_config(head_dim: int, v_dim: int, q_itemsize: int, source: int, device: torch.device) -> PrefillConfig:
    """Tile of variable-length attention; `source` as in `prefill`: 0 paged, 1 contiguous, 2 by descriptor."""
    wide = max(_padded(head_dim), _padded(v_dim))
    if q_itemsize == 4:
        return PrefillConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
    if wide > 128:
        choice = PrefillConfig(block_m=128, block_n=32, num_warps=8, num_stages=2)
    elif source == 2:
        choice = PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=3)
    elif source == 1:
        choice = PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)
    else:
        choice = PrefillConfig(block_m=128, block_n=128, num_warps=8, num_stages=3)
    taken = q_itemsize * (choice.block_m + 2 * choice.num_stages * choice.block_n) * wide
    if taken > _shared_memory(device):
        choice = PrefillConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    return choice


@cache
def invariant_prefill_config(head_dim: int, v_dim: int, q_itemsize: int, device: torch.device) -> PrefillConfig:
    """The one tile of batch-invariant attention: small, since every decode row takes a whole program for each head."""
    wide = max(_padded(head_dim), _padded(v_dim))
    if q_itemsize == 4 or wide > 128:
        return PrefillConfig(block_m=64 if q_itemsize == 2 else 32, block_n=32, num_warps=4, num_stages=1)
    stages = 3 if q_itemsize * (64 + 6 * 64) * wide <= _shared_memory(device) else 1
    return PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=stages)


@cache
def norm_config(n: int, rows: int | None) -> tuple[int, int]:
    """(rows, warps) of a norm program over rows of n elements: 32 elements a thread if there are enough rows.

    With rows=None, the same for any number of rows: how a row's sum is split among threads changes its last bit.
    """
    width = 1 << (n - 1).bit_length()
    block_m = max(1, min(8192 // width, 16))
    while block_m > 1 and rows is not None and rows <= block_m * 256:  # few rows, as in a decode step: more programs
        block_m //= 2
    return block_m, max(1, min(16, block_m * width // 1024))


@cache
def activation_config(n: int, rows: int) -> tuple[int, int]:
    """(columns, warps) of a gated-activation program."""
    return min(1024, 1 << (n - 1).bit_length()), 4


@cache
def sampling_config(rows: int, vocab: int) -> tuple[int, int]:
    """(tokens of the vocabulary a program, elements at a time): many rows fill the GPU with larger pieces."""
    block = min(1024, 1 << (vocab - 1).bit_length())
    return max(block, 4096 if rows < 32 else 16384), block


@cache
def hopper_config(head_dim: int) -> tuple[int, int]:
    """(keys a tile, tiles in flight) of the warp-specialised kernel: as many as fit in 227 KiB beside the queries."""
    return (128, 2) if head_dim == 128 else (128, 3)


# (rows, K, stages, token stages, early) by tokens rounded up, as measured in whole decode steps of Llama-3.1-8B.
# One program with a deep pipeline on each multiprocessor beats two: with two for the gate and up projection alone, a
# step took 3 to 27 % longer.
_LINEAR = {
    8: (64, 128, 12, 12, True),
    16: (64, 256, 5, 5, True),
    32: (64, 128, 10, 5, False),
    64: (64, 128, 8, 4, True),
}
_LINEAR_GATED = {**_LINEAR, 16: (64, 256, 5, 5, False), 64: (128, 64, 8, 6, True)}


@cache
def linear_config(
    tokens: int, n: int, k: int, gated: bool, device: torch.device, *, splits: bool = True
) -> LinearConfig:
    """Launch parameters of a Hopper linear layer of 1 to 64 tokens, with `n` outputs each (if gated, after the gate).

    Without `splits` no two programs share a K, so that its products are added up in one order.
    """
    block_t = max(8, 1 << (tokens - 1).bit_length())
    block_n, block_k, stages, x_stages, early = (_LINEAR_GATED if gated else _LINEAR)[block_t]
    tiles = -(-n // (block_n // 2 if gated else block_n))
    sms = sm_count(device)
    # Half the multiprocessors can use the whole memory bandwidth, but not for long: a large K is shared by two.
    split = 2 if splits and not gated and 2 * tiles <= sms and k >= 8192 and block_t in (8, 64) else 1
    # Fewer programs could need as many rounds (gate and up: 112 for 448 tiles), but took 1 to 3 % more of a step at 8
    # and 32 tokens.
    programs = min(tiles * split, sms)
    return LinearConfig(block_t, block_n, block_k, stages, x_stages, split, programs, early)


@cache
def linear_beats_cublas(tokens: int, n: int, k: int) -> bool:
    """True if a layer of Hopper linear layers was measured faster than one of cuBLAS and separate kernels.

    Models from SmolLM2-135M (576) to Llama-3.1-70B (8192), at 1 to 64 tokens. At 64, output projections alone took up
    to 20 % longer than cuBLAS, but whole layers less time; the largest model's took as long. At 128, as long or longer.
    With many tokens, gated layers alone mostly took less time (one pass less, for the activation), but prefill with
    them 1 to 2 % more, and steps of 256 as long.
    """
    return 1 <= tokens <= (32 if min(n, k) >= 8192 else 64) and min(n, k) >= 576 and k % 8 == 0


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of a program of `hopper_matmul`: `block_n` rows of weight for `block_t` tokens, `stages` in flight."""

    block_t: int
    block_n: int
    stages: int
    programs: int


# (tokens, rows of weight, stages): how long a step of 64 elements of K takes, in hundredths of a microsecond, as found
# by timing each tile at 64 to 8,192 tokens.
_MATMUL = {(128, 256, 4): 60, (128, 128, 6): 34, (128, 64, 6): 26, (64, 64, 8): 23}


@cache
def matmul_config(tokens: int, n: int, gated: bool, device: torch.device) -> MatmulConfig:
    """Launch parameters of a Hopper linear layer of many tokens, with `n` outputs each (if gated, after the gate).

    The tile with the least total time: large tiles read operands less often, small ones leave fewer multiprocessors
    idle.
    """
    sms = sm_count(device)
    rows = 2 * n if gated else n

    def tiles(block_t: int, block_n: int) -> int:
        return -(-tokens // block_t) * -(-rows // block_n)

    sizes = [size for size in _MATMUL if size[1] >= 128 or not gated]  # results leave 64 columns at a time
    block_t, block_n, stages = min(sizes, key=lambda size: -(-tiles(*size[:2]) // sms) * _MATMUL[size])
    return MatmulConfig(block_t, block_n, stages, programs=min(tiles(block_t, block_n), sms))


@dataclass(frozen=True)
class PortableConfig:
    """Tile of a portable linear layer's program: `block_n` rows of weight by `block_k`, for `block_t` tokens."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@cache
def portable_linear_config(tokens: int) -> PortableConfig:
    """Launch parameters of a portable linear layer; not tuned."""
    block_t = max(16, min(64, 1 << max(tokens - 1, 0).bit_length()))
    rows, k = (64, 64) if block_t == 64 else (32, 128)
    return PortableConfig(block_t, rows, k, num_warps=4, num_stages=4)


@cache
def invariant_linear_config(tokens: int, itemsize: int, gated: bool, device: torch.device) -> PortableConfig:
    """Launch parameters of a batch-invariant linear layer: every tile adds a token's products up in the same order.

    That order is K's, 16 elements at a time, in one accumulator: nothing is split along K.
    """
    if itemsize == 4:
        return PortableConfig(16, 64, 32, num_warps=4, num_stages=2)
    large = PortableConfig(128, 64 if gated else 128, 64, num_warps=8, num_stages=3)
    if tokens > 64 and _shared_memory(device) >= 2 * 64 * 3 * 256:
        return large
    return PortableConfig(64, 64, 64, num_warps=4, num_stages=3)
